"""Policy losses over sampled answers. Every function returns per-token terms [B, R]; `reduce_tokens` sums them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice
from .closed_form import PolicyTerm, policy_terms

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]

# H(pi(.|s)) = -sum_a pi(a|s) log pi(a|s), [N].
entropy = PolicyTerm(
    value=lambda log_pi, pi: -(pi * log_pi).sum(-1),
    add_slope=lambda total, weight, log_pi: total.addcmul_(log_pi, weight, value=-1),
)
# E_{a ~ pi}[log pi_0(a|s)], [N], of the reference policy's logits [N, V]. With the entropy, which the loss has, it
# gives KL(pi || pi_0) = -H(pi) - E_pi[log pi_0].
expected_log_reference = PolicyTerm(
    value=lambda log_pi, pi, reference: (pi * reference.log_softmax(-1)).sum(-1),
    add_slope=lambda total, weight, log_pi, reference: total.addcmul_(reference, weight),
)


def token_statistics(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) of the given tokens and the entropy H(pi(.|s)), each [N], nats.

    Args: logits [N, V] over valid ids; ids [N].
    """
    logps, value = policy_terms(logits, ids, (entropy, ()))
    return logps, value


def token_logps(logits: Tensor, ids: Tensor) -> tuple[Tensor]:
    """log pi(a|s) of the given tokens alone, [N]; as in `token_statistics`."""
    return policy_terms(logits, ids)  # type: ignore[return-value]


def reinforce_loss(logps: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """-w_t adv_t log pi(a_t|s_t) (Williams 1992), [B, R]; advantages and off-policy weights carry no gradient."""
    return -(weights * advantages).detach() * logps


def ppo_loss(
    logps: Tensor, behaviour_logps: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None = None
) -> Tensor:
    """-min(rho adv, clip(rho, 1 - eps, 1 + eps) adv), rho = pi / mu (Schulman et al. 2017, arXiv 1707.06347, eq. 7),
    [B, R].

    With dual_clip = c > 1, at most c |adv|, which binds where adv < 0 (Ye et al. 2020, arXiv 1912.09729, eq. 5): a
    token that the policy has come to prefer strongly over mu cannot dominate the batch.
    """
    # The minimum is pessimistic: clipping removes the gain of a larger step, never the penalty of a bad one.
    ratio = (logps - behaviour_logps).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return loss if dual_clip is None else loss.minimum(dual_clip * advantages.abs())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """max((C - R)^2, (clip(C, C_old +- eps) - R)^2) / 2, [B, R]; the clip keeps the critic near its rollout-time
    value.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """log pi(a|s) - log pi_0(a|s): the unbiased one-sample estimate of KL(pi || pi_0), used inside the reward, [B,
    R].
    """
    return logps - reference_logps


def kl_k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """(log pi(a|s) - log pi_0(a|s))^2 / 2, [B, R] (Schulman 2020, joschu.net/blog/kl-approx.html), as a loss.

    For a ~ pi(.|s) its expected gradient, E[(log pi - log pi_0) grad log pi], is that of KL(pi || pi_0) at s. Its value
    is not that KL; the expected gradient of k1 is 0, and that of k3 is the gradient of KL(pi_0 || pi).
    """
    return 0.5 * (logps - reference_logps).square()


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """exp(d) - 1 - d, d = log pi_0 - log pi, [B, R]: the unbiased, non-negative one-sample estimate of KL(pi || pi_0)
    (Schulman 2020). For reports, not as a loss: its expected gradient is that of KL(pi_0 || pi).
    """
    difference = reference_logps - logps
    return difference.exp() - 1 - difference


def adapt_kl_coef(kl_coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """beta (1 + gain clip(KL / target - 1, -0.2, 0.2)): proportional control (Ziegler et al. 2019, arXiv 1909.08593,
    sec. 2.2).
    """
    return kl_coef * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))


def token_weights(mask: Tensor, reduction: Reduction) -> Tensor:
    """Weight of each token in the loss, [B, R]: 1, or 1 / (length of its row) under `sequence_mean`."""
    check_choice("reduction", reduction, Reduction)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) if reduction == "sequence_mean" else mask.float()


def reduction_count(mask: Tensor, reduction: Reduction) -> float:
    """What the weighted sum over mask [B, R] is divided by: valid tokens (`token_mean`) or rows with at least one."""
    return float(mask.sum()) if reduction == "token_mean" else float(mask.any(1).sum())


def reduce_tokens(loss: Tensor, mask: Tensor, reduction: Reduction, denominator: float | None = None) -> Tensor:
    """sum_{b,t} w_{b,t} loss_{b,t} / denominator, a scalar, of loss [B, R]; positions outside `mask` do not count.

    token_mean      mean over the batch's tokens: every token weighs the same
    sequence_mean   mean over rows of the mean over their tokens: every row weighs the same (biased towards short rows)
    sequence_sum    mean over rows of the sum over their tokens: the policy gradient itself
    `denominator` is the count over the global batch when it is split over processes or accumulation steps.
    """
    check_choice("reduction", reduction, Reduction)
    if denominator is None:
        denominator = reduction_count(mask, reduction)
    # where, not a product: 0 * inf or 0 * NaN at padding would be NaN.
    weighted = torch.where(mask, loss, torch.zeros_like(loss)) * token_weights(mask, reduction)
    return weighted.sum() / max(denominator, 1.0)
