"""The reward a teacher's logits induce (Hao, Liu, Mou 2022, arXiv 2210.08708, eq. 6-8; LLMR 2024, arXiv 2409.12500).

A teacher trained by teacher forcing is read as a Boltzmann expert: its logits are its Q-function up to a constant
c(s) per state. Inverting the Bellman equation with discount gamma gives

    r(s_t, a_t) = q(s_t, a_t) - gamma * V(s_{t+1}),        V(terminal) = 0

and the return of that reward telescopes for every V with V(q + c) = V(q) + c:

    G_t = V(s_t) + sum_{k >= t} gamma^{k-t} A_V(s_k, a_k),   A_V = q - V

A_V does not depend on c(s) (the gauge), so training computes in A_V. Cutting an answer at max_new_tokens is not a
terminal state: bootstrapping with V(s_{T+1}) there means, in A_V form, to add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..checks import OneOf, check_choice
from ..records import TeacherSignal, given
from .closed_form import PolicyTerm, blocks

Gauge = Literal["log_prob", "centered_logit", "raw_logit"]


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward per token, read by trainers and views alike. Everything is in nats.

    needs        fields of the teacher's signal that it reads
    per_token    signal -> r(s_t, a_t) of the given tokens, [B, R]
    state_value  signal -> the part of r that depends on the state only, V(s_t) in the raw-logit gauge, [B, R]
    expected     (student logits [n, V], teacher logits [n, V], V(s) [n]) -> E_{a ~ pi(.|s)}[r(s, a)], [n],
                 differentiable in the student (a `PolicyTerm` shares the loss's softmax); None if it has no closed form
    """

    needs: frozenset[str]
    per_token: Callable[[TeacherSignal], Tensor]
    state_value: Callable[[TeacherSignal], Tensor]
    expected: Callable[[Tensor, Tensor, Tensor], Tensor] | None


def token_scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of next-token logits that every induced reward needs.

    Args: logits [N, V] over valid ids only; ids [N] the given tokens.
    Returns: chosen logit, max, logsumexp, mean logit and entropy (nats), each [N] float32 (or float64 as given).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    parts = [_scores(logits[rows], ids[rows]) for rows in blocks(logits)]
    chosen, maximum, logsumexp, mean, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen, maximum, logsumexp, mean, entropy


def _scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    maximum = logits.amax(-1)
    # One exponential serves the normaliser and the entropy H = logsumexp d - sum_a p(a) d(a), with d = q - max q <= 0
    # so that large logits do not cancel.
    below = logits - maximum.detach()[:, None]
    weights = below.exp()
    total = weights.sum(-1)
    logsumexp = maximum.detach() + total.log()
    entropy = (total.log() - (weights * below).sum(-1) / total).clamp(min=0)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return chosen, maximum, logsumexp, logits.mean(-1), entropy


# E_{a ~ pi(.|s)}[A_V(s, a)] = sum_a pi(a|s) q(s, a) - V(s), [N], of the teacher's logits q [N, V] and V [N] in the
# raw-logit gauge. It is the closed-form baseline and, differentiated, the exact gradient of the immediate term (all
# actions, no sampling).
expected_advantage = PolicyTerm(
    value=lambda log_pi, pi, q, value: (pi * q).sum(-1) - value,
    add_slope=lambda total, weight, log_pi, q, value: total.addcmul_(q, weight),
)


def induced(state_value: Callable[[TeacherSignal], Tensor], *needs: str) -> Reward:
    """A_V(s_t, a_t) = q(s_t, a_t) - V(s_t), [B, R], the same in every gauge, for a V(s_t) [B, R]."""

    def advantage(signal: TeacherSignal) -> Tensor:
        return signal.chosen - state_value(signal)

    return Reward(frozenset({"chosen", *needs}), advantage, state_value, expected_advantage)


def max_value(signal: TeacherSignal) -> Tensor:
    """V = max_a q(s, a), [B, R] (Hao et al. 2022). A_V is minus the regret to the teacher's greedy choice, <= 0."""
    return given(signal.max)


def lse_value(signal: TeacherSignal) -> Tensor:
    """V = logsumexp_a q(s, a), [B, R] (soft Bellman). A_V = log p(a|s)."""
    return given(signal.logsumexp)


def softmax_value(signal: TeacherSignal) -> Tensor:
    """V = sum_a p(a|s) q(s, a) = logsumexp - H(p), [B, R] (released code of Hao et al.). A_V = log p(a|s) + H(p)."""
    return given(signal.logsumexp) - given(signal.entropy)


REWARDS: dict[str, Reward] = {
    "max": induced(max_value, "max"),
    "lse": induced(lse_value, "logsumexp"),
    "softmax": induced(softmax_value, "logsumexp", "entropy"),
}


RewardName = Annotated[str, OneOf(REWARDS)]


def induced_advantage(signal: TeacherSignal, value: RewardName = "max") -> Tensor:
    """A_V(s_t, a_t) = q(s_t, a_t) - V(s_t), [B, R], nats: the reward of that name, per token.

    Raises ConfigError for an unknown name.
    """
    check_choice("value", value, REWARDS)
    return REWARDS[value].per_token(signal)


def gauge_shift(signal: TeacherSignal, gauge: Gauge = "log_prob") -> Tensor:
    """c(s_t) [B, R] that is subtracted from logits to enter the gauge: logsumexp, mean logit, or 0.

    Raises ConfigError for another gauge.
    """
    check_choice("gauge", gauge, Gauge)
    shifts = {"log_prob": signal.logsumexp, "centered_logit": signal.mean, "raw_logit": torch.zeros_like(signal.chosen)}
    return given(shifts[gauge])


def teacher_value(signal: TeacherSignal, value: RewardName = "max", gauge: Gauge = "log_prob") -> Tensor:
    """V(s_t) [B, R] in the given gauge: the part of G_t that the teacher's own value removes as a baseline.

    Raises ConfigError for an unknown value or gauge.
    """
    check_choice("value", value, REWARDS)
    return REWARDS[value].state_value(signal) - gauge_shift(signal, gauge)


def induced_reward(
    signal: TeacherSignal, mask: Tensor, *, value: RewardName = "max", gauge: Gauge = "log_prob", gamma: float = 1.0
) -> Tensor:
    """The per-token reward itself, r_t = q(s_t, a_t) - gamma V(s_{t+1}), [B, R], 0 at padding.

    The last token keeps r = q: after end-of-sequence V(terminal) = 0; in a cut answer the bootstrap gamma V(s_{T+1})
    of the return cancels the same term of the reward. Either way sum_t gamma^t r_t = V(s_0) + sum_t gamma^t A_V.
    For display and replication: training uses A_V. Raises ConfigError for an unknown value or gauge.
    """
    v = teacher_value(signal, value, gauge) * mask
    q = (signal.chosen - gauge_shift(signal, gauge)) * mask
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    return (q - gamma * following) * mask


def average_templates(per_template: list[TeacherSignal]) -> TeacherSignal:
    """The mean of the signals of one answer under K templates (LLMR 2024), fields [B, R]: every A_V is linear in them.
    What the signals lack stays None.

    Distributions are not averaged here: the mean of a head's inputs is the input of the mean logits (`pool`).
    """
    k = len(per_template)

    def mean(name: str) -> Any:
        values = [getattr(signal, name) for signal in per_template]
        return None if values[0] is None else sum(values) / k

    return TeacherSignal(**{name: mean(name) for name in ("chosen", "max", "logsumexp", "mean", "entropy")})
