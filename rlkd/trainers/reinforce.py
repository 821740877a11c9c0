"""REINFORCE on the induced reward (Hao et al. 2022): one pass over rollouts of a periodically synchronised policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.advantages import importance_weights, per_decision
from ..objectives.policy import reinforce_loss
from ..records import Minibatch
from .arguments import ReinforceArguments
from .rl import RLTrainer


class ReinforceTrainer(RLTrainer):
    """loss = -credit_t log pi(a_t|s_t); the credit is adv_t when the behaviour policy is in step with the student.

    When it lags, importance_weight = token: w_t adv_t; cumulative: `per_decision`, a weight per reward.
    """

    args: ReinforceArguments

    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> Tensor:
        args, mask, weights = self.args, minibatch.rollouts.answer_mask, self.weights(logps, minibatch)
        if args.importance_weight != "cumulative":
            return reinforce_loss(logps, minibatch.advantages, weights)
        credit = per_decision(
            minibatch.advantages, minibatch.rewards, weights, mask, args.gamma * args.lam, args.k_step
        )
        return reinforce_loss(logps, credit, mask)

    def state_weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor | float:
        if self.args.importance_weight != "cumulative":
            return 1.0
        # A state is reached by the tokens before it; a row starts with weight 1.
        weights = self.weights(logps, minibatch)
        return torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], dim=1)

    def weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor:
        """Truncated importance weight of each sampled token, [B, R]."""
        rollouts = minibatch.rollouts
        return importance_weights(
            logps, rollouts.behaviour_logps, rollouts.answer_mask, self.args.importance_weight, self.args.importance_cap
        )
