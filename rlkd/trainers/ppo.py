"""PPO on the induced reward: several passes over each rollout batch, clipped ratio, GAE with a residual critic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.policy import ppo_loss
from ..records import Minibatch
from .arguments import PPOArguments
from .rl import RLTrainer


class PPOTrainer(RLTrainer):
    """loss = -min(rho adv, clip(rho, 1 - eps, 1 + eps) adv), rho = pi / mu from the recorded log-probabilities."""

    args: PPOArguments

    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> Tensor:
        rollouts, clip = minibatch.rollouts, self.args.clip_range
        ratio = (logps.detach() - rollouts.behaviour_logps).exp()
        self.record_tokens(rollouts.answer_mask, clip_fraction=(ratio - 1).abs() > clip)
        # Padding has log-probability 0 under both policies, hence ratio 1; `reduce_tokens` drops it.
        return ppo_loss(
            torch.where(rollouts.answer_mask, logps, 0), rollouts.behaviour_logps, minibatch.advantages, clip
        )
