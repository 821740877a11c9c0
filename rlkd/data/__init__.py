"""Rows from files and the hub, and the examples that teacher and student read."""
