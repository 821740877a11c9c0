"""Reward views from models: the teacher scores given answers exactly as it does in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from ..errors import ConfigError
from ..models.architectures import language_model
from ..models.heads import HeadOverStates
from ..models.policy import Policy
from ..models.teacher import Teacher
from ..models.vocabulary import decode_texts, encode_texts, token_pieces
from ..objectives.rewards import REWARDS, induced_advantage
from ..records import Example, Rollouts, TeacherSignal, given
from ..sampling.decode import decode, greedy
from ..sampling.rollouts import greedy_answers
from ..tensors import pad_rows
from .reward_view import RewardView, Sample

TOP_K = 5
BATCH_ROWS = 32


def reward_view(
    teacher: Teacher,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    student: Any = None,
    student_before: Any = None,
    answers: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    value: str = "max",
    template_names: Sequence[str] | None = None,
    per_template: bool = False,
    max_new_tokens: int = 64,
    top_k: int = TOP_K,
) -> RewardView:
    """What the teacher says of answers to `examples`: greedy ones of the student (before and after), its own, the
    references, and any that are given.

    Args:
        student, student_before: a Policy or a plain model that shares the tokenizer; may be left out.
        answers: texts to judge, one per example, or several such lists by the name of their source.
        template_names: names of the teacher inputs of an example, in order.
        per_template: show every answer under each template by itself as well.
        max_new_tokens: answers, given ones too, are cut to so many tokens.
    Raises: ConfigError if there are no examples, or answers and names do not fit them.
    """
    check_choice("value", value, REWARDS)
    examples = list(examples)
    names = _check(examples, answers, template_names)
    given = answers if isinstance(answers, Mapping) else {} if answers is None else {"answer": answers}
    current = None if student is None else _policy(student, tokenizer)
    earlier = None if student_before is None else _policy(student_before, tokenizer)
    limits: dict[str, Any] = {"max_input_tokens": teacher.max_input_tokens, "max_new_tokens": max_new_tokens}
    samples: list[Sample] = []
    for start in range(0, len(examples), BATCH_ROWS):
        batch = examples[start : start + BATCH_ROWS]
        found: dict[str, tuple[Rollouts, Policy | None]] = {}
        for source, policy in (("student", current), ("student before", earlier)):
            if policy is not None:
                policy.eval()
                found[source] = greedy_answers(policy, tokenizer, batch, **limits), policy
        found["teacher greedy"] = _teacher_answers(teacher, batch, max_new_tokens), current
        for source, texts in given.items():
            part = list(texts[start : start + BATCH_ROWS])
            found[source] = _given_answers(teacher, tokenizer, batch, part, max_new_tokens), current
        if referenced := [example for example in batch if example.references]:
            texts = [example.references[0] for example in referenced]
            found["reference"] = _given_answers(teacher, tokenizer, referenced, texts, max_new_tokens), current
        for source, (rollouts, policy) in found.items():
            options: dict[str, Any] = {"source": source, "policy": policy, "value": value, "top_k": top_k}
            samples += score_rollouts(teacher, tokenizer, rollouts, template_names=names, **options)
            for k in range(len(names) if per_template and len(names) > 1 else 0):
                alone = [replace(e, teacher_inputs=(e.teacher_inputs[k],)) for e in rollouts.examples]
                one = replace(rollouts, examples=alone)
                samples += score_rollouts(teacher, tokenizer, one, template_names=[names[k]], **options)
    return RewardView(samples, value)


def score_rollouts(
    teacher: Teacher,
    tokenizer: Any,
    rollouts: Rollouts,
    *,
    source: str,
    value: str = "max",
    policy: Policy | None = None,
    template_names: Sequence[str] | None = None,
    top_k: int = TOP_K,
) -> list[Sample]:
    """One sample per row of `rollouts`; with a `policy` also its log-probabilities and, of a critic, its values."""
    inputs = [example.teacher_inputs for example in rollouts.examples]
    names = template_names or [f"template {k + 1}" for k in range(len(inputs[0]))]
    mask = rollouts.answer_mask
    ids = [example.id for example in rollouts.examples]
    scores = teacher.score(inputs, rollouts.answer_ids, mask, distribution=top_k > 0, ids=ids)
    columns: dict[str, Any] = teacher_columns(scores, mask) | {
        "rewards": rows_of(induced_advantage(scores, value), mask)
    }
    if isinstance(scores.distribution, HeadOverStates):
        columns["top"] = top_tokens(teacher, tokenizer, scores.distribution, mask, top_k)
    if policy is not None:
        with torch.no_grad():
            (logps, _), values = policy(rollouts.input_ids, rollouts.input_mask, rollouts.answer_ids, mask)
        columns["student_logprobs"] = rows_of(logps, mask)
        if policy.value_head is not None:
            columns["values"] = rows_of(values, mask)
    answers = [row[kept].tolist() for row, kept in zip(rollouts.answer_ids, mask, strict=True)]
    return [
        Sample(
            example.id,
            example.student_input,
            source,
            text,
            token_pieces(tokenizer, answer),
            answer,
            prompts=dict(zip(names, example.teacher_inputs, strict=True)),
            finished=bool(finished),
            **{name: column[i] for name, column in columns.items()},
        )
        for i, (example, text, answer, finished) in enumerate(
            zip(
                rollouts.examples,
                decode_texts(tokenizer, answers),
                answers,
                given(rollouts.finished).tolist(),
                strict=True,
            )
        )
    ]


def teacher_columns(scores: TeacherSignal, mask: Tensor) -> dict[str, list[Any]]:
    """Log-probability of each token of `mask` [B, R], the largest there, and the entropy, as lists of rows."""
    return {
        "logprobs": rows_of(scores.chosen - given(scores.logsumexp), mask),
        "max_logprobs": rows_of(given(scores.max) - given(scores.logsumexp), mask),
        "entropies": rows_of(given(scores.entropy), mask),
    }


def top_tokens(
    teacher: Teacher, tokenizer: Any, distribution: HeadOverStates, mask: Tensor, k: int
) -> list[list[list[tuple[str, float]]]]:
    """[text, log-probability] of the teacher's k most probable tokens at each token of `mask` [B, R]."""
    ids, logps = teacher.alternatives(distribution, mask, k)
    texts = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    return [
        [[(texts[i], p) for i, p in zip(*pair, strict=True)] for pair in zip(row_ids, row_logps, strict=True)]
        for row_ids, row_logps in zip(rows_of(ids, mask), rows_of(logps, mask), strict=True)
    ]


def rows_of(values: Tensor, mask: Tensor) -> list[Any]:
    """The entries of values [B, R, ...] at True positions of mask [B, R], one list per row."""
    return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]


def _check(examples: list[Example], answers: Any, template_names: Sequence[str] | None) -> list[str]:
    """Names of the teacher inputs, if all that is given fits together."""
    if not examples:
        raise ConfigError("there are no examples to look at: give at least one.")
    if isinstance(answers, str):
        raise ConfigError("answers is one text: give a list with one text per example, or a dict of such lists.")
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
    return student if isinstance(student, Policy) else Policy(language_model(student, tokenizer)).eval()


def _teacher_answers(teacher: Teacher, examples: list[Example], max_new_tokens: int) -> Rollouts:
    """What the teacher answers itself under the first template."""
    states = teacher.prompt_states([example.teacher_inputs[0] for example in examples])
    answer = decode(teacher.lm, states, greedy, max_new_tokens=max_new_tokens)
    return _as_rollouts(teacher, examples, answer.ids, answer.mask, answer.finished)


def _given_answers(
    teacher: Teacher, tokenizer: Any, examples: list[Example], texts: list[str], max_new_tokens: int
) -> Rollouts:
    """Texts as answers: tokens and end-of-sequence, cut to `max_new_tokens` (then without it)."""
    eos = teacher.lm.eos_id
    whole = [
        [*(token for token in row if token != eos), eos]
        for row in encode_texts(tokenizer, texts, max_new_tokens + 1, append_eos=False)
    ]
    return answers_as_rollouts(teacher, examples, [row[:max_new_tokens] for row in whole])


def answers_as_rollouts(teacher: Teacher, examples: list[Example], answers: list[list[int]]) -> Rollouts:
    """Answers given as token ids; one without end-of-sequence at its end counts as cut."""
    ids, mask = pad_rows(answers, teacher.lm.pad_id, teacher.lm.device)
    finished = torch.tensor([row[-1:] == [teacher.lm.eos_id] for row in answers], device=ids.device)
    return _as_rollouts(teacher, examples, ids, mask, finished)


def _as_rollouts(teacher: Teacher, examples: list[Example], ids: Tensor, mask: Tensor, finished: Tensor) -> Rollouts:
    prompts = encode_texts(teacher.tokenizer, [e.student_input for e in examples], teacher.max_input_tokens)
    input_ids, input_mask = pad_rows(prompts, teacher.lm.pad_id, teacher.lm.device)
    return Rollouts(
        examples=examples,
        input_ids=input_ids,
        input_mask=input_mask,
        answer_ids=ids,
        answer_mask=mask,
        behaviour_logps=torch.zeros(ids.shape, device=ids.device),
        finished=finished,
    )
