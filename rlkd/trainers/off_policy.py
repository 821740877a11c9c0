"""Importance weights of a policy gradient on answers that another distribution drew: an older policy, a proposal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives.advantages import importance_weights, per_decision
from ..records import Minibatch, given
from .arguments import RLArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """advantages [B, R] with their weights; states [B, R] or 1, the weight of what is exact at a state; logged, [B, R]
    each.
    """

    advantages: Tensor
    states: Tensor | float
    logged: dict[str, Tensor]


def weighted(args: RLArguments, logps: Tensor, minibatch: Minibatch) -> Weighted:
    """The advantages of a minibatch drawn from mu, as if the policy with `logps` [B, R] had drawn it.

    With `importance_weight: token` w_t adv_t, and states as they were reached; cumulative: a weight per reward
    (`per_decision`), and for a state that of the tokens before it. Weights above `importance_cap` are truncated.
    """
    credit, answers = minibatch.annotations, minibatch.answers
    mask, mu, kind = answers.answer_mask, given(answers.behaviour_logps), args.importance_weight
    whole = importance_weights(logps, mu, mask, kind, torch.finfo(mu.dtype).max)
    weights = whole.clamp(max=args.importance_cap)
    logged = {
        "weight_mean": weights,
        "weight_square": weights.square(),
        "weight_max": whole,
        "weight_truncated": whole > args.importance_cap,
    }
    if kind != "cumulative":
        return Weighted(advantages=weights * credit.advantages, states=1.0, logged=logged)
    decay = args.gamma * args.lam
    task = 0.0 if credit.task_credit is None else credit.task_credit * mask
    advantages = per_decision(
        credit.advantages - task, credit.rewards, weights, mask, decay, args.k_step, args.length_normalised
    )
    # A score of the whole answer carries the weight of all its tokens.
    advantages = advantages + task * weights.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
    states = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], dim=1)
    return Weighted(advantages=advantages, states=states, logged=logged)


def with_effective_sample_size(logs: dict[str, float]) -> dict[str, float]:
    """The logged numbers with (sum w)^2 / (n sum w^2) in place of the mean square of the weights."""
    if square := logs.pop("weight_square", 0.0):
        logs["effective_sample_size"] = logs["weight_mean"] ** 2 / square
    return logs
