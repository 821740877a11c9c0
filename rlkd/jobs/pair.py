"""The teacher of a run, from its settings: what the pair can do is checked before weights load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.other_tokenizer import SHARED_VOCABULARY, OtherTokenizer
from ..models.signals import SIGNAL, LocalSource, check_signal
from ..models.spec import ModelSpec, check_pair, other_vocabulary
from ..models.teacher import Teacher
from ..models.vocabulary import same_vocabulary
from ..trainers.arguments import GKDArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from ..trainers.base_arguments import DistillationArguments, require
from ..trainers.gkd import GKDTrainer
from ..trainers.ppo import PPOTrainer
from ..trainers.reinforce import ReinforceTrainer
from ..trainers.supervised import SupervisedTrainer

if TYPE_CHECKING:
    from .setup import TeacherArguments

TRAINERS: dict[type, Any] = {
    PPOArguments: PPOTrainer,
    ReinforceArguments: ReinforceTrainer,
    GKDArguments: GKDTrainer,
    SupervisedArguments: SupervisedTrainer,
}


def teacher_spec(settings: TeacherArguments, training: DistillationArguments) -> ModelSpec:
    """The teacher that the settings name."""
    return ModelSpec(
        settings.teacher,
        "teacher",
        revision=settings.teacher_revision,
        dtype=settings.teacher_dtype,
        device=str(training.device),
        allow_bin=settings.allow_bin,
        src_lang=settings.src_lang,
        tgt_lang=settings.tgt_lang,
    )


def check_teacher(teacher: ModelSpec, student: ModelSpec, training: DistillationArguments) -> str | None:
    """How the two fit together, in words; None if they share their vocabulary. Raises ModelError if one cannot take its
    role, ConfigError if training needs a shared vocabulary and they have none.
    """
    for spec in (teacher, student):
        spec.check_lengths(training.max_input_tokens, training.max_new_tokens)
    if same_vocabulary(teacher.tokenizer, student.tokenizer):
        check_pair(teacher, student)
        return None
    for spec in (teacher, student):
        spec.check()
    check_without_shared_vocabulary(training)
    return other_vocabulary(teacher, student)


def check_without_shared_vocabulary(training: DistillationArguments) -> None:
    """Raises ConfigError if the settings compare the two models token by token."""
    mix = getattr(training, "teacher_mix", 0.0)
    require(mix == 0, "teacher_mix", mix, "needs a vocabulary that teacher and student share: set it to 0")
    kinds = [kind for kind in TRAINERS if isinstance(training, kind)]
    if kinds:
        objective = TRAINERS[kinds[0]].objective_type(training)
        gives = SIGNAL - SHARED_VOCABULARY
        check_signal(objective.needs, gives, objective.what, objective.remedy, why=OtherTokenizer.lacks)


def load_teacher(
    teacher: ModelSpec, student: ModelSpec, settings: TeacherArguments, training: DistillationArguments
) -> LocalSource:
    """The teacher with its weights, as the student sees it. Raises as `ModelSpec.language_model` does."""
    frozen = Teacher(
        teacher.language_model(),
        teacher.tokenizer,
        max_input_tokens=training.max_input_tokens,
        append_eos=settings.teacher_append_eos,
        combination=settings.template_combination,
        cache_bytes=settings.teacher_cache_mb * 2**20,
    )
    if same_vocabulary(teacher.tokenizer, student.tokenizer):
        return frozen
    return OtherTokenizer(frozen, student.tokenizer, student.rules)
