"""Answers: sampled for training (rollouts), or written to disk once (pseudo-labels)."""
