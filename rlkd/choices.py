"""Choices that the command line offers before it imports their implementation."""

from typing import Literal

# How a layer's outputs become one vector per text: `models.encoders.representations`.
Pool = Literal["cls", "mean"]
# How the columns of a row are truncated in a template: `templates.template`.
Truncation = Literal["none", "t0"]
# Input rows that cannot be used: `data.rows`.
OnBadRow = Literal["fail", "skip"]
# What a classifier's outputs are: `evaluation.problems`. The first three are transformers' own names.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression", "token_classification"]
