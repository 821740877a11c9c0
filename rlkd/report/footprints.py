"""Size, latency and score of the models that encoder runs measured (summary.json)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .findings import average
from .lines import number
from .reading import Arm


@dataclass(frozen=True)
class Footprint:
    """A model of summary.json: parameters, megabytes on disk, ms per sentence (batch size 1), mean dev score."""

    name: str
    parameters: float | None
    megabytes: float | None
    ms: float | None
    score: float | None


def footprints(arms: Sequence[Arm]) -> list[Footprint]:
    """Each teacher and student measured in a summary.json; a teacher shared by several runs appears once."""
    found: dict[tuple[Any, ...], Footprint] = {}
    for arm in arms:
        for run in arm.runs:
            for role in ("teacher", "student"):
                figures = _part(run.summary, role)
                if not isinstance(figures, dict):
                    continue
                made = Footprint(
                    name=run.title if role == "student" else f"teacher of {run.title}",
                    parameters=number(figures.get("parameters")),
                    megabytes=number(figures.get("megabytes")),
                    ms=number(_part(figures, "ms_per_sentence", "batch_1")),
                    score=_dev_score(run.summary, figures),
                )
                key = ("teacher", str(figures.get("folder"))) if role == "teacher" else ("student", run.folder)
                found.setdefault(key, made)
    return list(found.values())


def _dev_score(summary: Any, figures: dict[str, Any]) -> float | None:
    """The mean score over dev splits, not over `test_files`."""
    scores, test = _part(figures, "scores"), _part(summary, "data", "test")
    splits = scores.items() if isinstance(scores, dict) else ()
    return average([number(_part(split, "score")) for name, split in splits if name not in (test or ())])


def _part(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
