"""What trainers save in token_rewards.jsonl at every evaluation: a few answers with their token rewards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..models.policy import Policy
from ..models.teacher import Teacher
from ..objectives.rewards import Value
from ..records import Example, Minibatch
from ..runs.files import TOKEN_REWARDS, append_lines
from .samples import COLUMNS, Sample
from .token_rewards import answers_as_rollouts, rows_of, score_rollouts

# Column of the evaluator's rows -> whose answer its token ids are.
EVALUATED = {"ids": "student", "sample_ids": "student sampled", "teacher_ids": "teacher greedy"}


def evaluated_samples(
    teacher: Teacher, tokenizer: Any, policy: Policy, examples: list[Example], rows: list[dict[str, Any]], value: Value
) -> list[Sample]:
    """The greedy, sampled and teacher's answers in `rows` of `Evaluator.rows`, one example each, token by token."""
    samples = []
    for column, source in EVALUATED.items():
        rollouts = answers_as_rollouts(teacher, examples, [row[column] for row in rows])
        samples += score_rollouts(teacher, tokenizer, rollouts, source=source, policy=policy, value=value)
    return samples


def rollout_samples(teacher: Teacher, tokenizer: Any, batch: Minibatch, value: Value, *, critic: bool) -> list[Sample]:
    """Answers of a rollout batch with the rewards, advantages and, with a critic, values that training uses; the scale
    of whitened advantages is removed from the rewards.
    """
    mask = batch.rollouts.answer_mask
    used = {
        "rewards": rows_of(batch.rewards / batch.reward_scale, mask),
        "advantages": rows_of(batch.advantages, mask),
        "student_logprobs": rows_of(batch.rollouts.behaviour_logps, mask),
    }
    if critic:
        used["values"] = rows_of(batch.old_values, mask)
    samples = score_rollouts(teacher, tokenizer, batch.rollouts, source="rollout", value=value)
    return [replace(sample, **{name: column[i] for name, column in used.items()}) for i, sample in enumerate(samples)]


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
