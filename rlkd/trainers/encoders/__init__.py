"""Distillation of encoder-only classifiers (TKD)."""
