"""Rows of unequal lengths in batches that compute little padding."""

from __future__ import annotations

import torch

# Padding that one batch of unequal lengths may hold, in tokens: about what one more forward costs. A CPU computes
# padding like any other token; on an accelerator launches dominate.
PADDING = {"cpu": 32, "accelerator": 2048}


def padding_allowed(device: torch.device) -> int:
    """Padding tokens that one batch on `device` may hold."""
    return PADDING["cpu" if device.type == "cpu" else "accelerator"]


def batches_by_length(lengths: list[int], batch_tokens: int, padding: int | None = None) -> list[list[int]]:
    """Row indices, sorted by length and cut so that rows x longest <= batch_tokens (one row at least).

    With `padding` also so that rows x longest - sum of lengths <= padding.
    """
    batches: list[list[int]] = []
    padded = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches:
            rows = batches[-1]
            more = padded + len(rows) * (lengths[i] - lengths[rows[-1]])
            if (len(rows) + 1) * lengths[i] <= batch_tokens and (padding is None or more <= padding):
                rows.append(i)
                padded = more
                continue
        batches.append([i])
        padded = 0
    return batches
