"""The reward a teacher's logits induce (Hao, Liu, Mou 2022, arXiv 2210.08708, eq. 6-8; LLMR 2024, arXiv 2409.12500).

A teacher trained by teacher forcing is read as a Boltzmann expert whose logits are its Q-function up to a constant
c(s) per state. Inverting the Bellman equation with discount gamma gives

    r(s_t, a_t) = q(s_t, a_t) - gamma * V(s_{t+1}),        V(terminal) = 0

and the return of that reward telescopes for every V with V(q + c) = V(q) + c:

    G_t = V(s_t) + sum_{k >= t} gamma^{k-t} A_V(s_k, a_k),   A_V = q - V

A_V does not depend on c(s) (the gauge). rlkd computes everything in A_V and adds V(s_t) back only where a gauge is
asked for to replicate others. Cutting an answer at max_new_tokens is not a terminal state: bootstrapping with
V(s_{T+1}) there means, in A_V form, to add nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..choices import Value
from ..records import TeacherScores

Gauge = Literal["log_prob", "centered_logit", "raw_logit"]


def token_scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of next-token logits that every induced reward needs.

    Args: logits [N, V] over valid ids only; ids [N] the given tokens.
    Returns: chosen logit, max, logsumexp, mean logit and entropy (nats), each [N] float32 (or float64 as given).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    maximum = logits.amax(-1)
    # One exponential serves the normaliser and the entropy H = logsumexp d - sum_a p(a) d(a), with d = q - max q <= 0
    # so that large logits do not cancel.
    below = logits - maximum.detach()[:, None]
    weights = below.exp()
    total = weights.sum(-1)
    logsumexp = maximum.detach() + total.log()
    entropy = (total.log() - torch.einsum("nv,nv->n", weights, below) / total).clamp(min=0)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return chosen, maximum, logsumexp, logits.mean(-1), entropy


def state_value(scores: TeacherScores, value: Value = "max") -> Tensor:
    """V(s_t) in the raw-logit gauge, [B, R].

    max:      V = max_a q(s, a)                (Hao et al. 2022, the default)
    lse:      V = logsumexp_a q(s, a)          (soft Bellman)
    softmax:  V = sum_a p(a|s) q(s, a) = logsumexp - H(p)   (their released code)
    """
    if value == "max":
        return scores.max
    if value == "lse":
        return scores.logsumexp
    if value == "softmax":
        return scores.logsumexp - scores.entropy
    raise ValueError(f"value = {value!r}: allowed are 'max', 'lse', 'softmax'")


def induced_advantage(scores: TeacherScores, value: Value = "max") -> Tensor:
    """A_V(s_t, a_t) = q(s_t, a_t) - V(s_t), [B, R], nats, the same in every gauge.

    max: regret to the teacher's greedy choice, <= 0. lse: log p(a|s). softmax: log p(a|s) + H(p).
    """
    return scores.chosen - state_value(scores, value)


def gauge_shift(scores: TeacherScores, gauge: Gauge = "log_prob") -> Tensor:
    """c(s_t) [B, R] that is subtracted from logits to enter the gauge: logsumexp, mean logit, or 0."""
    if gauge == "log_prob":
        return scores.logsumexp
    if gauge == "centered_logit":
        return scores.mean
    if gauge == "raw_logit":
        return torch.zeros_like(scores.chosen)
    raise ValueError(f"gauge = {gauge!r}: allowed are 'log_prob', 'centered_logit', 'raw_logit'")


def teacher_baseline(scores: TeacherScores, value: Value = "max", gauge: Gauge = "log_prob") -> Tensor:
    """V(s_t) [B, R] in the given gauge: the part of G_t that the teacher's own value removes as a baseline."""
    return state_value(scores, value) - gauge_shift(scores, gauge)


def induced_reward(
    scores: TeacherScores, mask: Tensor, *, value: Value = "max", gauge: Gauge = "log_prob", gamma: float = 1.0
) -> Tensor:
    """The per-token reward itself, r_t = q(s_t, a_t) - gamma V(s_{t+1}), [B, R], 0 at padding.

    The last token keeps r = q: after end-of-sequence V(terminal) = 0; in a cut answer the bootstrap gamma V(s_{T+1})
    of the return cancels the same term of the reward. Either way sum_t gamma^t r_t = V(s_0) + sum_t gamma^t A_V.
    For display and replication: training uses `induced_advantage`.
    """
    q = (scores.chosen - gauge_shift(scores, gauge)) * mask
    v = teacher_baseline(scores, value, gauge) * mask
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
    return (q - gamma * following) * mask


def expected_advantage(student_logits: Tensor, teacher_logits: Tensor, teacher_value: Tensor) -> Tensor:
    """E_{a ~ pi(.|s)}[A_V(s, a)] = sum_a pi(a|s) q(s, a) - V(s), [N]; differentiable in the student.

    Args: student_logits, teacher_logits [N, V]; teacher_value [N] in the raw-logit gauge. It is the closed-form
    baseline and, differentiated, the exact gradient of the immediate term (all actions, no sampling).
    """
    return (student_logits.softmax(-1) * teacher_logits).sum(-1) - teacher_value


def pool_templates(per_template: list[TeacherScores]) -> TeacherScores:
    """Average the scores of one answer under K templates (LLMR 2024), fields [B, R]: every A_V is linear in them.

    The `pool` alternative (renormalised mean log-probability) needs no function of its own: the mean of log-probs
    differs from the mean of logits by a constant per state, and the head is linear, so the pooled teacher is the head
    applied to the mean of the K hidden states.
    """
    k = len(per_template)

    def mean(name: str) -> Tensor:
        return sum(getattr(s, name) for s in per_template) / k

    hidden = None if per_template[0].hidden is None else mean("hidden")
    return TeacherScores(mean("chosen"), mean("max"), mean("logsumexp"), mean("mean"), mean("entropy"), hidden)
