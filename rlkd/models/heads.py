"""The vocabulary projection, applied in chunks so that logits [B, R, V] are never held.

Logits are computed here alone: the teacher's scores, the student's log-probs, entropies, exact expectations and
divergences are all functions of one chunk of logits. `Head.map` gives those numbers for whatever is made of them;
`Head.loss` goes on to the loss and its gradient while the chunk is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..records import Batched
from .generation import NO_RULES, AnswerRules, forbidden, restrict

# One chunk of logits, at least: 32 MiB in float32, or 262 tokens at V = 32,100. From that size on glibc maps every
# buffer by itself and gives it back when freed; smaller ones share a heap that fragments to many times their size.
CHUNK_ELEMENTS = 2**23

TokenFunction = Callable[..., tuple[Tensor, ...]]
# (rows, one [n] tensor per output of a TokenFunction, values [n]) -> (their part of the loss, whatever else is wanted).
RowLoss = Callable[[slice, tuple[Tensor, ...], Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class Head:
    """logits = (scale * hidden) weight^T + bias over the first `valid_vocab` ids, or c tanh of these / c (Gemma).

    weight  [V_padded, D] the model's own parameter;  bias [V_padded] or None
    rules   what answers may hold; `map` restricts logits to it, `logits` does not
    softcap c, or None
    T5 pads its 32,100 pieces to 32,128 rows: rows beyond `valid_vocab` never enter a normaliser.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    valid_vocab: int
    rules: AnswerRules = NO_RULES
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32 (float64 stays), computed in the dtype of `hidden` whatever autocast says."""
        weight = self.weight[: self.valid_vocab]
        bias = None if self.bias is None else self.bias[: self.valid_vocab].to(hidden.dtype)
        # bfloat16 would round logits of 8 to 16 to steps of 1/16 nat, and the backward pass, which computes them again,
        # runs outside autocast (a float32 head in RL: MiniMax-M1, arXiv 2506.13585, sec. 3.2).
        with torch.autocast(hidden.device.type, enabled=False):
            out = torch.nn.functional.linear(hidden * self.scale, weight.to(hidden.dtype), bias)
        out = out if out.dtype == torch.float64 else out.float()
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def before_cap(self, d_logits: Tensor, logits: Tensor) -> Tensor:
        """The gradient [n, V] in the logits without the soft cap, from that in the capped `logits` [n, V]."""
        return d_logits if self.softcap is None else d_logits * (1 - (logits / self.softcap).square())

    def mixed(self, inputs: list[Tensor]) -> tuple[Tensor, Head]:
        """Head inputs, and a head that makes the mean of K logits of them, from the K inputs [N, D] of these.

        The mean of its inputs gives a linear head the mean of the logits, [N, D]. A soft cap is not linear: all inputs
        are kept, [N, K, D], and the head that is returned has no gradients.
        """
        if len(inputs) == 1:
            return inputs[0], self
        if self.softcap is None:
            return torch.stack(inputs).mean(0), self
        return torch.stack(inputs, 1), MeanHead(*(getattr(self, field.name) for field in fields(self)))

    def map(
        self,
        function: TokenFunction,
        hidden: Tensor,
        *token_args: Tensor,
        limits: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> tuple[Tensor, ...]:
        """`function(logits [n, V], *token_args [n, ...]) -> tuple of [n]`, over all N tokens, chunk by chunk.

        Args: hidden [N, D]; token_args, tensors [N, ...] that are cut along; limits [N, K] of each token
        (`AnswerRules.limits`), if there are any. Differentiable in hidden and the head's own parameters, not in
        token_args: the backward pass computes each chunk's logits again.
        Returns: one [N] tensor per output of `function`.
        """
        chunk = chunk_tokens or self._chunk_tokens
        outputs = _ChunkedHead.apply(self, function, chunk, limits, hidden, self.weight, self.bias, *token_args)
        return outputs

    def loss(
        self,
        function: TokenFunction,
        loss: RowLoss,
        hidden: Tensor,
        *token_args: Tensor,
        row_tokens: list[int],
        values: Tensor,
        limits: Tensor | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """The sum of `loss` over all rows, and what else it returned for each group of rows.

        A loss knows the weight of every token as soon as it has a row's numbers, so each group's gradient is computed
        beside its logits, which the backward pass of `map` has to compute a second time.
        Args: as in `map`; hidden [N, D] of rows with `row_tokens` tokens each; loss, a sum of terms of single rows,
        called with as many whole rows as fit in a chunk (one, if it is longer); values [N], which it may read, too.
        Returns: the total, a scalar differentiable in hidden, values and the head's own parameters; and the list.
        """
        groups = _groups(row_tokens, self._chunk_tokens)
        task = _Rows(self, function, loss, groups, token_args, limits, torch.is_grad_enabled())
        # Gradients are computed here as in a backward pass, outside autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            total = _LossHead.apply(task, hidden, self.weight, self.bias, values)
        return total, task.others

    @property
    def _chunk_tokens(self) -> int:
        return max(16, math.ceil(CHUNK_ELEMENTS / self.valid_vocab))


class MeanHead(Head):
    """The mean of the logits of K head inputs [..., K, D] (`Head.mixed`)."""

    __slots__ = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., K, D] -> [..., V]."""
        first, *others = hidden.unbind(-2)
        total = Head.logits(self, first)
        for one in others:
            total += Head.logits(self, one)
        return total / hidden.shape[-2]


@dataclass(frozen=True, slots=True)
class HeadOverStates(Batched):
    """The distributions of a local model: its head applied to the head inputs `states` [B, R, D] of answers with these
    `limits` [B, R, K]. A `MeanHead` has several inputs for each token.
    """

    states: Tensor
    head: Head
    limits: Tensor | None = None

    @property
    def token_args(self) -> tuple[Tensor, ...]:
        return (self.states,) if self.limits is None else (self.states, self.limits)

    def logits(self, *token_args: Tensor) -> Tensor:
        """[n, V] from states [n, D] and, if there are any, limits [n, K]."""
        logits = self.head.logits(token_args[0])
        return restrict(logits, None if self.limits is None else token_args[1])


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        function: TokenFunction,
        chunk: int,
        limits: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *args: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.head, ctx.function, ctx.chunk, ctx.limits = head, function, chunk, limits
        # No logits are saved: the backward pass computes them again, one chunk at a time.
        ctx.save_for_backward(hidden, weight, bias, *args)
        outputs: tuple[Tensor, ...] = ()
        # An empty batch still runs one empty chunk, so that the number of outputs is known.
        for start in range(0, max(len(hidden), 1), chunk):
            rows = slice(start, start + chunk)
            values = function(restrict(head.logits(hidden[rows]), _cut(limits, rows)), *(a[rows] for a in args))
            outputs = outputs or tuple(value.new_empty(len(hidden)) for value in values)
            for output, value in zip(outputs, values, strict=True):
                output[rows] = value
            # Nothing small may outlive its chunk: between two large buffers it would keep the heap from reusing them.
            del values, value
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        head, chunk = ctx.head, ctx.chunk
        hidden, weight, bias, *args = ctx.saved_tensors
        gradients = _HeadGradients(head, hidden, weight, bias, ctx.needs_input_grad[4:7])
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, limits = head.logits(hidden[rows]), _cut(ctx.limits, rows)
            d_logits = _gradient(ctx.function, restrict(logits, limits), [a[rows] for a in args], grads, rows)
            d_logits = head.before_cap(d_logits, logits)
            if limits is not None:
                d_logits.masked_fill_(forbidden(logits, limits), 0.0)
            del logits
            gradients.add(rows, d_logits)
            del d_logits  # or it would add to the memory of the next chunk's logits
        return (None, None, None, None, *gradients.of, *(None for _ in args))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What `Head.loss` computes: `others` is filled while it does."""

    head: Head
    function: TokenFunction
    loss: RowLoss
    groups: list[tuple[slice, slice]]
    token_args: tuple[Tensor, ...]
    limits: Tensor | None
    with_gradients: bool
    others: list[Any] = field(default_factory=list)


class _LossHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Rows, hidden: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
        needed = [task.with_gradients and need for need in ctx.needs_input_grad[1:]]
        gradients = _HeadGradients(task.head, hidden, weight, bias, needed[:3])
        d_values = torch.zeros_like(values) if needed[3] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows, tokens in task.groups:
            limits = _cut(task.limits, tokens)
            leaves = (restrict(task.head.logits(hidden[tokens]), limits), values[tokens].detach())
            with torch.set_grad_enabled(any(needed)):
                logits, own_values = (leaf.requires_grad_(any(needed)) for leaf in leaves)
                outputs = task.function(logits, *(a[tokens] for a in task.token_args))
                part, other = task.loss(rows, outputs, own_values)
            total += part.detach()
            task.others.append(other)
            if any(needed):
                d_logits, d_own = torch.autograd.grad(part, leaves, allow_unused=True)
                banned = None if limits is None else forbidden(logits, limits)
                if d_logits is not None:
                    d_logits = task.head.before_cap(d_logits, leaves[0].detach())
                del leaves, logits, outputs, part  # with the graph: what follows needs the gradient alone
                if d_values is not None and d_own is not None:
                    d_values[tokens] = d_own
                if d_logits is not None:
                    gradients.add(tokens, d_logits if banned is None else d_logits.masked_fill_(banned, 0.0))
                del d_logits
        ctx.save_for_backward(*gradients.of, d_values)
        return total.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The gradient of the loss itself is there; what follows the loss in the graph scales it, by 1 as a rule.
        return None, *(None if g is None else g if grad == 1 else grad.to(g.dtype) * g for g in ctx.saved_tensors)


class _HeadGradients:
    """Sums the gradients of hidden states, weight and bias, as far as they are `needed`, over chunks of tokens."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]):
        self.head, self.source = head, hidden
        tensors = (hidden, weight, bias)
        # Padded rows of the weight have no gradient, and an empty batch none at all.
        self.of = [torch.zeros_like(t) if t is not None and n else None for t, n in zip(tensors, needed, strict=True)]
        self.weight = weight.detach()[: head.valid_vocab].to(hidden.dtype)  # once, not for every chunk

    def add(self, tokens: slice, d_logits: Tensor) -> None:
        """Add what d_logits [n, V], the gradient in the logits of these tokens, gives."""
        hidden, weight, bias = self.of
        v, scale = self.head.valid_vocab, self.head.scale
        d_logits, own = d_logits.to(self.source.dtype), self.source[tokens].detach()
        if hidden is not None:
            hidden[tokens] = scale * (d_logits @ self.weight)
        if weight is not None:
            # addmm_ adds in place, without a [V, D] temporary.
            if weight.dtype == d_logits.dtype:
                weight[:v].addmm_(d_logits.T, own, alpha=scale)
            else:
                weight[:v] += scale * (d_logits.T @ own)
        if bias is not None:
            bias[:v] += d_logits.sum(0)


def _groups(row_tokens: list[int], most: int) -> list[tuple[slice, slice]]:
    """(rows, their tokens): whole rows, at most `most` tokens together unless one row has more."""
    groups = []
    first, start, end = 0, 0, 0
    for row, tokens in enumerate(row_tokens):
        if end + tokens - start > most and row > first:
            groups.append((slice(first, row), slice(start, end)))
            first, start = row, end
        end += tokens
    return [*groups, (slice(first, len(row_tokens)), slice(start, end))]


def _cut(limits: Tensor | None, rows: slice) -> Tensor | None:
    return None if limits is None else limits[rows]


def _gradient(function: TokenFunction, logits: Tensor, args: list[Tensor], grads: tuple, rows: slice) -> Tensor:
    """Gradient [n, V] of sum_i <grads_i, function(logits)_i> in `logits`: one chunk, whose graph ends with the call."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        outputs = function(logits, *args)
    # Outputs such as an argmax have no gradient, and unused ones get None.
    used = [(o, g[rows]) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    return torch.autograd.grad([o for o, _ in used], logits, [g for _, g in used])[0]
