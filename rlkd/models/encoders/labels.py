"""What the configuration of a classifier says about its labels, checked before weights load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ModelError

SINGLE_LABEL = "single_label_classification"


def label_names(config: Any) -> tuple[str, ...]:
    """The names of a classifier's labels in the order of its logits; () if it has only LABEL_0, LABEL_1, ..."""
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def give_labels(config: Any, names: Sequence[str]) -> None:
    """Make a configuration that of a single-label classifier with these labels, whatever its head was for before."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = SINGLE_LABEL
    if hasattr(config, "function_to_apply"):
        del config.function_to_apply


def check_single_label(config: Any, role: str, name: str | None = None) -> None:
    """Raises ModelError unless the model gives each text exactly one of at least two distinct labels."""
    whose = f"{role} '{name or config.name_or_path or config.model_type}'"
    kind = getattr(config, "problem_type", None)
    # Pipelines of transformers read `function_to_apply`: a sigmoid makes each label a question of its own.
    function = getattr(config, "function_to_apply", None)
    if kind not in (None, SINGLE_LABEL) or function not in (None, "softmax"):
        found = f"problem_type {kind}" if kind not in (None, SINGLE_LABEL) else f"function_to_apply {function}"
        raise ModelError(
            f"{whose} is not a single-label classifier ({found} in config.json): its logits are no distribution over "
            "labels, which every loss here takes them for. Multi-label and regression models are not supported: use a "
            "model fine-tuned to give each text one label."
        )
    if config.num_labels < 2:
        raise ModelError(
            f"{whose} has {config.num_labels} label: a classifier needs at least 2, and regression is not supported. "
            "Use a model fine-tuned to give each text one of several labels."
        )
    _check_names(config, whose)


def _check_names(config: Any, whose: str) -> None:
    ids = sorted(config.id2label)
    if ids != list(range(len(ids))):
        raise ModelError(f"{whose}: id2label in config.json must number the labels from 0 without gaps, not {ids[:9]}.")
    names = [str(config.id2label[i]).casefold() for i in ids]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"{whose}: id2label in config.json names two labels '{twice[0]}'. Labels must be distinct.")
    backwards = {str(name).casefold(): int(i) for name, i in (config.label2id or {}).items()}
    for i, name in enumerate(names):
        if backwards.get(name, i) != i:
            raise ModelError(
                f"{whose}: config.json contradicts itself: id2label has '{name}' as {i}, label2id as "
                f"{backwards[name]}. Correct the one that is wrong."
            )


def check_same_labels(student: Any, teacher: Any) -> None:
    """Raises ModelError unless both configurations have the same labels in the same order, as far as they name them."""
    if student.num_labels != teacher.num_labels:
        raise ModelError(
            f"the teacher has {teacher.num_labels} labels and the student {student.num_labels}: "
            "fine-tune the teacher on this task first"
        )
    own, others = label_names(student), label_names(teacher)
    if own and others and [name.casefold() for name in own] != [name.casefold() for name in others]:
        raise ModelError(
            f"the teacher's labels are {', '.join(others)}, in this order, and the student's are {', '.join(own)}: "
            "the student would learn each label as another. Make the student with build_student, or give both the same "
            "id2label."
        )
