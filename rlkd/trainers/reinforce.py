"""REINFORCE on the induced reward (Hao et al. 2022): one pass over rollouts of a periodically synchronised policy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..objectives.policy import reinforce_loss
from ..records import Answers
from .arguments import ReinforceArguments
from .policy_gradient import PolicyGradient, PolicyGradientTrainer


class Reinforce(PolicyGradient):
    """loss_t = -credit_t log pi(a_t|s_t), [B, R]; the credit is adv_t when the student itself drew the answers, else as
    in `PolicyGradient.weighted`.
    """

    args: ReinforceArguments

    def policy_loss(self, logps: Tensor, advantages: Tensor, answers: Answers) -> tuple[Tensor, Mapping[str, Tensor]]:
        return reinforce_loss(logps, advantages, answers.answer_mask), {}


class ReinforceTrainer(PolicyGradientTrainer):
    """Trains a student by `Reinforce` on the reward that a teacher induces."""

    args: ReinforceArguments
    objective_type = Reinforce
