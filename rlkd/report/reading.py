"""A run folder as a record. Any file may be missing or truncated: unknown fields are empty and listed in
`notes`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..metrics import held_out
from ..runs.files import ALARMS_FILE, HELD_OUT, METRICS, RUN_FILE, SUMMARY_FILE
from .lines import Log, Row, json_lines, json_object, number, parsed, step_of

FILES = (METRICS, HELD_OUT, ALARMS_FILE, RUN_FILE)
SEED = re.compile(r"seed[-_]?(\d+)$")
DEPTH = 3  # of run folders below the one given
# Which task score is the headline's, if there are several.
TASK_ORDER = ("accuracy", "subset_accuracy", "exact_match", "rougeL", "bleu")
ALARMS_SHOWN = 1000
ROWS_KEPT = 50_000  # of an evaluation
LABELS_KEPT = 100  # of a row
# What the reports need of every held-out row; the rest is read again for the few rows that are shown.
SHORT = (str, int, float)
TEXTS = ("input", "student", "teacher", "sample_student", "sample_teacher")
SECTIONS = ("settings", "models", "data", "versions")  # objects of run.json


@dataclass(frozen=True)
class RunData:
    """What one trainer left in a folder.

    name         of the arm, without the seed
    seed         from the folder's path; None if it names none
    record       run.json; {} if it is missing
    train        logged lines with a loss, one per step
    evaluations  lines of held-out numbers, one per step
    start, end   the numbers of the start check and of the end of the run; {} if they were not logged
    held_out     step -> rows, for the first and the newest evaluation: numbers and short facts (see `whole`)
    alarms       the alarms that fired
    summary      summary.json of the encoder recipe
    labels       names of a classifier's labels, in the order of their indices
    trained_on   sum of the answer tokens of all log lines
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
    summary: Row = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    trained_on: float | None = None
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

    def whole(self, row: Row) -> Row:
        """A held-out row with its texts and tokens, read again; `row` itself if that fails."""
        try:
            with (self.folder / HELD_OUT).open("rb") as file:
                file.seek(row["offset"])
                found = parsed(file.readline())
        except (OSError, KeyError):
            found = None
        return found if isinstance(found, dict) and str(found.get("id")) == row["id"] else row

    @property
    def empty(self) -> bool:
        """Whether nothing was found in its files."""
        return not (self.record or self.train or self.evaluations or self.held_out or self.alarms or self.end)

    @property
    def steps(self) -> int | None:
        """The last logged step."""
        known = [line["step"] for line in (*self.train, *self.evaluations, self.end) if "step" in line]
        return max(known, default=None)

    @property
    def tokens(self) -> int | None:
        """Answer tokens trained on, as far as they were logged."""
        counted = [x for x in (self.trained_on, number(self.end.get("tokens"))) if x is not None]
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
        """Whether this is the teacher's own training (a folder called teacher): it is no reference for students."""
        return "teacher" in (self.name, self.runs[0].folder.name)


def read_arms(folder: Path, *, with_teacher: bool = True) -> list[Arm]:
    """The run in `folder`, with that of its teacher below it, or the arms below it (`ARM/`, `seed-N/ARM/`).

    Raises DataError if there are none.
    """
    runs = read_runs(folder)
    if with_teacher and runs[0].folder == folder and _is_run(folder / "teacher"):
        runs.append(read_run(folder / "teacher", "teacher"))
    names = list(dict.fromkeys(run.name for run in runs))
    seeds = {name: sorted((r for r in runs if r.name == name), key=lambda r: r.seed or 0) for name in names}
    order = {"supervised": 1, "rl": 2}
    arms = [Arm(name, seeds[name]) for name in names]
    return sorted(arms, key=lambda arm: 4 if arm.is_teacher else order.get(arm.kind, 3))


def read_side_by_side(folders: Sequence[Path]) -> list[Arm]:
    """The arms of several folders, under distinct names. Raises DataError as `read_runs` does, and for fewer than two
    arms or the same one twice.
    """
    found = [(folder, arm) for folder in folders for arm in read_arms(folder, with_teacher=len(folders) == 1)]
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
        why = "this is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {why}. Give the output_dir of a run.")
    found = list(_run_folders(folder))
    if not found:
        raise DataError(f"{folder}: no run in it or up to {DEPTH} folders below: expected one of {', '.join(FILES)}.")
    if found == [folder]:
        runs = [read_run(folder, folder.resolve().name)]
    else:
        runs = [read_run(path, *_name_and_seed(path.relative_to(folder))) for path in found]
    if all(run.empty for run in runs):
        why = next((note for run in runs for note in run.notes if not note.startswith("There is no")), "")
        raise DataError(f"{folder}: its files hold nothing yet. {why}".strip())
    return runs


def read_run(folder: Path, name: str, seed: int | None = None) -> RunData:
    """The content of one run folder; no file is required."""
    notes: list[str] = []
    record = _record(folder / RUN_FILE, notes)
    training, evaluations = Log(), Log()
    start: Row = {}
    end: Row = {}
    without = 0
    for _, line in json_lines(folder / METRICS, notes):
        if (step := step_of(line)) is None:
            without += 1
            continue
        if "loss" in line:
            training.add(step, line)
        if any(key.startswith("eval_") for key in line):
            evaluations.add(step, line)
        start = start or (_numbers(line) if "start_regret" in line else {})
        end = _numbers(line) if "train_runtime" in line else end
    if without:
        notes.append(f"{METRICS}: {without} lines without a step are skipped.")
    if training.not_finite + evaluations.not_finite:
        notes.append(f"{METRICS}: {training.not_finite + evaluations.not_finite} numbers are not finite, and left out.")
    summary = json_object(folder / SUMMARY_FILE, notes, optional=True)
    return RunData(
        name=name,
        folder=folder,
        seed=seed,
        record=record,
        train=training.rows(),
        evaluations=evaluations.rows(),
        start=start,
        end=end,
        held_out=_held_out(folder / HELD_OUT, notes),
        alarms=_alarms(folder / ALARMS_FILE, notes),
        summary=summary,
        labels=_labels(folder, summary),
        trained_on=training.tokens,
        notes=notes,
    )


def _numbers(line: Row) -> Row:
    return {name: value for name, value in line.items() if number(value) is not None}


def _record(path: Path, notes: list[str]) -> Row:
    record = json_object(path, notes, missing=": settings, data and versions are not known")
    for name in SECTIONS:
        if not isinstance(record.get(name, {}), dict):
            notes.append(f"{path.name}: {name} is not an object and is left out.")
            del record[name]
    return record


def _held_out(path: Path, notes: list[str]) -> dict[int, list[Row]]:
    rows: dict[int, list[Row]] = {}
    passed: set[int] = set()
    more: Counter[int] = Counter()
    bad = 0
    for offset, row in json_lines(path, notes):
        step, name = step_of(row), row.get("id")
        if step is None or isinstance(name, (list, dict, type(None))):
            bad += 1
        elif step not in passed:
            own = rows.setdefault(step, [])
            if len(own) < ROWS_KEPT:
                own.append(_short(row) | {"id": str(name), "step": step, "offset": offset})
            else:
                more[step] += 1
            if len(rows) > 2:  # neither the first nor the newest
                between = sorted(rows)[1]
                passed.add(between)
                del rows[between]
    if bad:
        notes.append(f"{path.name}: {bad} lines without a step or an id are skipped.")
    if left := sum(more[step] for step in rows):
        notes.append(f"{path.name}: of an evaluation {ROWS_KEPT:,} rows are read; {left:,} more are left out.")
    return rows


def _short(row: Row) -> Row:
    """The numbers of a row; of its input the words, of its rewards the first, the last and the sum."""
    kept: Row = {name: value for name, value in row.items() if name not in TEXTS and isinstance(value, SHORT)}
    # Of a row with several labels: their numbers.
    kept |= {name: row[name] for name in ("label", "predicted") if _are_labels(row.get(name))}
    if "input" in row:
        kept["words"] = len(str(row["input"]).split())
    rewards = row.get("rewards")
    if isinstance(rewards, list) and len(rewards) > 1:
        known = [value for reward in rewards if (value := number(reward)) is not None]
        if len(known) == len(rewards):
            kept["reward_ends"] = (known[0], known[-1], sum(known))
    return kept


def _are_labels(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= LABELS_KEPT and all(type(one) is int for one in value)


def _alarms(path: Path, notes: list[str]) -> list[Row]:
    alarms: list[Row] = []
    more = 0
    for _, row in json_lines(path, notes, optional=True):
        if len(alarms) < ALARMS_SHOWN:
            alarms.append({name: _cut(value) for name, value in row.items() if isinstance(value, SHORT)})
        else:
            more += 1
    if more:
        notes.append(f"{path.name}: the first {ALARMS_SHOWN:,} alarms are shown, {more:,} more are not.")
    return alarms


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > 1000:
        return value[:1000] + " ..."
    return value if isinstance(value, str) or number(value) is not None else str(value)[:40]


def _labels(folder: Path, summary: Row) -> tuple[str, ...]:
    names = summary.get("labels")
    if not isinstance(names, list):
        found = json_object(folder / "config.json", [], optional=True).get("id2label")
        names = list(found.values()) if isinstance(found, dict) else []
    return tuple(str(name) for name in names)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _is_model_alone(folder: Path) -> bool:
    """Whether this is a copy of a run's model: the logs are elsewhere."""
    logs = any((folder / name).is_file() for name in FILES if name != RUN_FILE)
    return not logs and any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _run_folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from None
    if _is_run(folder):
        yield folder
    elif depth < DEPTH:
        for child in children:
            hidden = child.is_symlink() or child.name.startswith((".", "checkpoint-"))
            if child.is_dir() and not hidden and not _is_model_alone(child):
                yield from _run_folders(child, depth + 1)


def _name_and_seed(path: Path) -> tuple[str, int | None]:
    seeds = [int(match[1]) for part in path.parts if (match := SEED.match(part))]
    rest = [part for part in path.parts if not SEED.match(part)]
    return "/".join(rest) or path.name, seeds[0] if seeds else None


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)
