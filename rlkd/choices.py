"""Choices that the command line offers before it imports what implements them."""

from typing import Literal

# How a layer's outputs become one vector per text: `models.encoders.representations`.
Pool = Literal["cls", "mean"]
# What of a row a template shows: `templates.template`.
Truncation = Literal["none", "t0"]
# Input rows that cannot be used: `data.rows`.
OnBadRow = Literal["fail", "skip"]
