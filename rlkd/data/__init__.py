"""Rows in, prompts over them, and the examples both models see."""
