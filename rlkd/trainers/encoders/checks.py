"""Whether teacher, student and settings go together, from configurations and tokenizers alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...choices import ProblemType
from ...errors import ConfigError, ModelError
from ...evaluation.problems import PROBLEMS
from ...models.encoders.classifiers import check_head_slices, check_length, matched_layers
from ...models.encoders.labels import check_problem, check_same_labels, problem_of
from ...models.encoders.outputs import Need, width_of
from ...models.vocabulary import check_vocabulary_fits, valid_vocab
from .arguments import TKDArguments
from .terms import PRESETS, TERMS


def check_distillation(
    args: TKDArguments, student_config: Any, teacher_config: Any, tokenizer: Any, teacher_tokenizer: Any = None
) -> None:
    """Check the combination of models and settings from configurations and tokenizers alone. Raises ConfigError or
    ModelError.
    """
    check_problem(teacher_config, "teacher")
    check_settings_of(problem_of(student_config), args)
    check_same_labels(student_config, teacher_config)
    check_length(args.max_length, student_config, "student")
    check_length(args.max_length, teacher_config, "teacher")
    terms = {name for name in args.weights if not TERMS[name].of_logits}
    if not terms:
        return
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"preset = {args.preset!r}: teacher and student have different tokenizers, so their tokens cannot be "
            "matched, only their logits. Use preset: kd, or a student with the teacher's tokenizer."
        )
    layers = matched_layers(student_config.num_hidden_layers, teacher_config.num_hidden_layers, args.layer_map)
    if "pt" in terms and len(layers) == 1 and not args.patience_last_layer:
        raise ConfigError(
            "patience_last_layer = False: a student of 1 layer has no other. Set it to true, or beta to 0."
        )
    _check_heads(args, terms, student_config, teacher_config)
    own, theirs = (_word_width(config) for config in (student_config, teacher_config))
    if "gradient" in terms and own != theirs:
        raise ConfigError(
            f"term gradient: word embeddings of width {own} (student) and {theirs} (teacher) have no comparable "
            "gradients. Use another term, or a student of the teacher's width."
        )


def check_settings_of(problem_type: ProblemType, args: TKDArguments) -> None:
    """Raises ConfigError for a temperature where there is nothing to soften, and for terms of whole texts where each
    word has a label.
    """
    problem = PROBLEMS[problem_type]
    if not problem.temperature and args.temperature != TKDArguments.temperature:
        raise ConfigError(
            f"temperature = {args.temperature:g}: has no effect under problem_type {problem_type}, whose outputs are "
            "compared as they are. Leave it out."
        )
    if whole := [name for name in args.weights if TERMS[name].of_text] if problem.of_words else []:
        setting = TERMS[whole[0]].setting
        off = f", or {setting}: 0" if setting else ""
        fitting = [name for name, terms in PRESETS.items() if terms and not any(TERMS[term].of_text for term in terms)]
        raise ConfigError(
            f"preset = {args.preset!r}: the term {whole[0]} starts from one vector or logit of the whole text, and "
            f"{problem_type} has one for each word. Use preset: {', '.join(fitting)}{off}."
        )


# What recorded logits lack, in words.
IN_WORDS: dict[Need, str] = {
    "cls": "hidden states", "hidden": "hidden states", "embeddings": "embeddings", "tree": "attention",
    "attention": "attention", "relations": "attention", "neurons": "feed-forward neurons", "gradient": "gradients",
}  # fmt: skip


def check_recorded_teacher(args: TKDArguments, *, given: bool = False) -> None:
    """Whether recorded logits are all that the terms need of a teacher; given, whether there is another one, too.

    Raises ConfigError.
    """
    if given:
        raise ConfigError("the training rows bring a teacher's logits: leave the teacher out")
    for name in args.weights:
        if lacking := [IN_WORDS[need] for need in TERMS[name].teacher if need != "logits"]:
            raise ConfigError(
                f"preset = {args.preset!r}: the term {name} needs the teacher's {lacking[0]}, and labels give only its "
                "logits. Use terms of logits: preset kd, logit-mse or noisy-logits."
            )
    if args.teacher_cache != "none":
        raise ConfigError(
            f"teacher_cache = {args.teacher_cache!r}: labels are a teacher's outputs already. Leave it out."
        )


def _check_heads(args: TKDArguments, terms: Collection[str], student: Any, teacher: Any) -> None:
    """What the numbers of attention heads allow."""
    of_student, of_teacher = {"td_student", "td_random", "all", "attention", "relations"}, {
        "td_teacher", "attention", "relations",
    }  # fmt: skip
    for role, config, needing in (
        ("student", student, of_student.intersection(terms)),
        ("teacher", teacher, of_teacher.intersection(terms)),
    ):
        if needing and not getattr(config, "num_attention_heads", None):
            raise ModelError(
                f"preset = {args.preset!r}: the {role} is a '{config.model_type}' model without attention heads. "
                "Use preset: kd or pkd."
            )
        if any(TERMS[name].late for name in needing):
            check_head_slices(config.num_attention_heads, width_of(teacher), role)
    if "attention" in terms and student.num_attention_heads != teacher.num_attention_heads:
        raise ConfigError(
            f"term attention: {student.num_attention_heads} attention heads (student) and "
            f"{teacher.num_attention_heads} (teacher) cannot be compared. Use the term relations (preset: minilm)."
        )
    if "relations" in terms:
        heads = args.relation_heads or teacher.num_attention_heads
        for role, config in (("student", student), ("teacher", teacher)):
            if config.hidden_size % heads:
                raise ConfigError(
                    f"relation_heads = {heads}: must divide the {role}'s width {config.hidden_size}. Choose a divisor "
                    "of both widths."
                )


def _word_width(config: Any) -> int:
    return int(getattr(config, "embedding_size", None) or config.hidden_size)


def check_labels_and_vocabulary(model: Any, role: str, tokenizer: Any) -> None:
    """Raises ModelError unless the model's labels are distinct and it has embeddings for all ids of the tokenizer."""
    check_problem(model.config, role)
    name = model.config.name_or_path or model.config.model_type
    check_vocabulary_fits(model.config, valid_vocab(tokenizer), role, name)
