"""Teachers that no local model stands behind, as settings name them: what they can teach is checked before any load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, DataError
from ..labels.recorded import RecordedTeacher
from ..trainers.arguments import GKDArguments, OnPolicyArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from ..trainers.base_arguments import DistillationArguments
from ..trainers.objective import Objective
from ..trainers.on_policy import RECORDED_ONLY
from ..trainers.ppo import PPO
from ..trainers.reinforce import Reinforce
from ..trainers.supervised import DivergenceKD, check_readiness, imitation

# The settings of a trainer -> its objective.
OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    GKDArguments: DivergenceKD,
    PPOArguments: PPO,
    ReinforceArguments: Reinforce,
    SupervisedArguments: imitation,
}


def check_objective(training: DistillationArguments, gives: frozenset[str]) -> None:
    """Raise ConfigError if the objective of these settings needs more of the teacher than it `gives`."""
    for kind, made in OBJECTIVES.items():
        if isinstance(training, kind):
            made(training).check(gives)
    if isinstance(training, SupervisedArguments):
        check_readiness(training, gives)


def check_recorded_signal(training: DistillationArguments) -> None:
    """Raise ConfigError if these settings need more of the teacher than label folders record."""
    if isinstance(training, OnPolicyArguments):
        raise ConfigError(RECORDED_ONLY)
    check_objective(training, RecordedTeacher.gives)


def recorded_teacher(labels: Any, training: DistillationArguments, tokenizer: Any) -> RecordedTeacher | None:
    """The teacher of the labels, None if the objective reads the labels alone. Raises DataError as RecordedTeacher."""
    reads = any(made(training).needs for kind, made in OBJECTIVES.items() if isinstance(training, kind))
    return RecordedTeacher(labels, tokenizer) if reads else None


def refuse_other_templates(found: list[str], folder: str) -> None:
    """Raise DataError if labels were made under other templates than a run's settings name.

    found: what `labels.makers.differences` tells.
    """
    if other := [line.strip() for line in found if line.strip().startswith("templates:")]:
        raise DataError(
            f"teacher_signal = 'recorded': the labels of {folder} were made under other templates than the settings "
            f"name ({'; '.join(other)}): name the same, or label again."
        )
