"""REINFORCE on the induced reward (Hao et al. 2022): one pass over rollouts of a periodically synchronised policy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..objectives.advantages import importance_weights, per_decision
from ..objectives.policy import reinforce_loss
from ..records import Minibatch
from .arguments import ReinforceArguments
from .policy_gradient import PolicyGradient, PolicyGradientTrainer


class Reinforce(PolicyGradient):
    """loss_t = -credit_t log pi(a_t|s_t), [B, R]; the credit is adv_t when the behaviour policy equals the
    student.

    When it lags, importance_weight = token: w_t adv_t; cumulative: `per_decision`, a weight per reward.
    """

    args: ReinforceArguments

    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        args, credit, mask = self.args, minibatch.annotations, minibatch.answers.answer_mask
        weights = self.weights(logps, minibatch)
        if args.importance_weight != "cumulative":
            return reinforce_loss(logps, credit.advantages, weights), {}
        advantages = per_decision(
            credit.advantages, credit.rewards, weights, mask, args.gamma * args.lam, args.k_step, args.length_normalised
        )
        return reinforce_loss(logps, advantages, mask), {}

    def state_weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor | float:
        if self.args.importance_weight != "cumulative":
            return 1.0
        # A state is reached by the tokens before it; a row starts with weight 1.
        weights = self.weights(logps, minibatch)
        return torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], dim=1)

    def weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor:
        """Truncated importance weight of each sampled token, [B, R]."""
        answers, args = minibatch.answers, self.args
        assert answers.behaviour_logps is not None
        return importance_weights(
            logps, answers.behaviour_logps, answers.answer_mask, args.importance_weight, args.importance_cap
        )


class ReinforceTrainer(PolicyGradientTrainer):
    """Trains a student by `Reinforce` on the reward that a teacher induces."""

    args: ReinforceArguments
    objective_type = Reinforce
