"""Reward views from run folders, without loading a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..errors import DataError
from ..evaluation.samples import Sample, sample_from
from ..runs.files import TOKEN_REWARDS
from .reward_view import RewardView

STUDENT = ("student", "student sampled", "rollout")


def from_run(folder: Path, *, step: int | None = None) -> RewardView:
    """What a trainer saved in `folder` at its last evaluation, or at that of `step`: held-out answers of the student,
    greedy (also those of the first evaluation, as `student before`) and sampled, the teacher's answers, and rollouts.

    Raises: DataError if there is no such file or step, or a line is not a sample.
    """
    path = folder / TOKEN_REWARDS
    if not path.is_file():
        raise DataError(
            f"{folder} has no {TOKEN_REWARDS}. Trainers with a teacher and eval_examples write it at every evaluation "
            "(sample_table_rows answers)."
        )
    samples: list[Sample] = []
    value = "max"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            value = row.pop("value")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is not a sample: {error}. If the file was cut off, remove that line."
            ) from error
        samples.append(sample_from(row, f"{path}:{number}"))
    steps = sorted({sample.step or 0 for sample in samples})
    if not steps:
        raise DataError(f"{path} is empty: no evaluation was saved.")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise DataError(f"{path} has no step {wanted}: allowed are {', '.join(map(str, steps))}.")
    return RewardView(_at(samples, wanted, steps[0]), value, f"Token rewards of {folder.name}, step {wanted}")


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
