"""Model families, heads, the frozen teacher and the trained policy."""
