"""Reward views of pseudo-label folders: scored by a teacher, or from the log-probabilities kept beside the labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checks import check_choice
from ..errors import DataError
from ..labels.store import load_pseudolabels
from ..models.teacher import Teacher
from ..models.vocabulary import token_pieces
from ..objectives.rewards import REWARDS
from ..records import Example
from .build import BATCH_ROWS, TOP_K, answers_as_rollouts, score_rollouts
from .reward_view import RewardView, Sample


def from_labels(
    folder: Path,
    tokenizer: Any,
    *,
    teacher: Teacher | None = None,
    value: str = "max",
    limit: int | None = None,
    top_k: int = TOP_K,
) -> RewardView:
    """The first `limit` labels of a finished folder, with the references kept beside them.

    Without a teacher the numbers are those recorded (`--top-k-logprobs`): a token outside the recorded ones has none.
    Raises: DataError as `load_pseudolabels` does, or if no row has a label.
    """
    check_choice("value", value, REWARDS)
    rows = load_pseudolabels(folder)
    rows = rows.select(range(min(len(rows), len(rows) if limit is None else limit)))
    if not len(rows):
        raise DataError(f"{folder} holds no label to look at: no row has status 'ok'.")
    labels = rows.to_list()
    if teacher is None:
        samples = [_recorded(row, tokenizer, value) for row in labels]
    else:
        samples = _scored(teacher, tokenizer, labels, value, top_k)
    samples = [replace(s, facts=_facts(row), finished=_finished(row)) for s, row in zip(samples, labels, strict=True)]
    references = {
        row["id"]: Sample(row["id"], row["student_input"], "reference", row["references"][0], [], [])
        for row in labels
        if row["references"]
    }
    return RewardView([*samples, *references.values()], value, f"Pseudo-labels of {folder.name}")


def _scored(teacher: Teacher, tokenizer: Any, labels: list[dict[str, Any]], value: str, top_k: int) -> list[Sample]:
    samples: list[Sample] = []
    for start in range(0, len(labels), BATCH_ROWS):
        batch = labels[start : start + BATCH_ROWS]
        examples = [Example(row["id"], row["student_input"], (row["teacher_input"],)) for row in batch]
        rollouts = answers_as_rollouts(teacher, examples, [row["token_ids"] for row in batch])
        scored = score_rollouts(teacher, tokenizer, rollouts, source="pseudo-label", value=value, top_k=top_k)
        samples += [
            replace(sample, text=row["label"], prompts={row["template"]: row["teacher_input"]})
            for sample, row in zip(scored, batch, strict=True)
        ]
    return samples


def _recorded(row: dict[str, Any], tokenizer: Any, value: str) -> Sample:
    """From the recorded best tokens: V = max is their first; the entropy, and so V = softmax, is not known."""
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
    prompts = {row["template"]: row["teacher_input"]}
    named = (row["id"], row["student_input"], "pseudo-label", row["label"], token_pieces(tokenizer, ids), ids)
    return Sample(*named, prompts=prompts, **columns)


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    facts = {"recorded log-prob": row["sum_logprob"]}
    if row["sample"]:
        facts["sample"] = row["sample"]
    if row["truncated"]:
        facts["prompt"] = "cut"
    return facts


def _finished(row: dict[str, Any]) -> bool:
    return row["finish_reason"] != "length"
