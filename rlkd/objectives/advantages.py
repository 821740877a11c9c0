"""Credit: from per-token A_V to the advantage that weights each sampled token.

With the teacher's own V as critic the temporal-difference error is delta_t = A_V(s_t, a_t), so GAE
(Schulman et al. 2016, arXiv 1506.02438, eq. 16) is a discounted sum of A_V itself. lambda is the credit horizon:
0 is the immediate regret alone (biased: what follows is free), 1 the full return (unbiased, but learns the early
end-of-sequence shortcut from a weak start).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import given
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


def length_normalised_sum(x: Tensor, mask: Tensor, decay: float) -> Tensor:
    """x_t + 1 / (n - t) sum_{t<k<=n} decay^{k-t} x_k over the n True positions t = 1 .. n of a row, [B, R]; x_n at n.

    MiniLLM (Gu et al. 2024, arXiv 2306.08543, eq. 8): the future is a mean over what follows, so that an early end
    does not save a sum of regrets and going on is not free. Not a return: it does not telescope, and it is no gradient
    of an expected reward.
    """
    future = discounted_sum(x, mask, decay) - x * mask
    following = mask.flip(1).cumsum(1).flip(1) - 1
    return (x + future / following.clamp(min=1)) * mask


def per_decision(
    advantages: Tensor,
    rewards: Tensor,
    weights: Tensor,
    mask: Tensor,
    decay: float,
    stride: int = 1,
    length_normalised: bool = False,
) -> Tensor:
    """Off-policy credit with per-decision weights (Precup et al. 2000), [B, R].

        w_t adv_t + sum_{k>t} decay^{k-t} (w_k - w_t) x_k   =   sum_{k>=t} decay^{k-t} w_k x_k - w_t b_t

    for advantages adv = S(x) - b, S = `discounted_sum` with the same decay and stride: each reward is weighted by the
    ratio of the tokens up to its own step, the baseline by that of step t. Weighting the sum instead, w_t adv_t, is
    biased: the future was still sampled from the older policy. With S = `length_normalised_sum` the whole future of t
    has the weight of the whole answer, w_n: its length, which divides it, is decided by the last token.
    """
    if length_normalised:
        future = length_normalised_sum(rewards, mask, decay) - rewards * mask
        ends = mask.sum(1, keepdim=True).clamp(min=1) - 1
        return weights * advantages + (weights.gather(1, ends) - weights) * future
    # S(w x) - w S(x): 0 on policy, where all weights are 1.
    drift = discounted_sum(weights * rewards, mask, decay, stride) - weights * discounted_sum(
        rewards, mask, decay, stride
    )
    return weights * advantages + drift


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
    if kind == "cumulative":  # in logs: a product of many ratios would overflow before it is capped
        log_ratio = log_ratio.cumsum(1)
    elif kind != "token":
        raise ValueError(f"importance_weight = {kind!r}: allowed are 'none', 'token', 'cumulative'")
    return log_ratio.exp().clamp(max=cap) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the valid tokens of [B, R]; 0 if returns do not vary by more than
    rounding (a thousandth of a nat, or a millionth of their size). Scalar.
    """

    def variance_of(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    known = returns.double()
    variance, error = variance_of(known), variance_of(known - values)
    varies = variance > (1e-12 * masked_mean(known.square(), mask)).clamp(min=1e-6)
    return torch.where(varies, 1 - error / torch.where(varies, variance, 1.0), 0.0).to(returns.dtype)


def value_gain(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - mean (returns - values)^2 / mean returns^2 over the valid tokens of [B, R], scalar: what a critic takes from
    the mean square of the credit, 0 for values of 0. Unlike `explained_variance` it sees a constant error.

    Errors of less than a tenth of a nat do not matter: 0.01 nats^2 are added to both means.
    """
    size = masked_mean(returns.double().square(), mask)
    error = masked_mean((returns - values).double().square(), mask)
    return (1 - (error + 0.01) / (size + 0.01)).to(returns.dtype)


def regret_per_sequence(advantage_max: Tensor, mask: Tensor) -> Tensor:
    """-sum_t A_max(s_t, a_t), [B], nats >= 0: the cost of the answers relative to the teacher's greedy choice at every
    state.
    """
    return -(advantage_max * mask).sum(1)


def price_of_stopping(eos_logit_gap: Tensor, mask: Tensor) -> Tensor:
    """Mean regret of ending the answer at a state where the teacher would continue, scalar, nats.

    Args: eos_logit_gap [B, R] = max_a q(s_t, a) - q(s_t, EOS); mask [B, R] the non-final answer positions.
    While a policy's regret per sequence exceeds this, ending early has the better return (docs/method.md).
    """
    return masked_mean(eos_logit_gap, mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditInputs:
    """What the credit of a batch of answers is computed from.

    reward               [B, R] r_t, the terms whose discounted sum is the credit;  mask [B, R]
    decay                gamma * lambda, the horizon under every baseline: it is GAE's lambda with the teacher's V as
                         critic, and a discount to the learned critic C. Bootstrapping C over the full return instead
                         would reintroduce, at any lambda, the early end-of-sequence that a short horizon rules out:
                         ending a row saves -C(s_t)
    stride               keep every stride-th reward (K-step)
    length_normalised    S_t is a `length_normalised_sum` (stride 1)
    rollouts_per_prompt  K adjacent rows of one prompt
    immediate            [B, R] r_t where the loss carries the exact one-step term: it is taken out of the credit, which
                         keeps the future only; else None
    expected             [B, R] E_{a ~ pi}[r(s_t, a)];  values [B, R] C(s_t);  state_value [B, R] the teacher's V(s_t):
                         what the baseline reads of them, see `Baseline.reads`
    """

    reward: Tensor
    mask: Tensor
    decay: float
    stride: int = 1
    length_normalised: bool = False
    rollouts_per_prompt: int = 1
    immediate: Tensor | None = None
    expected: Tensor | None = None
    values: Tensor | None = None
    state_value: Tensor | None = None

    def to_go(self) -> Tensor:
        """S_t = sum_{k>=t} decay^{k-t} r_k, [B, R], or its length-normalised form; without its first term where the
        loss carries that exactly.
        """
        if self.length_normalised:
            credit = length_normalised_sum(self.reward, self.mask, self.decay)
        else:
            credit = discounted_sum(self.reward, self.mask, self.decay, self.stride)
        return credit if self.immediate is None else credit - self.immediate


def no_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """S_t + V(s_t), [B, R]: V(s_t) is part of the return G_t."""
    return inputs.to_go() + given(inputs.state_value), None


def teacher_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """S_t, [B, R]: V(s_t) is the baseline."""
    return inputs.to_go(), None


def closed_form_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """S_t - E_{a ~ pi}[r(s_t, a)], [B, R]; with the exact one-step term nothing is subtracted."""
    credit = inputs.to_go()
    return credit if inputs.immediate is not None else credit - given(inputs.expected), None


def leave_one_out_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """S_t - the mean S_t of the prompt's other rollouts, [B, R] (`leave_one_out`)."""
    credit = inputs.to_go()
    return credit - leave_one_out(credit, inputs.mask, inputs.rollouts_per_prompt), None


def critic_baseline(inputs: CreditInputs) -> tuple[Tensor, Tensor | None]:
    """S_t - C(s_t) and the targets of C, S_t itself, both [B, R].

    S_t is what `CreditInputs.to_go` gives: where the loss carries the exact one-step term, C is a critic of the future
    alone. C = 0, where it starts, is the teacher baseline. C does not bootstrap, see `CreditInputs.decay`.
    """
    credit = inputs.to_go()
    return credit - given(inputs.values), credit


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is subtracted from the credit of a token; it does not change the expected gradient.

    credit          `CreditInputs` -> the advantage [B, R] of each token and the critic's targets, None without one
    reads           fields of `CreditInputs` beyond reward and mask that it reads, whatever the one-step term is
    reads_sampled   those it reads only where the one-step term is sampled
    """

    credit: Callable[[CreditInputs], tuple[Tensor, Tensor | None]]
    reads: frozenset[str] = frozenset()
    reads_sampled: frozenset[str] = frozenset()

    @property
    def critic(self) -> bool:
        """Whether it needs a learned value head."""
        return "values" in self.reads

    def inputs(self, *, exact: bool) -> frozenset[str]:
        """The fields it reads with an exact or a sampled one-step term."""
        return self.reads if exact else self.reads | self.reads_sampled


BASELINES: dict[str, Baseline] = {
    "none": Baseline(no_baseline, reads=frozenset({"state_value"})),
    "teacher": Baseline(teacher_baseline),
    "closed_form": Baseline(closed_form_baseline, reads_sampled=frozenset({"expected"})),
    "leave_one_out": Baseline(leave_one_out_baseline),
    "critic": Baseline(critic_baseline, reads=frozenset({"values"})),
}
