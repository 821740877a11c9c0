"""A study: arms x seeds (x tasks), each cell one result. Its definition, and the state of its results.

A cell's folder is OUT/TASK/seed-N/ARM, without the parts it does not have; its record is next to it in ARM.json, its
output in ARM.log. rlkd/jobs/study_runner.py computes the results.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..io import bounded_yaml
from ..io.files import sha256, write_text

Result = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A finished cell: what its function returned, and the folder it wrote to."""

    folder: Path
    result: Result


@dataclass(frozen=True)
class Cell:
    """One result to compute. inputs: the finished cells it needs, by the name of their arm."""

    arm: str
    seed: int | None
    task: str | None
    out: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Done] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique in the study: TASK/seed-N/ARM."""
        parts = [self.task, None if self.seed is None else f"seed-{self.seed}", self.arm]
        return "/".join(part for part in parts if part is not None)

    @property
    def folder(self) -> Path:
        """The output folder of the cell's function."""
        return self.out / self.name

    @property
    def record_file(self) -> Path:
        return self.out / f"{self.name}.json"

    @property
    def log_file(self) -> Path:
        return self.out / f"{self.name}.log"


@dataclass(frozen=True)
class Arm:
    """How a result is computed, and from what.

    run       called with a Cell in a process of its own; a function of a module (it is pickled); returns a JSON object
    needs     arms whose results it reads: those of the same task and seed, or of the only seed that they have
    settings  JSON object of everything else that the result depends on, except task, seed, `needs` and the code
    seeds     None, those of the study; (), one result for all seeds
    resumes   whether `run` continues an interrupted call in the folder; if not, it starts from an empty one
    """

    run: Callable[[Cell], Result]
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    resumes: bool = False


@dataclass(frozen=True)
class Study:
    """Arms x seeds x tasks in a folder.

    tasks     name -> settings of the task, which its cells get in addition to those of the arm; {}, cells have no task
    headline  numbers of a result to show when it is finished

    Raises ConfigError if arms need unknown arms, or each other.
    """

    out: Path
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    headline: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            if unknown := [need for need in arm.needs if need not in self.arms]:
                raise ConfigError(
                    f"arm {name!r} needs {unknown[0]!r}, which is not an arm. The study has {', '.join(self.arms)}."
                )
            for seed in self._seeds(name):
                for need in arm.needs:
                    self._seed_of(need, seed, name)
        try:
            graphlib.TopologicalSorter({name: arm.needs for name, arm in self.arms.items()}).prepare()
        except graphlib.CycleError as error:
            raise ConfigError(f"arms depend on each other: {' -> '.join(error.args[1])}.") from None

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every cell by name, all of a seed before the next: an early stop leaves complete seeds."""
        cells = [
            Cell(arm, seed, task, self.out, _as_json({**self.arms[arm].settings, **self.tasks.get(task or "", {})}))
            for seed in (None, *self.seeds)
            for task in self.tasks or (None,)
            for arm in self.arms
            if seed in self._seeds(arm)
        ]
        return {cell.name: cell for cell in cells}

    def needed(self, cell: Cell) -> dict[str, Cell]:
        """The cells that a cell reads, by the name of their arm."""
        needs = self.arms[cell.arm].needs
        return {need: self._cell(need, cell.task, self._seed_of(need, cell.seed, cell.arm)) for need in needs}

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a finished result, if it was made with these settings from the current results."""
        record = read_record(cell)
        if record is None or record["result"] is None or record["settings"] != cell.settings:
            return None
        return record if record["inputs"] == self.digests(cell) else None

    def digests(self, cell: Cell) -> dict[str, str] | None:
        """The identity of each result that a cell reads: settings, inputs and numbers. None if one is missing."""
        records = {need: self.finished(other) for need, other in self.needed(cell).items()}
        return None if None in records.values() else {need: _digest(record) for need, record in records.items()}

    def results(self, arm: str, task: str | None = None) -> dict[int | None, Result]:
        """The finished results of an arm: seed -> result, in the order of the seeds; seed None of an arm without
        seeds.
        """
        cells = [self._cell(arm, task, seed) for seed in self._seeds(arm)]
        records = {cell.seed: self.finished(cell) for cell in cells}
        return {seed: record["result"] for seed, record in records.items() if record is not None}

    def numbers(self, arm: str, name: str, task: str | None = None) -> dict[int | None, float]:
        """One number of the results that are finished: seed -> number."""
        return {seed: result[name] for seed, result in self.results(arm, task).items()}

    def refuse_other_settings(self) -> None:
        """Raises ConfigError if the folder holds results of these cells that were made with other settings."""
        changed: dict[str, list[str]] = {}
        for cell in self.cells.values():
            record = read_record(cell)
            if record is not None and record["result"] is not None and record["settings"] != cell.settings:
                changed.setdefault(_change(record["settings"], cell.settings), []).append(f"{cell.name}.json")
        if changed:
            lines = [f"  {', '.join(files)}: {change}" for change, files in changed.items()]
            raise ConfigError(
                f"{self.out} holds results of different settings:\n" + "\n".join(lines) + "\n"
                "Use another folder for these settings, or delete the listed files to compute their results again."
            )

    def refuse_other_files(self) -> None:
        """Raises ConfigError if files that this study did not write are where a cell starts from an empty folder."""
        for cell in self.cells.values():
            if not (cell.record_file.exists() or cell.log_file.exists() or _is_empty(cell.folder)):
                raise ConfigError(
                    f"{cell.folder} exists and has no {cell.record_file.name} next to it, so this study did not write "
                    "it. Use another folder for the study, or move or delete this one."
                )

    def _cell(self, arm: str, task: str | None, seed: int | None) -> Cell:
        return self.cells[Cell(arm, seed, task, self.out, {}).name]

    def _seeds(self, arm: str) -> Sequence[int | None]:
        seeds = self.arms[arm].seeds
        return self.seeds if seeds is None else seeds or (None,)

    def _seed_of(self, need: str, seed: int | None, arm: str) -> int | None:
        seeds = self._seeds(need)
        if seed in seeds:
            return seed
        if len(seeds) != 1:
            raise ConfigError(f"arm {arm!r} needs {need!r}, which has several seeds, but not seed {seed}.")
        return seeds[0]


def read_record(cell: Cell) -> dict[str, Any] | None:
    """The record of a cell; its `result` is None while it is not finished. None if it was never started."""
    return json.loads(cell.record_file.read_text(encoding="utf-8")) if cell.record_file.exists() else None


def write_record(cell: Cell, inputs: Mapping[str, str], result: Result | None) -> None:
    """Write the inputs of a cell and, once finished, its result, atomically."""
    record = {"arm": cell.arm, "seed": cell.seed, "task": cell.task}
    write_json(cell.record_file, {**record, "settings": cell.settings, "inputs": inputs, "result": result})


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. Raises RlkdError if the disk is full."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_plan(path: Path, *, quick: bool) -> dict[str, Any]:
    """A study's YAML file. Its key `quick` holds the tiny sizes: with `quick` they replace what they name.

    Raises ConfigError for a file that cannot be read, or is no mapping with that key.
    """
    plan: Any = bounded_yaml.read(path)
    if not isinstance(plan, dict) or not isinstance(plan.get("quick"), dict):
        raise ConfigError(f"{path}: must be a mapping, whose key 'quick' is a mapping of the sizes to replace.")
    tiny = plan.pop("quick")
    return _merged(plan, tiny) if quick else plan


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """name -> checksum of files that results depend on, for an arm's settings. Raises DataError if one is missing."""
    digests = {}
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: no such file. A result depends on it.")
        digests[name] = sha256(folder / name)[:16]
    return digests


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, nested objects key by key."""

    def both(key: str, value: Any) -> Any:
        return _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value

    return base | {key: both(key, value) for key, value in changes.items()}


def _is_empty(path: Path) -> bool:
    """Whether nothing is at `path`, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they will be read back from JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(settings))


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, in words."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)
