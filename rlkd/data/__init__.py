"""Rows in, and the examples that both models see."""
