"""Reward views from models: the teacher scores answers exactly as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checks import check_choice
from ..errors import ConfigError
from ..evaluation.samples import Sample
from ..evaluation.token_rewards import answers_as_rollouts, score_rollouts
from ..models.architectures import language_model
from ..models.policy import Policy
from ..models.signals import LocalSource
from ..models.vocabulary import NO_LIMIT, check_same_vocabulary, encode_answers
from ..objectives.rewards import REWARDS, RewardName
from ..records import Answers, Example
from ..sampling.rollouts import greedy_answers, greedy_writer
from .reward_view import RewardView

BATCH_ROWS = 32


def reward_view(
    teacher: LocalSource,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    student: Any = None,
    answers: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    value: RewardName = "max",
    template_names: Sequence[str] | None = None,
    max_new_tokens: int = 64,
) -> RewardView:
    """Token rewards of answers to `examples`: greedy answers of the student and the teacher, references, given texts.

    Args:
        student: a Policy or a plain model that shares the tokenizer; or several, by the name of their source
            (`{"student": after, "student before": before}`), of which `student` also scores the answers of others.
        answers: texts to score, one per example; or several such lists, by the name of their source.
        value: V of the reward.
        template_names: names of the teacher inputs of an example, in order. With several, every answer is shown under
            all of them together and under each.
        max_new_tokens: answers, given ones included, are cut to this many tokens.
    Raises: ConfigError if there are no examples, or answers and names do not fit them; ModelError if the teacher has
    another vocabulary than the tokenizer, and is no `OtherTokenizer`.
    """
    check_choice("value", value, REWARDS)
    check_same_vocabulary(teacher.tokenizer, tokenizer, "in memory", "in memory")
    examples = list(examples)
    names = _check(examples, answers, template_names)
    students = student if isinstance(student, Mapping) else {} if student is None else {"student": student}
    policies = {source: _policy(model, tokenizer) for source, model in students.items()}
    given = answers if isinstance(answers, Mapping) else {} if answers is None else {"answer": answers}
    samples: list[Sample] = []
    for start in range(0, len(examples), BATCH_ROWS):
        batch = examples[start : start + BATCH_ROWS]
        texts = {source: list(own[start : start + BATCH_ROWS]) for source, own in given.items()}
        reader = policies.get("student")
        found = {
            **_students_answers(policies, teacher, tokenizer, batch, max_new_tokens),
            "teacher greedy": _teacher_answers(teacher, tokenizer, batch, max_new_tokens, reader),
            **_given_answers(teacher, tokenizer, batch, texts, max_new_tokens, reader),
        }
        for source, rollouts in found.items():
            policy = policies.get(source, reader)
            for shown, under in _under_templates(rollouts, names):
                samples += score_rollouts(
                    teacher, tokenizer, shown, source=source, value=value, policy=policy, template_names=under
                )
    return RewardView(samples, value)


def _check(examples: list[Example], answers: Any, template_names: Sequence[str] | None) -> list[str]:
    """Names of the teacher inputs, if the arguments fit together."""
    if not examples:
        raise ConfigError("no examples to inspect: give at least one.")
    if isinstance(answers, str):
        raise ConfigError("answers is a single text: give a list with one text per example, or a dict of such lists.")
    given = answers if isinstance(answers, Mapping) else {} if answers is None else {"answers": answers}
    for source, texts in given.items():
        if len(texts) != len(examples):
            raise ConfigError(f"{source}: {len(texts)} answers for {len(examples)} examples; give one per example.")
    inputs = {len(example.teacher_inputs) for example in examples}
    if len(inputs) > 1:
        raise ConfigError(f"examples have {min(inputs)} to {max(inputs)} teacher inputs: all need the same number.")
    (count,) = inputs
    if template_names is not None and len(template_names) != count:
        raise ConfigError(f"template_names has {len(template_names)} names for {count} teacher inputs per example.")
    return list(template_names or [f"template {k + 1}" for k in range(count)])


def _policy(student: Any, tokenizer: Any) -> Policy:
    return (student if isinstance(student, Policy) else Policy(language_model(student, tokenizer))).eval()


def _under_templates(rollouts: Answers, names: list[str]) -> Iterator[tuple[Answers, list[str]]]:
    """The answers under all templates together and, if there are several, under each."""
    yield rollouts, names
    for k in range(len(names) if len(names) > 1 else 0):
        alone = [replace(e, teacher_inputs=(e.teacher_inputs[k],)) for e in rollouts.examples]
        yield replace(rollouts, examples=alone), [names[k]]


def _students_answers(
    policies: dict[str, Policy], teacher: LocalSource, tokenizer: Any, examples: list[Example], max_new_tokens: int
) -> dict[str, Answers]:
    limits = {"max_input_tokens": teacher.max_input_tokens, "max_new_tokens": max_new_tokens}
    return {source: greedy_answers(policy, tokenizer, examples, **limits) for source, policy in policies.items()}


def _teacher_answers(
    teacher: LocalSource, tokenizer: Any, examples: list[Example], max_new_tokens: int, reader: Policy | None
) -> Answers:
    """The teacher's greedy answers under the first template."""
    inputs = [example.teacher_inputs for example in examples]
    answers = teacher.answer(inputs, greedy_writer(max_new_tokens), max_new_tokens)
    return answers_as_rollouts(teacher, tokenizer, examples, answers, reader)


def _given_answers(
    teacher: LocalSource,
    tokenizer: Any,
    examples: list[Example],
    given: dict[str, list[str]],
    max_new_tokens: int,
    reader: Policy | None,
) -> dict[str, Answers]:
    """The given texts, and the first reference of the examples that have one."""
    pairs = {source: list(zip(examples, texts, strict=True)) for source, texts in given.items()}
    if referenced := [(example, example.references[0]) for example in examples if example.references]:
        pairs["reference"] = referenced
    return {
        source: answers_as_rollouts(
            teacher,
            tokenizer,
            [example for example, _ in own],
            _ends(teacher, tokenizer, [text for _, text in own], max_new_tokens),
            reader,
        )
        for source, own in pairs.items()
    }


def _ends(teacher: LocalSource, tokenizer: Any, texts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Token ids of texts with end-of-sequence, cut to `max_new_tokens` (then without it)."""
    rules = teacher.rules
    whole = [
        [*(token for token in row[:-1] if token not in rules.eos_ids), row[-1]]
        for row in encode_answers(tokenizer, texts, NO_LIMIT, rules)
    ]
    return [row[:max_new_tokens] for row in whole]
