"""Functions of next-token logits whose gradients are known in closed form.

Autograd would keep several [n, V] tensors for each and fetch them from memory again. Here the logits alone are kept,
and both directions take a few rows at a time, so that what lies between stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED_ELEMENTS = 2**19  # 2 MiB in float32: 16 rows at V = 32,100

Values = Callable[..., tuple[Tensor, ...]]
Gradient = Callable[..., Tensor]


def closed_form(values: Values, gradient: Gradient, logits: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    """`values(logits [n, V], *args [n, ...])`, one tensor [n] each, differentiable in the logits once.

    gradient  (the outputs' gradients [n] each, None where nothing reads one, logits, *args) -> the gradient [n, V] in
              the logits of their sum
    Leading dimensions may be any, the same in all arguments, instead of n.
    """
    shape = logits.shape[:-1]
    rows = [x.reshape(-1, *x.shape[len(shape) :]) for x in (logits, *args)]
    outputs = _ClosedForm.apply(values, gradient, *rows)
    return tuple(output.view(shape) for output in outputs)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Values, gradient: Gradient, logits: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *args)
        parts = [values(*(x[rows] for x in (logits, *args))) for rows in blocks(logits)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, *args = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return None, None, None, *(None for _ in args)
        out = torch.empty_like(logits)
        for rows in blocks(logits):
            own = tuple(None if grad is None else grad[rows] for grad in grads)
            out[rows] = ctx.gradient(own, logits[rows], *(x[rows] for x in args))
        return None, None, out, *(None for _ in args)


def blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of a few rows of logits [n, V] at a time; of all of them, if there are none or not on a CPU."""
    n, vocabulary = logits.shape
    size = max(n, 1) if logits.device.type != "cpu" else max(1, CACHED_ELEMENTS // max(vocabulary, 1))
    yield from (slice(start, start + size) for start in range(0, max(n, 1), size))
