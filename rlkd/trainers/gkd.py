"""GKD (Agarwal et al. 2024, arXiv 2306.13649): a divergence to the teacher at every prefix of answers, which come from
the student or from labels.
"""

from __future__ import annotations

import random

from ..records import Answers
from ..sampling.decode import row_seed
from .arguments import GKDArguments
from .on_policy import OnPolicyTrainer
from .supervised import DivergenceKD


class GKDTrainer(OnPolicyTrainer):
    """Trains a student on D(p, pi) at every prefix of its own answers or of `labels`; sampling has no gradient.

    With probability `on_policy_fraction` (lambda) all answers of a batch are the student's, else they are labels: 1 is
    on-policy distillation, 0 is `SupervisedTrainer` with the same objective. ImitKD (Lin et al. 2020) is `best_token`.
    """

    args: GKDArguments
    objective_type = DivergenceKD

    def sample(self, index: int) -> Answers:
        """Answers of the student, or labels."""
        own = self.on_policy(index)
        self.record(on_policy=float(own))
        return super().sample(index) if own else self.labelled(index, self.args.rows_per_rollout)

    def on_policy(self, index: int) -> bool:
        """Whether the answers of batch `index` are the student's: a draw of the seed and the number, for all
        processes.
        """
        return random.Random(row_seed(self.args.seed, "on_policy", index)).random() < self.args.on_policy_fraction

    def describe_run(self, steps: int, epochs: float) -> str:
        """As in `OnPolicyTrainer`, and whose answers they are."""
        described = super().describe_run(steps, epochs)
        if self.label_batches is None:
            return described
        share = self.args.on_policy_fraction
        return f"{described}; {share:.0%} of the batches, drawn, are the student's answers, the others are labels"
