"""PPO on the induced reward: several passes over each rollout batch, clipped ratio, learned critic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..objectives.policy import ppo_loss
from ..records import Answers, given
from .arguments import PPOArguments
from .policy_gradient import PolicyGradient, PolicyGradientTrainer


class PPO(PolicyGradient):
    """loss_t = -min(rho_t adv_t, clip(rho_t, 1 - eps, 1 + eps) adv_t), [B, R], rho = pi / pi_old from the
    log-probabilities recorded while sampling (Schulman et al. 2017, arXiv 1707.06347, eq. 7); `dual_clip` bounds it
    (`ppo_loss`).

    Where answers were drawn from another distribution mu than the policy pi_old that sampled (a temperature, top_p, the
    teacher's share), importance weights pi_old / mu are in adv and the clip is about pi_old: it bounds how far the
    student moves, not where the answers come from (the decoupled objective of Hilton et al. 2022, arXiv 2110.00641,
    eq. 2, and MiniLLM's).
    """

    args: PPOArguments

    def stands_for(self, logps: Tensor, answers: Answers) -> Tensor:
        return given(answers.own_logps)

    def policy_loss(self, logps: Tensor, advantages: Tensor, answers: Answers) -> tuple[Tensor, Mapping[str, Tensor]]:
        old, clip, dual = given(answers.own_logps), self.args.clip_range, self.args.dual_clip
        ratio = (logps.detach() - old).exp()
        # Padding has log-probability 0 under both policies, hence ratio 1; `reduce_tokens` drops it.
        own = torch.where(answers.answer_mask, logps, 0)
        logged = {"clip_fraction": (ratio - 1).abs() > clip}
        if dual is not None:
            logged["dual_clip_fraction"] = (advantages < 0) & (ratio > dual)
        return ppo_loss(own, old, advantages, clip, dual), logged


class PPOTrainer(PolicyGradientTrainer):
    """Trains a student by `PPO` on the reward that a teacher induces."""

    args: PPOArguments
    objective_type = PPO
