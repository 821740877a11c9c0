"""Credit: from per-token A_V to the advantage that weights each sampled token.

With the teacher's own V as critic the temporal-difference error is delta_t = A_V(s_t, a_t), so GAE
(Schulman et al. 2016, arXiv 1506.02438, eq. 16) is a discounted sum of A_V itself. lambda is the credit horizon:
0 is the immediate regret alone (safe, biased), 1 the full return (unbiased, falls for the early end-of-sequence
shortcut from a weak start).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import masked_mean


def discounted_sum(x: Tensor, mask: Tensor, decay: float, stride: int = 1) -> Tensor:
    """S_t = x_t + decay^stride * S_{t+stride} over True positions, [B, R]; 0 at padding.

    decay = gamma * lambda. stride = K keeps every K-th term only (KETCHUP's K-step return): 1 is the full sum,
    K >= R the immediate term.
    """
    if stride < 1:
        raise ValueError(f"stride = {stride}: must be at least 1")
    x = x * mask
    total = torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        total[:, t] = x[:, t]
        if t + stride < x.shape[1]:
            total[:, t] += decay**stride * total[:, t + stride]
    return total * mask


def per_decision(
    advantages: Tensor, rewards: Tensor, weights: Tensor, mask: Tensor, decay: float, stride: int = 1
) -> Tensor:
    """Off-policy credit with per-decision weights (Precup et al. 2000), [B, R].

        w_t adv_t + sum_{k>t} decay^{k-t} (w_k - w_t) x_k   =   sum_{k>=t} decay^{k-t} w_k x_k - w_t b_t

    for advantages adv = S(x) - b, S = `discounted_sum` with the same decay and stride: each reward is weighted by the
    ratio of the tokens up to its own step, the baseline by that of step t. Weighting the sum instead, w_t adv_t, is
    biased: the future was still sampled from the older policy.
    """
    drift = discounted_sum(weights * rewards, mask, decay, stride) - weights * discounted_sum(
        rewards, mask, decay, stride
    )
    return weights * advantages + drift


def temporal_difference(advantage: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """delta_t = A_V(s_t, a_t) + gamma C(s_{t+1}) - C(s_t), [B, R]; A_V itself where there is no critic (C = 0).

    C is 0 after the last token, whether the answer ended or was cut (see `rlkd.objectives.rewards`).
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return (advantage + gamma * following - values) * mask


def gae(advantage: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with a learned critic C of the residual E_pi[sum_k gamma^k A_V].

        adv_t = sum_{k>=t} (gamma lam)^{k-t} delta_k,   delta as in `temporal_difference`

    Args: advantage, values [B, R] (A_V and C), mask [B, R]. Returns: adv, and the critic's targets adv + C, [B, R].
    """
    adv = discounted_sum(temporal_difference(advantage, values, mask, gamma), mask, gamma * lam)
    return adv, (adv + values) * mask


def leave_one_out(returns: Tensor, mask: Tensor, k: int) -> Tensor:
    """Baseline b_i,t = mean over the other k - 1 rollouts of the prompt of their reward-to-go at step t, [B, R].

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8) per token: the others are independent of rollout i, so any
    statistic of theirs leaves the gradient unbiased; a rollout that has ended contributes 0, its true remaining sum.
    Args: returns [B, R] with the k rollouts of a prompt adjacent; mask [B, R]. Raises ValueError unless k >= 2
    divides B.
    """
    if k < 2 or returns.shape[0] % k:
        raise ValueError(
            f"leave_one_out needs k >= 2 rollouts per prompt dividing the rows; got k = {k}, rows = {returns.shape[0]}"
        )
    groups = (returns * mask).view(-1, k, returns.shape[1])
    others = (groups.sum(1, keepdim=True) - groups) / (k - 1)
    return others.view_as(returns) * mask


def importance_weights(logps: Tensor, behaviour_logps: Tensor, mask: Tensor, kind: str, cap: float) -> Tensor:
    """Detached off-policy weight of each token, [B, R], for answers sampled from an older policy.

    token:       rho_t = pi(a_t|s_t) / mu(a_t|s_t), on the token's loss; biased, low variance
    cumulative:  prod_{k<=t} rho_k (per-decision importance sampling, Precup et al. 2000), on A_V(s_t, a_t) and on the
                 baseline b(s_t) BEFORE rewards are summed to go: sum_{k>=t} w_k A_k - w_t b_t is unbiased when cap is
                 infinite. On the sum itself, w_t sum_{k>=t} A_k, it is biased: the future was still sampled from mu
    none:        1
    Weights above `cap` are truncated to it.
    """
    log_ratio = (logps.detach() - behaviour_logps) * mask
    if kind == "none":
        return mask.to(log_ratio.dtype)
    if kind == "cumulative":
        log_ratio = log_ratio.cumsum(1)
    elif kind != "token":
        raise ValueError(f"importance_weight = {kind!r}: allowed are 'none', 'token', 'cumulative'")
    return log_ratio.exp().clamp(max=cap) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the valid tokens of [B, R]; 0 if returns do not vary. Scalar."""
    error = (returns - values)[mask]
    variance = returns[mask].var(unbiased=False)
    return torch.where(
        variance > 1e-12, 1 - error.var(unbiased=False) / variance.clamp(min=1e-12), torch.zeros_like(variance)
    )


def regret_per_sequence(advantage_max: Tensor, mask: Tensor) -> Tensor:
    """-sum_t A_max(s_t, a_t), [B], nats >= 0: what the answers cost against the teacher's greedy choice at every
    state.
    """
    return -(advantage_max * mask).sum(1)


def price_of_stopping(eos_logit_gap: Tensor, mask: Tensor) -> Tensor:
    """Mean regret of ending the answer at a state where the teacher would go on, scalar, nats.

    Args: eos_logit_gap [B, R] = max_a q(s_t, a) - q(s_t, EOS); mask [B, R] the non-final answer positions.
    While a policy's regret per sequence exceeds this price, ending early is the better return (METHOD: EOS shortcut).
    """
    return masked_mean(eos_logit_gap, mask)


def assign_credit(
    reward: Tensor,
    mask: Tensor,
    *,
    baseline: str,
    gamma: float,
    lam: float,
    k_step: int = 1,
    rollouts_per_prompt: int = 1,
    immediate: Tensor | None = None,
    expected: Tensor | None = None,
    values: Tensor | None = None,
    teacher_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage of each sampled token and the critic's targets, both [B, R], 0 at padding.

    The credit is S_t = sum_{k>=t} (gamma lam)^{k-t} reward_k; from it the baseline is taken:
        none           S_t + V(s_t)      (`teacher_value`, in some gauge; V(s_t) is part of the return G_t)
        teacher        S_t               (V(s_t) is the baseline)
        closed_form    S_t - E_{a~pi}[A_V(s_t, a)]        (`expected`)
        leave_one_out  S_t - mean of the prompt's other rollouts' S_t
        critic         S_t - C(s_t), C a learned estimate of E_pi[S_t]        (`values`)
    lam is the horizon under every baseline: it is GAE's lambda with the teacher's V as critic, and a discount to C,
    whose own GAE runs at lambda 1. Bootstrapping C over the full return instead would bring back, at any lambda, the
    early end-of-sequence that a short horizon rules out: ending a row saves -C(s_t).
    `immediate` [B, R] is A_V where the loss carries the exact one-step term: it is then taken out of the credit, which
    keeps the future only. Raises ValueError for an unknown baseline.
    """
    returns = torch.zeros_like(reward)
    if baseline == "critic":
        assert values is not None
        credit, returns = gae(reward, values, mask, gamma * lam, 1.0)
        if immediate is not None:
            # C also predicts the immediate term: give back its expectation, so that only the future is compared.
            assert expected is not None
            credit = credit - immediate + expected
        return credit * mask, returns
    credit = discounted_sum(reward, mask, gamma * lam, k_step)
    if immediate is not None:
        credit = credit - immediate
    if baseline == "none":
        assert teacher_value is not None
        credit = credit + teacher_value
    elif baseline == "closed_form":
        if immediate is None:
            assert expected is not None
            credit = credit - expected
    elif baseline == "leave_one_out":
        credit = credit - leave_one_out(credit, mask, rollouts_per_prompt)
    elif baseline != "teacher":
        raise ValueError(
            f"baseline = {baseline!r}: allowed are 'none', 'teacher', 'closed_form', 'leave_one_out', 'critic'"
        )
    return credit * mask, returns
