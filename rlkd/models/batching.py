"""Rows of unequal lengths in batches that compute little padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors import length_mask

# Padding that one batch of unequal lengths may hold, in tokens: about what one more forward costs. A CPU computes
# padding like any other token; on an accelerator launches dominate.
PADDING = {"cpu": 32, "accelerator": 2048}


def padding_allowed(device: torch.device) -> int:
    """Padding tokens that one batch on `device` may hold."""
    return PADDING["cpu" if device.type == "cpu" else "accelerator"]


def batches_by_length(lengths: list[int], batch_tokens: int | None, padding: int | None = None) -> list[list[int]]:
    """Row indices, sorted by length and cut so that rows x longest <= batch_tokens (one row at least).

    With `padding` also so that rows x longest - sum of lengths <= padding. batch_tokens None: all in one batch.
    """
    batches: list[list[int]] = []
    padded = 0
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    if batch_tokens is None:
        return [order]
    for i in order:
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


def packed_by_length(
    forward: Callable[[list[int], Tensor], Tensor],
    prompt_lengths: list[int],
    answer_ids: Tensor,
    answer_mask: Tensor,
    batch_tokens: int | None,
) -> Tensor:
    """Hidden states [N, D] of the N tokens of `answer_mask` [B, R], computed in batches by the length of prompt and
    answer, each as wide as its longest answer.

    forward: of (rows, their ids [b, w]), hidden states [b, w, D] that predict these ids.
    """
    places = torch.arange(1, answer_mask.shape[1] + 1, device=answer_mask.device)
    ends = (answer_mask * places).amax(1)  # of the last token that counts
    lengths = ends.tolist()
    rows: list[Tensor | None] = [None] * len(lengths)
    total = [n + prompt for n, prompt in zip(lengths, prompt_lengths, strict=True)]
    for batch in batches_by_length(total, batch_tokens, padding_allowed(answer_ids.device)):
        width = max(max(lengths[i] for i in batch), 1)
        for i, row in zip(batch, forward(batch, answer_ids[batch, :width]), strict=True):
            rows[i] = row[: lengths[i]]
    # `rows` holds every position up to each answer's end; a mask may have gaps before that.
    before_end = length_mask(ends, answer_mask.shape[1])
    return torch.cat(rows)[answer_mask[before_end]]  # type: ignore[arg-type]
