"""PPO on the induced reward: several passes over each rollout batch, clipped ratio, learned critic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..objectives.policy import ppo_loss
from ..records import Minibatch
from .arguments import PPOArguments
from .policy_gradient import PolicyGradient, PolicyGradientTrainer


class PPO(PolicyGradient):
    """loss_t = -min(rho_t adv_t, clip(rho_t, 1 - eps, 1 + eps) adv_t), [B, R], rho = pi / mu from the recorded
    log-probabilities (Schulman et al. 2017, arXiv 1707.06347, eq. 7); `dual_clip` bounds it (`ppo_loss`).
    """

    args: PPOArguments

    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        answers, advantages = minibatch.answers, minibatch.annotations.advantages
        clip, dual = self.args.clip_range, self.args.dual_clip
        assert answers.behaviour_logps is not None
        ratio = (logps.detach() - answers.behaviour_logps).exp()
        # Padding has log-probability 0 under both policies, hence ratio 1; `reduce_tokens` drops it.
        own = torch.where(answers.answer_mask, logps, 0)
        loss = ppo_loss(own, answers.behaviour_logps, advantages, clip, dual)
        logged = {"clip_fraction": (ratio - 1).abs() > clip}
        if dual is not None:
            logged["dual_clip_fraction"] = (advantages < 0) & (ratio > dual)
        return loss, logged


class PPOTrainer(PolicyGradientTrainer):
    """Trains a student by `PPO` on the reward that a teacher induces."""

    args: PPOArguments
    objective_type = PPO
