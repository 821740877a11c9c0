"""Functions of next-token logits whose gradients are known in closed form.

Autograd would keep several [n, V] tensors for each and fetch them from memory again. Here the logits alone are kept,
and both directions take a few rows at a time, so that what lies between stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
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


@dataclass(frozen=True, slots=True)
class PolicyTerm:
    """A function f of pi = softmax(logits), and its slope s = df/dpi: df/dlogits = pi (s - sum_a pi(a) s(a)).

    value      (log pi [n, V], pi [n, V], *args [n, ...]) -> f, [n]
    add_slope  (total [n, V], weight [n, 1], log pi, *args): total += weight s, s up to a constant per row
    Called with (logits [n, V], *args) it returns f, [n], differentiable in the logits; `policy_terms` has several share
    one softmax.
    """

    value: Callable[..., Tensor]
    add_slope: Callable[..., Any]

    def __call__(self, logits: Tensor, *args: Tensor) -> Tensor:
        return policy_terms(logits, torch.zeros_like(logits[..., 0], dtype=torch.long), (self, args))[1]


def policy_terms(logits: Tensor, ids: Tensor, *terms: tuple[PolicyTerm, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """log pi(a|s) of the given tokens and the value of every term, [n] each, in one pass over the logits.

    Args: logits [n, V]; ids [n]; terms, each with its arguments [n, ...].
    """

    def each(args: tuple[Tensor, ...]) -> Iterator[tuple[PolicyTerm, tuple[Tensor, ...]]]:
        rest = iter(args)
        return ((term, tuple(islice(rest, len(own)))) for term, own in terms)

    def values(logits: Tensor, ids: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        log_pi = logits.log_softmax(-1)
        logps, pi = log_pi.gather(-1, ids[:, None]).squeeze(-1), log_pi.exp() if terms else log_pi
        return logps, *(term.value(log_pi, pi, *own) for term, own in each(args))

    def gradient(grads: tuple[Tensor | None, ...], logits: Tensor, ids: Tensor, *args: Tensor) -> Tensor:
        of_logps, *of_terms = (None if grad is None else grad[:, None] for grad in grads)
        log_pi = logits.log_softmax(-1)
        slope = torch.zeros_like(logits)
        for (term, own), weight in zip(each(args), of_terms, strict=True):
            if weight is not None:
                term.add_slope(slope, weight, log_pi, *own)
        pi = log_pi.exp_()
        mean = (pi * slope).sum(-1, keepdim=True)
        if of_logps is None:
            return pi.mul_(slope.sub_(mean))
        # d log pi(a) = 1[a] - pi
        return pi.mul_(slope.sub_(mean + of_logps)).scatter_add_(-1, ids[:, None], of_logps)

    return closed_form(values, gradient, logits, ids, *(x for _, own in terms for x in own))


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
