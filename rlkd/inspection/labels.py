"""Reward views of pseudo-label folders: scored by a teacher, or from the log-probabilities recorded with the labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checks import check_choice
from ..errors import DataError
from ..evaluation.samples import Sample
from ..evaluation.token_rewards import answers_as_rollouts, score_rollouts
from ..labels.store import load_pseudolabels
from ..labels.tokens import check_own
from ..models.spec import TeacherSpec
from ..models.teacher import Teacher
from ..models.vocabulary import token_pieces
from ..objectives.rewards import REWARDS, RewardName
from ..records import Example
from .build import BATCH_ROWS
from .reward_view import RewardView


def from_labels(
    folder: Path,
    tokenizer: Any,
    *,
    teacher: Teacher | TeacherSpec | None = None,
    value: RewardName = "max",
    limit: int | None = None,
) -> RewardView:
    """The first `limit` labels of a finished folder, with their references.

    Without a teacher the numbers are the recorded ones (`--top-k-logprobs`); other tokens have none. A teacher by name
    is loaded once the labels are known to be of its vocabulary.
    Raises: DataError as `load_pseudolabels` does, if no row has a label, or if their tokens are not the tokenizer's.
    """
    check_choice("value", value, REWARDS)
    rows = load_pseudolabels(folder)
    rows = rows.select(range(min(len(rows), len(rows) if limit is None else limit)))
    if not len(rows):
        raise DataError(f"{folder} has no labels to show: no row has status 'ok'.")
    check_own(rows, tokenizer, str(tokenizer.name_or_path))
    if isinstance(teacher, TeacherSpec):
        teacher = teacher.load()
    labels = rows.to_list()
    if teacher is None:
        samples = [_recorded(row, tokenizer, value) for row in labels]
    else:
        samples = _scored(teacher, tokenizer, labels, value)
    samples = [replace(s, facts=_facts(row), finished=_finished(row)) for s, row in zip(samples, labels, strict=True)]
    references = {
        row["id"]: Sample(
            id=row["id"],
            input=row["student_input"],
            source="reference",
            text=row["references"][0],
            tokens=[],
            ids=[],
        )
        for row in labels
        if row["references"]
    }
    return RewardView([*samples, *references.values()], value, f"Pseudo-labels of {folder.name}")


def _scored(teacher: Teacher, tokenizer: Any, labels: list[dict[str, Any]], value: str) -> list[Sample]:
    samples: list[Sample] = []
    for start in range(0, len(labels), BATCH_ROWS):
        batch = labels[start : start + BATCH_ROWS]
        examples = [Example(row["id"], row["student_input"], (row["teacher_input"],)) for row in batch]
        rollouts = answers_as_rollouts(teacher, tokenizer, examples, [row["token_ids"] for row in batch])
        scored = score_rollouts(teacher, tokenizer, rollouts, source="pseudo-label", value=value)
        samples += [
            replace(sample, text=row["label"], prompts={row["template"]: row["teacher_input"]})
            for sample, row in zip(scored, batch, strict=True)
        ]
    return samples


def _recorded(row: dict[str, Any], tokenizer: Any, value: str) -> Sample:
    """From the recorded top tokens: V = max is the first of them; the entropy, and hence V = softmax, is unknown."""
    ids = row["token_ids"]
    columns: dict[str, Any] = {}
    if row.get("top_ids") is not None:
        best = [dict(zip(*pair, strict=True)) for pair in zip(row["top_ids"], row["top_logps"], strict=True)]
        logprobs = [near.get(token) for near, token in zip(best, ids, strict=True)]
        largest = [max(near.values()) for near in best]
        pairs = zip(logprobs, largest, strict=True)
        if value == "lse":
            columns["rewards"] = logprobs
        elif value == "max":
            columns["rewards"] = [None if given is None else given - most for given, most in pairs]
        columns |= {"logprobs": logprobs, "max_logprobs": largest}
        columns["top"] = [[(tokenizer.decode([i]), p) for i, p in near.items()] for near in best]
    return Sample(
        id=row["id"],
        input=row["student_input"],
        source="pseudo-label",
        text=row["label"],
        tokens=token_pieces(tokenizer, ids),
        ids=ids,
        prompts={row["template"]: row["teacher_input"]},
        **columns,
    )


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    facts = {"recorded log-prob": row["sum_logprob"]}
    if row["sample"]:
        facts["sample"] = row["sample"]
    if row["truncated"]:
        facts["prompt"] = "cut"
    return facts


def _finished(row: dict[str, Any]) -> bool:
    return row["finish_reason"] != "length"
