"""Scores: the held-out evaluation of a policy, task metrics, linear probes."""
