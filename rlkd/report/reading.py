"""A run folder as a record. Any file may be missing or truncated: unknown fields are empty and listed in
`notes`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..metrics import held_out
from ..runs.files import ALARMS_FILE, HELD_OUT, METRICS, RUN_FILE, SUMMARY_FILE

FILES = (METRICS, HELD_OUT, ALARMS_FILE, RUN_FILE)
SEED = re.compile(r"seed[-_]?(\d+)$")
DEPTH = 3  # of run folders below the one given
TASK_ORDER = ("accuracy", "exact_match", "rougeL", "bleu")  # which task score is the headline's, if there are several

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """What one trainer left in a folder.

    name         of the arm, without the seed
    seed         from the folder's path; None if it names none
    record       run.json; {} if it is missing
    train        logged lines with a loss, one per step
    evaluations  lines of held-out numbers, one per step
    start, end   the numbers of the start check and of the end of the run; {} if they were not logged
    held_out     step -> rows, for the first and the newest evaluation
    alarms       the alarms that fired
    summary      summary.json of the encoder recipe
    notes        what could not be read, one sentence each
    """

    name: str
    folder: Path
    seed: int | None = None
    record: Row = field(default_factory=dict)
    train: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    start: Row = field(default_factory=dict)
    end: Row = field(default_factory=dict)
    held_out: dict[int, list[Row]] = field(default_factory=dict)
    alarms: list[Row] = field(default_factory=list)
    summary: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """rl, supervised, encoder or unknown: from the trainer's name, else from what it logged."""
        trainer = str(self.record.get("trainer") or "").lower()
        names = {name for line in self.train for name in line}
        if "ppo" in trainer or "reinforce" in trainer or self.start or "regret" in names:
            return "rl"
        if "tkd" in trainer or any(name.startswith("weighted_") for name in names):
            return "encoder"
        return "supervised" if "supervised" in trainer or self.train or self.evaluations or self.end else "unknown"

    @property
    def title(self) -> str:
        """Name and seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def newest(self) -> list[Row]:
        """Held-out rows of the newest evaluation."""
        return self.held_out[max(self.held_out)] if self.held_out else []

    @property
    def steps(self) -> int | None:
        """The last logged step."""
        known = [line["step"] for line in (*self.train, *self.evaluations, self.end) if "step" in line]
        return max(known, default=None)

    @property
    def tokens(self) -> int | None:
        """Answer tokens trained on, as far as they were logged."""
        counted = [line["tokens"] for line in (*self.train, self.end) if "tokens" in line]
        return round(sum(counted)) if counted else None

    @property
    def task_names(self) -> list[str]:
        """Task scores of greedy answers in its evaluations, that of the headline first."""
        names = dict.fromkeys(
            name.removeprefix("eval_")
            for line in self.evaluations
            for name in line
            if name.startswith("eval_") and not name.startswith("eval_sample_")
        )
        own = [name for name in names if held_out(name).task]
        wanted = str(self.record.get("settings", {}).get("metric_for_best_model") or "").removeprefix("eval_")
        return sorted(own, key=lambda name: _rank(name, (wanted, *TASK_ORDER)))


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed, in the order of the seeds."""

    name: str
    runs: list[RunData]

    @property
    def kind(self) -> str:
        return self.runs[0].kind

    @property
    def is_teacher(self) -> bool:
        """Whether this is the teacher's own training (a folder called teacher): students are not compared with it."""
        return self.name == "teacher"


def read_arms(folder: Path) -> list[Arm]:
    """The run in `folder`, or the arms below it (`ARM/`, `seed-N/ARM/`). Raises DataError if there are none."""
    runs = read_runs(folder)
    names = list(dict.fromkeys(run.name for run in runs))
    seeds = {name: sorted((r for r in runs if r.name == name), key=lambda r: r.seed or 0) for name in names}
    order = {"supervised": 1, "rl": 2}
    arms = [Arm(name, seeds[name]) for name in names]
    return sorted(arms, key=lambda arm: 0 if arm.is_teacher else order.get(arm.kind, 3))


def read_side_by_side(folders: Sequence[Path]) -> list[Arm]:
    """The arms of several folders, under distinct names. Raises DataError as `read_runs` does, and for fewer than two
    arms or the same one twice.
    """
    found = [(folder, arm) for folder in folders for arm in read_arms(folder)]
    if len(found) < 2:
        raise DataError("compare: give two runs, or the folder of several.")
    names = [arm.name if len(folders) == 1 else _label(folder, arm) for folder, arm in found]
    if len(set(names)) < len(names):
        names = [f"{folder}/{arm.name}" for folder, arm in found]
    if len(set(names)) < len(names):
        raise DataError("compare: the same run is given twice.")
    return [
        Arm(name, [replace(run, name=name) for run in arm.runs]) for name, (_, arm) in zip(names, found, strict=True)
    ]


def _label(folder: Path, arm: Arm) -> str:
    name = folder.resolve().name
    return name if arm.runs[0].folder == folder else f"{name}/{arm.name}"


def read_runs(folder: Path) -> list[RunData]:
    """The run in `folder`, or all runs below it. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the output_dir of a run.")
    found = list(_run_folders(folder))
    if not found:
        raise DataError(f"{folder}: no run in it or up to {DEPTH} folders below: expected one of {', '.join(FILES)}.")
    if found == [folder]:
        return [read_run(folder, folder.resolve().name)]
    return [read_run(path, *_name_and_seed(path.relative_to(folder))) for path in found]


def read_run(folder: Path, name: str, seed: int | None = None) -> RunData:
    """The content of one run folder; no file is required."""
    notes: list[str] = []
    record = _json(folder / RUN_FILE, notes)
    lines = _numbered(folder / METRICS, notes)
    rows: dict[int, list[Row]] = {}
    for row in _numbered(folder / HELD_OUT, notes):
        rows.setdefault(row["step"], []).append(row)
    ends = [line for line in lines if "train_runtime" in line]
    starts = [line for line in lines if "start_regret" in line]
    return RunData(
        name=name,
        folder=folder,
        seed=seed,
        record=record if isinstance(record, dict) else {},
        train=_per_step(line for line in lines if "loss" in line),
        evaluations=_per_step(line for line in lines if any(key.startswith("eval_") for key in line)),
        start=starts[0] if starts else {},
        end=ends[-1] if ends else {},
        held_out=rows,
        alarms=_lines(folder / ALARMS_FILE, notes, optional=True),
        summary=_json(folder / SUMMARY_FILE, notes, optional=True),
        notes=notes,
    )


def _run_folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    if any((folder / name).is_file() for name in FILES):
        yield folder
    elif depth < DEPTH:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith((".", "checkpoint-")):
                yield from _run_folders(child, depth + 1)


def _name_and_seed(path: Path) -> tuple[str, int | None]:
    seeds = [int(match[1]) for part in path.parts if (match := SEED.match(part))]
    rest = [part for part in path.parts if not SEED.match(part)]
    return "/".join(rest) or path.name, seeds[0] if seeds else None


def _per_step(lines: Iterator[Row]) -> list[Row]:
    """The newest line of each step: a resumed run logs the steps that it repeats again."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _numbered(path: Path, notes: list[str]) -> list[Row]:
    lines = _lines(path, notes)
    kept = [line for line in lines if isinstance(line.get("step"), int)]
    if len(kept) < len(lines):
        notes.append(f"{path.name}: {len(lines) - len(kept)} lines without a step are skipped.")
    return kept


def _lines(path: Path, notes: list[str], *, optional: bool = False) -> list[Row]:
    if not path.is_file():
        if not optional:
            notes.append(f"There is no {path.name}.")
        return []
    rows, bad = [], []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                bad.append(number)
    if bad:
        notes.append(f"{path.name}: {len(bad)} lines are not JSON objects and are left out (first: line {bad[0]}).")
    return rows


def _json(path: Path, notes: list[str], *, optional: bool = False) -> Any:
    if not path.is_file():
        if not optional:
            notes.append(f"There is no {path.name}: settings, data and versions are not known.")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        notes.append(f"{path.name} is not JSON and is left out.")
        return None


def number(value: Any) -> float | None:
    """The value as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)
