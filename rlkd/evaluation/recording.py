"""The answers with token rewards that trainers save in token_rewards.jsonl at every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.policy import Policy
from ..models.signals import LocalSource
from ..records import Answers, Example
from ..runs.files import TOKEN_REWARDS, append_lines
from .samples import COLUMNS, Sample
from .token_rewards import answers_as_rollouts, rows_of, score_rollouts

# Column of the evaluator's rows -> source of the answer.
EVALUATED = {"ids": "student", "sample_ids": "student sampled", "teacher_ids": "teacher greedy"}


def evaluated_samples(
    teacher: LocalSource,
    tokenizer: Any,
    policy: Policy,
    examples: list[Example],
    rows: list[dict[str, Any]],
    value: str,
) -> list[Sample]:
    """The greedy, sampled and teacher's answers in `rows` of `Evaluator.rows`, one example each, token by token."""
    samples = []
    for column, source in EVALUATED.items():
        rollouts = answers_as_rollouts(teacher, tokenizer, examples, [row[column] for row in rows], policy)
        samples += score_rollouts(teacher, tokenizer, rollouts, source=source, policy=policy, value=value)
    return samples


def rollout_samples(
    teacher: LocalSource, tokenizer: Any, answers: Answers, value: str, used: Mapping[str, Tensor]
) -> list[Sample]:
    """Answers of a rollout batch with the numbers that training uses: rewards, advantages, values, [B, R] each."""
    if answers.own_logps is not None:
        used = {**used, "student_logprobs": answers.own_logps}
    columns = {name: rows_of(numbers, answers.answer_mask) for name, numbers in used.items()}
    samples = score_rollouts(teacher, tokenizer, answers, source="rollout", value=value)
    return [
        replace(sample, **{name: column[i] for name, column in columns.items()}) for i, sample in enumerate(samples)
    ]


def append_samples(folder: Path, samples: Iterable[Sample], *, step: int, value: str) -> None:
    """Append one line per sample to the run's file; numbers are rounded to a millionth of a nat."""
    rows = []
    for sample in samples:
        row = {name: field for name, field in asdict(sample).items() if field is not None}
        for name in set(row) & set(COLUMNS):
            row[name] = [x if x is None else round(x, 6) for x in row[name]]
        if "top" in row:
            row["top"] = [[(text, round(x, 3)) for text, x in best] for best in row["top"]]
        rows.append({"value": value, **row, "step": step})
    append_lines(folder / TOKEN_REWARDS, rows)
