"""Decoding with recorded log-probabilities: rollouts for training, engines for labels."""
