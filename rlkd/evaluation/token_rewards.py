"""Scoring of given answers token by token: the rewards, log-probabilities and alternatives that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.generation import rules_of
from ..models.heads import HeadOverStates
from ..models.policy import Policy
from ..models.signals import LocalSource
from ..models.teacher import Teacher
from ..models.vocabulary import decode_texts, encode_prompts, token_pieces
from ..objectives.rewards import induced_advantage
from ..records import Answers, Example, given
from ..tensors import pad_rows
from .samples import Sample

TOP_K = 5  # alternatives kept for each token


def score_rollouts(
    teacher: LocalSource,
    tokenizer: Any,
    rollouts: Answers,
    *,
    source: str,
    value: str = "max",
    policy: Policy | None = None,
    template_names: Sequence[str] | None = None,
) -> list[Sample]:
    """One sample per row of `rollouts`; with a `policy` also its log-probabilities and, with a critic, its values."""
    inputs = [example.teacher_inputs for example in rollouts.examples]
    names = template_names or [f"template {k + 1}" for k in range(len(inputs[0]))]
    mask = rollouts.answer_mask
    ids = [example.id for example in rollouts.examples]
    scores = teacher.score(inputs, rollouts.answer_ids, mask, distribution=True, ids=ids)
    columns: dict[str, Any] = {
        "logprobs": rows_of(scores.chosen - given(scores.logsumexp), mask),
        "max_logprobs": rows_of(given(scores.max) - given(scores.logsumexp), mask),
        "entropies": rows_of(given(scores.entropy), mask),
        "rewards": rows_of(induced_advantage(scores, value), mask),
    }
    if isinstance(teacher, Teacher) and isinstance(scores.distribution, HeadOverStates):
        columns["top"] = top_tokens(teacher, tokenizer, scores.distribution, mask)
    if policy is not None:
        with torch.no_grad():
            (logps, _), values = Policy.forward(policy, *rollouts.policy_inputs)  # see `Evaluator._scored`
        columns["student_logprobs"] = rows_of(logps, mask)
        if policy.value_head is not None:
            columns["values"] = rows_of(values, mask)
    answers = [row[kept].tolist() for row, kept in zip(rollouts.answer_ids, mask, strict=True)]
    texts = decode_texts(tokenizer, answers)
    whose = teacher.answers_by(inputs)
    return [
        Sample(
            id=example.id,
            input=example.student_input,
            source=source,
            text=texts[i],
            tokens=token_pieces(tokenizer, answers[i]),
            ids=answers[i],
            prompts=dict(zip(names, example.teacher_inputs, strict=True)),
            finished=bool(given(rollouts.finished)[i]),
            facts={} if whose is None else {"teacher": whose[i]},
            **{name: column[i] for name, column in columns.items()},
        )
        for i, example in enumerate(rollouts.examples)
    ]


def top_tokens(
    teacher: Teacher, tokenizer: Any, distribution: HeadOverStates, mask: Tensor
) -> list[list[list[tuple[str, float]]]]:
    """[text, log-probability] of the teacher's `TOP_K` most probable tokens at each token of `mask` [B, R], by row."""
    ids, logps = teacher.alternatives(distribution, mask, TOP_K)
    texts = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    return [
        [[(texts[i], p) for i, p in zip(*pair, strict=True)] for pair in zip(row_ids, row_logps, strict=True)]
        for row_ids, row_logps in zip(rows_of(ids, mask), rows_of(logps, mask), strict=True)
    ]


def rows_of(values: Tensor, mask: Tensor) -> list[Any]:
    """The entries of values [B, R, ...] at True positions of mask [B, R], one list per row."""
    return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]


def answers_as_rollouts(
    teacher: LocalSource,
    tokenizer: Any,
    examples: list[Example],
    answers: list[list[int]],
    policy: Policy | None = None,
) -> Answers:
    """Answers given as lists of token ids, to prompts as the policy reads them with this tokenizer; one that does not
    end with end-of-sequence counts as cut. `behaviour_logps` are zeros.
    """
    rules = teacher.rules
    ids, mask = pad_rows(answers, rules.pad_id, teacher.device)
    reading = rules if policy is None else rules_of(policy.lm)
    texts = [example.student_input for example in examples]
    prompts = encode_prompts(tokenizer, texts, teacher.max_input_tokens, append_eos=reading.end_of_prompts)
    input_ids, input_mask = pad_rows(prompts, rules.pad_id, teacher.device)
    return Answers(
        examples=examples,
        input_ids=input_ids,
        input_mask=input_mask,
        answer_ids=ids,
        answer_mask=mask,
        behaviour_logps=torch.zeros(ids.shape, device=ids.device),
        finished=torch.tensor([row[-1:] != [] and row[-1] in rules.eos_ids for row in answers], device=ids.device),
    )
