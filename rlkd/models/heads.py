"""The vocabulary projection, applied in chunks so that logits [B, R, V] are never held.

`Head.map` is the one place where logits are computed: the teacher's scores, the student's log-probs,
entropies, exact expectations and divergences are all functions of one chunk of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import Batched
from .generation import NO_RULES, AnswerRules, forbidden, restrict

# One chunk of logits, at least: 32 MiB in float32, or 262 tokens at V = 32,100. From that size on glibc maps every
# buffer by itself and gives it back when freed; smaller ones share a heap that fragments to many times their size.
CHUNK_ELEMENTS = 2**23

TokenFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Head:
    """logits = (scale * hidden) weight^T + bias over the first `valid_vocab` ids.

    weight  [V_padded, D] the model's own parameter;  bias [V_padded] or None
    rules   what answers may hold; `map` restricts logits to it, `logits` does not
    T5 pads its 32,100 pieces to 32,128 rows: rows beyond `valid_vocab` never enter a normaliser.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    valid_vocab: int
    rules: AnswerRules = NO_RULES

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32 (float64 stays), computed in the dtype of `hidden` whatever autocast says."""
        weight = self.weight[: self.valid_vocab]
        bias = None if self.bias is None else self.bias[: self.valid_vocab].to(hidden.dtype)
        # bfloat16 would round logits of 8 to 16 to steps of 1/16 nat, and the backward pass, which computes them again,
        # runs outside autocast (a float32 head in RL: MiniMax-M1, arXiv 2506.13585, sec. 3.2).
        with torch.autocast(hidden.device.type, enabled=False):
            out = torch.nn.functional.linear(hidden * self.scale, weight.to(hidden.dtype), bias)
        return out if out.dtype == torch.float64 else out.float()

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
        chunk = chunk_tokens or max(16, math.ceil(CHUNK_ELEMENTS / self.valid_vocab))
        outputs = _ChunkedHead.apply(self, function, chunk, limits, hidden, self.weight, self.bias, *token_args)
        return outputs


@dataclass(frozen=True, slots=True)
class HeadOverStates(Batched):
    """The distributions of a local model: its head applied to the head inputs `states` [B, R, D] of answers with these
    `limits` [B, R, K].
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
        v = head.valid_vocab
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[4:7]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        head_weight = weight[:v].to(hidden.dtype)  # once, not for every chunk
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, limits = head.logits(hidden[rows]), _cut(ctx.limits, rows)
            d_logits = _gradient(ctx.function, restrict(logits, limits), [a[rows] for a in args], grads, rows)
            if limits is not None:
                d_logits.masked_fill_(forbidden(logits, limits), 0.0)
            d_logits = d_logits.to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                grad_hidden[rows] = head.scale * (d_logits @ head_weight)
            if grad_weight is not None:
                # Padded rows of the weight have no gradient. addmm_ adds in place, without a [V, D] temporary.
                d_weight = grad_weight[:v]
                if d_weight.dtype == d_logits.dtype:
                    d_weight.addmm_(d_logits.T, hidden[rows], alpha=head.scale)
                else:
                    d_weight += head.scale * (d_logits.T @ hidden[rows])
            if grad_bias is not None:
                grad_bias[:v] += d_logits.sum(0)
            del d_logits  # or it would add to the memory of the next chunk's logits
        return (None, None, None, None, grad_hidden, grad_weight, grad_bias, *(None for _ in args))


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
