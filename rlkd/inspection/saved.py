"""Reward views from run folders, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.samples import Sample, sample_from
from ..runs.files import HELD_OUT, RUN_FILE, TOKEN_REWARDS
from .reward_view import RewardView

STUDENT = ("student", "student sampled", "rollout")
VALUES = ("max", "lse", "softmax")
LONGEST_LINE = 2**26  # bytes


def from_run(folder: Path, *, step: int | None = None) -> RewardView:
    """What a trainer saved in `folder` at its last evaluation, or at that of `step`: held-out answers of the student,
    greedy (also those of the first evaluation, as `student before`) and sampled, the teacher's answers, and rollouts.
    Of held-out inputs that are not in token_rewards.jsonl, the answers and rewards in held_out.jsonl.

    Raises: DataError if there is no such file or step, or a line is not a sample.
    """
    path = folder / TOKEN_REWARDS
    if not path.is_file():
        found = "has no" if not path.exists() else "has a folder in place of"
        raise DataError(
            f"{folder} {found} {TOKEN_REWARDS}. Trainers with a teacher and eval_examples write it at every evaluation "
            "(sample_table_rows answers)."
        )
    kept: dict[int, list[Sample]] = {}  # of the first step, of the one wanted, and the teacher's answers
    steps: set[int] = set()
    value = "max"
    for where, row in _rows(path):
        value = row.pop("value", None)
        if value not in VALUES:
            raise DataError(f"{where}: value must be one of {', '.join(VALUES)}, not {str(value)[:40]}.")
        sample = sample_from(row, where)
        at = sample.step or 0
        steps.add(at)
        kept.setdefault(at, []).append(sample)
        for passed in [s for s in kept if s not in (min(steps), max(steps), step)]:
            kept[passed] = [s for s in kept[passed] if s.source == "teacher greedy"]
    if not steps:
        raise DataError(f"{path} is empty: no evaluation was saved.")
    wanted = max(steps) if step is None else step
    if wanted not in steps:
        raise DataError(f"{path} has no step {wanted}: allowed are {', '.join(map(str, sorted(steps)[:50]))}.")
    samples = _at([sample for own in kept.values() for sample in own], wanted, min(steps))
    known = {sample.id for sample in samples if sample.source == "student"}
    facts = {} if value == "max" else {"V of these rewards": "max"}
    samples += _others(folder / HELD_OUT, wanted, known, facts)
    samples = _named(samples, folder / RUN_FILE)
    return RewardView(samples, value, f"Token rewards of {folder.name}, step {wanted}")


def _named(samples: list[Sample], record: Path) -> list[Sample]:
    """The samples with the names that run.json gives the templates, in place of their numbers."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["templates"]
        names = {f"template {k}": str(template["name"]) for k, template in enumerate(found, start=1)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return samples
    if len(set(names.values())) < len(names):
        return samples
    return [
        replace(sample, prompts={names.get(name, name): text for name, text in sample.prompts.items()})
        for sample in samples
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line. Raises DataError for a line that is no object."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LONGEST_LINE):
                number += 1
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise _damaged(path, number, str(error).splitlines()[0][:120]) from None
                if not isinstance(row, dict):
                    raise _damaged(path, number, f"a {type(row).__name__}, not an object")
                yield f"{path}:{number}", row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _damaged(path: Path, number: int, what: str) -> DataError:
    return DataError(f"{path}:{number} is not a sample: {what}. If the file was cut off, remove that line.")


def _others(path: Path, step: int, known: set[str], facts: dict[str, str]) -> list[Sample]:
    """The student's greedy answers to the other held-out inputs; their rewards are for V = max (their regret)."""
    if not path.is_file():
        return []
    samples = []
    for where, row in _rows(path):
        tokens, rewards = row.get("tokens"), row.get("rewards")
        name = str(row.get("id"))
        if row.get("step") != step or name in known or not isinstance(tokens, list) or not isinstance(rewards, list):
            continue
        read = {
            "id": name, "input": row.get("input", ""), "source": "student", "text": row.get("student", ""),
            "tokens": tokens, "ids": [0] * len(tokens), "rewards": rewards, "step": step,
            "finished": row.get("finish_rate") != 0,
            "facts": {"regret": row["regret"], **facts} if "regret" in row else facts,
        }  # fmt: skip
        samples.append(sample_from(read, where))
    return samples


def _at(samples: list[Sample], step: int, first: int) -> list[Sample]:
    """The samples of the step, with the student's first answers to the same inputs and the teacher's answers."""
    now = [sample for sample in samples if sample.step == step and sample.source in STUDENT]
    inputs = {(sample.id, sample.input) for sample in now}
    before = [
        replace(sample, source="student before")
        for sample in samples
        if sample.step == first != step and sample.source == "student" and (sample.id, sample.input) in inputs
    ]
    fixed = {
        (sample.id, sample.input): replace(sample, step=None, student_logprobs=None)
        for sample in samples
        if sample.source == "teacher greedy" and (sample.id, sample.input) in inputs
    }
    return [*now, *before, *fixed.values()]
