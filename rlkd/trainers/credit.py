"""The annotations of a policy gradient: credit of the sampled tokens, its whitening, and the numbers logged of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..objectives.advantages import explained_variance, regret_per_sequence, value_gain
from ..records import Batched, Distribution, TeacherSignal
from ..tensors import masked_moments, moments_to_mean_std
from .objective import Processes

SMALLEST_DEVIATION = 1e-3  # nats; differences of float32 log-probabilities are 1e-6 to 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(Batched):
    """The annotations of a policy gradient, [B, R] each.

    advantages       credit of each sampled token after its baseline
    rewards          the terms whose discounted sum is the credit before its baseline
    returns          targets of the critic, and values, its predictions at rollout time; None without a critic
    reference_logps  log-probabilities under the reference policy; None without a KL penalty
    reference        the reference policy's distributions where the KL penalty is exact, else None
    scale            what whitening multiplied the advantages and rewards with, for the exact one-step term; else 1
    kl_coef          weight of the KL penalty for this batch
    """

    advantages: Tensor
    rewards: Tensor
    returns: Tensor | None = None
    values: Tensor | None = None
    reference_logps: Tensor | None = None
    reference: Distribution | None = None
    scale: float = 1.0
    kl_coef: float = 0.0


def whitened(credit: Credit, immediate: Tensor | None, mask: Tensor, processes: Processes) -> tuple[Credit, float]:
    """The advantages at mean 0, divided by the standard deviation of the whole credit, which is returned, too; as they
    are if that is below SMALLEST_DEVIATION.

    The whole credit has the immediate term, given here [B, R] where the loss carries it exactly: the deviation of the
    future alone vanishes with lam, and dividing the exact term by it would raise it over entropy bonus and KL penalty
    without bound. The exact term and the rewards get the same scale, so that their ratio is kept.
    """
    whole = credit.advantages if immediate is None else credit.advantages + immediate * mask
    moments = processes.sum(torch.stack([masked_moments(x, mask) for x in (credit.advantages, whole)]))
    (mean, _), (_, deviation) = (moments_to_mean_std(part) for part in moments)
    # A floor in place of the deviation would multiply the exact term by its inverse.
    if deviation < SMALLEST_DEVIATION:
        return credit, deviation
    scale = 1.0 / deviation
    advantages = scale * (credit.advantages - mean) * mask
    return replace(credit, advantages=advantages, rewards=scale * credit.rewards, scale=scale), deviation


def numbers_of_credit(credit: Credit, mask: Tensor, processes: Processes) -> dict[str, Tensor | float]:
    """The spread of the advantages and the fit of the critic over the tokens of the global batch, as logged."""
    everywhere = processes.gather(mask)
    moments = masked_moments(processes.gather(credit.advantages), everywhere)
    logged: dict[str, Tensor | float] = {"advantage_std": moments_to_mean_std(moments)[1]}
    if credit.values is not None and credit.returns is not None:
        values, returns = processes.gather(credit.values), processes.gather(credit.returns)
        logged["explained_variance"] = explained_variance(values, returns, everywhere)
        logged["value_gain"] = value_gain(values, returns, everywhere)
    return logged


def numbers_of_signal(signal: TeacherSignal, mask: Tensor) -> dict[str, Tensor | float]:
    """Regret and the teacher's log-probability per answer, its entropy per token, as far as the signal has them."""
    logged: dict[str, Tensor | float] = {}
    if signal.max is not None:
        logged["regret"] = regret_per_sequence(signal.chosen - signal.max, mask).mean()
    if signal.logsumexp is not None:
        logged["teacher_logprob"] = ((signal.chosen - signal.logsumexp) * mask).sum(1).mean()
    if signal.entropy is not None:
        logged["teacher_entropy"] = signal.entropy
    return logged
