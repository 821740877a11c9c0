"""What the configuration of a classifier says about its labels, checked before weights load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from ...checks import tag_fault
from ...choices import ProblemType
from ...errors import ModelError

# Pipelines of transformers read `function_to_apply`: a sigmoid makes each label a question of its own.
APPLIED: dict[str, ProblemType] = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
    "none": "regression",
}
MEANING: dict[ProblemType, str] = {
    "single_label_classification": "one of several labels",
    "multi_label_classification": "any number of labels",
    "regression": "a number",
    "token_classification": "a tag for each word",
}
# The end of the name of a class: transformers' problem_type knows no words.
OF_TEXTS, OF_WORDS = "ForSequenceClassification", "ForTokenClassification"


def head_of(config: Any) -> str | None:
    """OF_TEXTS or OF_WORDS, whichever kind of classifier a configuration names; None if it names none."""
    heads = (head for kind in config.architectures or () for head in (OF_TEXTS, OF_WORDS) if kind.endswith(head))
    return next(heads, None)


def name_head(model: Any) -> None:
    """Let the configuration of a token classifier made in memory say so, as a saved one does."""
    if type(model).__name__.endswith(OF_WORDS):
        model.config.architectures = [type(model).__name__]


def head_for(problem_type: ProblemType) -> str:
    """OF_TEXTS or OF_WORDS, whichever kind of classifier a problem takes."""
    return OF_WORDS if problem_type == "token_classification" else OF_TEXTS


def auto_class(config: Any) -> Any:
    """transformers' Auto class for the classifier that a configuration describes."""
    import transformers

    words = head_of(config) == OF_WORDS
    return transformers.AutoModelForTokenClassification if words else transformers.AutoModelForSequenceClassification


def label_names(config: Any) -> tuple[str, ...]:
    """The names of a classifier's labels in the order of its logits; () if it has only LABEL_0, LABEL_1, ..."""
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def stated_problem(config: Any) -> ProblemType | None:
    """What a configuration says that its outputs are; None if it does not say."""
    if head_of(config) == OF_WORDS:
        return "token_classification"
    kind, function = getattr(config, "problem_type", None), getattr(config, "function_to_apply", None)
    return kind if kind in get_args(ProblemType) else APPLIED.get(function or "")


def problem_of(config: Any) -> ProblemType:
    """What the outputs of a classifier are; of one that does not say, a number if there is one output, else one label
    (as transformers takes them).
    """
    return stated_problem(config) or ("regression" if config.num_labels == 1 else "single_label_classification")


def give_labels(config: Any, names: Sequence[str], problem_type: ProblemType = "single_label_classification") -> None:
    """Make a configuration that of a classifier with these labels, whatever its head was for before."""
    config.problem_type = None  # it goes with the number of labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    state_problem(config, problem_type)
    if hasattr(config, "function_to_apply"):
        del config.function_to_apply


def state_problem(config: Any, problem_type: ProblemType) -> None:
    """Make a configuration say what its outputs are, for whoever loads it."""
    head = head_for(problem_type)
    if head_of(config) != head and OF_WORDS in (head, head_of(config)):
        config.architectures = [f"{config.model_type}{head}"]  # its class names itself when it is saved
    config.problem_type = None if head == OF_WORDS else problem_type


def check_problem(config: Any, role: str, wanted: ProblemType | None = None, name: str | None = None) -> None:
    """Raises ModelError unless the outputs of the model are what is wanted, as far as its configuration says, with as
    many and distinct labels as that takes. wanted: None for what they are.
    """
    whose = f"{role} '{name or config.name_or_path or config.model_type}'"
    kind, function = getattr(config, "problem_type", None), getattr(config, "function_to_apply", None)
    if function is not None and (function not in APPLIED or kind not in (None, APPLIED[function])):
        raise ModelError(
            f"{whose}: config.json has function_to_apply {function}, which does not go with problem_type {kind}. "
            "Correct the one that is wrong."
        )
    stated = stated_problem(config)
    wanted = wanted or problem_of(config)
    if stated is not None and stated != wanted:
        found = f"problem_type {kind}" if kind else f"function_to_apply {function}"
        if head_of(config) == OF_WORDS:
            found = f"{(config.architectures or [''])[0]}"
        raise ModelError(
            f"{whose} gives each text {MEANING[stated]} ({found} in config.json), and {MEANING[wanted]} is wanted here "
            f"(problem_type {wanted}). Use a model fine-tuned for that; to train on data of its kind (rlkd train "
            f"tkd), set problem_type: {stated}."
        )
    if wanted == "single_label_classification" and config.num_labels < 2:
        raise ModelError(
            f"{whose} has {config.num_labels} label: a classifier needs at least 2. Use a model fine-tuned to give "
            "each text one of several labels; for a number (problem_type: regression), one fine-tuned on numbers."
        )
    if wanted == "regression" and config.num_labels != 1:
        raise ModelError(
            f"{whose} has {config.num_labels} outputs: a regression model gives one number here. Use a model with one."
        )
    _check_names(config, whose)
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if wanted == "token_classification" and (fault := tag_fault(names)):
        raise ModelError(f"{whose}: id2label in config.json does not name the tags of words: {fault}.")


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
    kinds = problem_of(student), problem_of(teacher)
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"the teacher gives each text {MEANING[kinds[1]]} and the student {MEANING[kinds[0]]}: their outputs "
            f"cannot be compared. Make the student with build_student, or set the teacher's problem_type to {kinds[0]}."
        )
    own, others = label_names(student), label_names(teacher)
    if student.num_labels == 1:  # one output, whatever it is called
        return
    if own and others and [name.casefold() for name in own] != [name.casefold() for name in others]:
        raise ModelError(
            f"the teacher's labels are {', '.join(others)}, in this order, and the student's are {', '.join(own)}: "
            "the student would learn each label as another. Make the student with build_student, or give both the same "
            "id2label."
        )
