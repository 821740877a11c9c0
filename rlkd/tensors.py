"""Masked arithmetic on token tensors.

Shape legend, used in every docstring of rlkd:
    B rows, P prompt tokens, R answer tokens, N packed valid tokens, V valid vocabulary, D hidden width,
    K rollouts of one prompt or templates of one input. Masks are boolean, True = counts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def where_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The name of the first tensor with NaN or infinity, and where: how many, in which row; None if all are finite."""
    checked = [(name, t) for name, t in tensors if t.dtype in (torch.float16, torch.bfloat16, torch.float32)]
    bad = [name for name, t in checked if not t.isfinite().all()]
    if not bad:
        return None
    tensor = dict(checked)[bad[0]]
    wrong = ~tensor.isfinite()
    row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0]) if tensor.dim() else 0
    more = f", and {len(bad) - 1} other tensors" if len(bad) > 1 else ""
    return bad[0], f"{int(wrong.sum())} of {tensor.numel()}, the first in row {row}{more}"


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over True positions of `mask` (both [...]); 0 if none is True. Returns a scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """`[count, sum, sum of squares]` of `x` over `mask`, float64 [3]: add them across processes, then
    `moments_to_mean_std`.
    """
    valid = x[mask].double()
    return torch.stack(
        [torch.tensor(float(valid.numel()), dtype=torch.float64, device=x.device), valid.sum(), valid.square().sum()]
    )


def moments_to_mean_std(moments: Tensor) -> tuple[float, float]:
    """Population mean and standard deviation from `masked_moments`."""
    count, total, squares = moments.tolist()
    mean = total / max(count, 1.0)
    variance = squares / max(count, 1.0) - mean * mean
    return mean, max(variance, 0.0) ** 0.5


def pad_stack(rows: list[Tensor], value: float | int = 0) -> Tensor:
    """Right-pad tensors [R_i, ...] with `value` and stack them to [B, max R_i, ...]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def pad_rows(rows: list[list[int]], value: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Lists of token ids as one tensor [B, L], right-padded with `value`, and its mask [B, L], both on `device`."""
    ids = pad_stack([torch.tensor(row, dtype=torch.long) for row in rows], value)
    return ids.to(device), length_mask([len(row) for row in rows], ids.shape[1]).to(device)


def length_mask(lengths: Tensor | list[int], width: int | None = None) -> Tensor:
    """Boolean mask [B, width] that is True for the first `lengths[i]` positions of row i."""
    lengths = torch.as_tensor(lengths)
    width = int(lengths.max()) if width is None else width
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """Values [N, ...] of the True positions of `mask` [B, R] back in their places [B, R, ...], zeros elsewhere;
    differentiable.
    """
    rest = packed.shape[1:]
    grid = torch.zeros(mask.shape + rest, dtype=packed.dtype, device=packed.device)
    return grid.masked_scatter(mask[(..., *(None,) * len(rest))], packed)
