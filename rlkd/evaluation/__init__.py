"""Scores: the held-out evaluation of a policy, token rewards of given answers, task metrics, linear probes."""
