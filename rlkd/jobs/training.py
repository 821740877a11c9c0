"""Training jobs by name: what `rlkd train NAME` and the recipes run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..io.redaction import redact_command_line
from ..settings.parsing import parse_config
from ..settings.trl_compat import ModelConfig
from ..trainers.arguments import GKDArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from ..trainers.encoders.arguments import TKDArguments
from ..trainers.encoders.tkd import TKDTrainer
from ..trainers.gkd import GKDTrainer
from ..trainers.ppo import PPOTrainer
from ..trainers.reinforce import ReinforceTrainer
from ..trainers.supervised import SupervisedTrainer
from .encoder_data import LabelledDataArguments
from .encoder_report import compare_with_teacher
from .encoder_setup import EncoderStudentArguments, EncoderTeacherArguments, prepare_encoders
from .encoder_teachers import teacher_of_student
from .references import OwnModelArguments, ReferenceArguments, ReferenceTrainingArguments, train_on_references
from .setup import DataArguments, Setup, TeacherArguments, prepare


@dataclass(frozen=True)
class TrainingJob:
    """One way to train a student.

    settings  the dataclasses that its YAML file and flags fill
    run       their instances, in that order -> a trained, evaluated and saved student
    preset    defaults of its own
    """

    settings: tuple[type, ...]
    run: Callable[..., None]
    preset: Mapping[str, Any] = field(default_factory=dict)

    def main(self, argv: list[str] | None = None) -> None:
        """Fill the settings from `argv`, by default the command line, and run. Raises ConfigError as `parse_config`."""
        built = parse_config(self.settings, argv, preset=self.preset)
        redact_command_line()
        self.run(*built)


def _on_labels(data: Any, teacher: Any, student: Any, training: Any) -> None:
    setup = prepare(data, teacher, student, training)
    trainer = SupervisedTrainer(setup.student, training, train_dataset=setup.pseudo_labels, **setup.trainer_inputs())
    trainer.run(setup.settings)


def _on_policy(trainer_type: Callable[..., Any]) -> Callable[..., None]:
    def run(data: Any, teacher: Any, student: Any, training: Any) -> None:
        setup: Setup = prepare(data, teacher, student, training)
        trainer = trainer_type(
            setup.student,
            training,
            train_examples=setup.train_examples,
            labels=setup.pseudo_labels,
            **setup.trainer_inputs(),
        )
        trainer.run(setup.settings)

    return run


def _encoder(data: Any, teacher: Any, student: Any, training: Any) -> None:
    setup = prepare_encoders(data, teacher, student, training)
    above = teacher_of_student(setup)
    trainer = TKDTrainer(setup.new_student(above), training, teacher=above, **setup.trainer_inputs())
    trainer.run(setup.settings)
    if trainer.is_world_process_zero():
        compare_with_teacher(setup)


_GENERATING = (DataArguments, TeacherArguments, ModelConfig)
_OPD = {
    "reward_value": "lse",
    "lam": 0.0,
    "one_step": "exact",
    "entropy_coef": 1.0,
    "kl_coef": 0.0,
    "baseline": "teacher",
    "rollouts_per_prompt": 1,
}

TRAINING_JOBS: dict[str, TrainingJob] = {
    "seqkd": TrainingJob((*_GENERATING, SupervisedArguments), _on_labels),
    "reinforce": TrainingJob((*_GENERATING, ReinforceArguments), _on_policy(ReinforceTrainer)),
    "ppo": TrainingJob((*_GENERATING, PPOArguments), _on_policy(PPOTrainer)),
    "opd": TrainingJob((*_GENERATING, ReinforceArguments), _on_policy(ReinforceTrainer), _OPD),
    "gkd": TrainingJob((*_GENERATING, GKDArguments), _on_policy(GKDTrainer)),
    "tkd": TrainingJob(
        (LabelledDataArguments, EncoderTeacherArguments, EncoderStudentArguments, TKDArguments), _encoder
    ),
    "teacher": TrainingJob(
        (ReferenceArguments, OwnModelArguments, ModelConfig, ReferenceTrainingArguments), train_on_references
    ),
}
