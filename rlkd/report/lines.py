"""JSON of a run folder as it is found: files are read line by line, what is damaged is left out and counted, and long
logs are thinned, so that memory does not grow with them.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

LONGEST_LINE = 2**24  # bytes; longer ones are left out
LONGEST_FILE = 2**26  # bytes of a file that is one JSON value
LARGEST_STEP = 2**53
POINTS = 2000  # of a series: more are thinned, evenly
NAMES = 500  # series of a log


def json_lines(path: Path, notes: list[str], *, optional: bool = False) -> Iterator[tuple[int, Row]]:
    """(offset, object) of every line that is a JSON object; at the end, `notes` gets a sentence on the others."""
    if not _readable(path, notes, optional):
        return
    bad, first, number, offset = 0, 0, 0, 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(LONGEST_LINE):
                number, start, offset = number + 1, offset, offset + len(raw)
                whole = raw.endswith(b"\n") or len(raw) < LONGEST_LINE
                while not whole and (rest := file.readline(LONGEST_LINE)):
                    offset, whole = offset + len(rest), rest.endswith(b"\n") or len(rest) < LONGEST_LINE
                    raw = b"["  # too long: not an object
                row = parsed(raw)
                if isinstance(row, dict):
                    yield start, row
                elif raw.strip():
                    bad, first = bad + 1, first or number
    except OSError as error:
        notes.append(f"{path.name} could not be read to its end: {error.strerror}.")
    if bad:
        lines = "1 line is not a JSON object and is" if bad == 1 else f"{bad} lines are not JSON objects and are"
        notes.append(f"{path.name}: {lines} left out (first: line {first}).")


def json_object(path: Path, notes: list[str], *, optional: bool = False, missing: str = "") -> Row:
    """The object in a file; {} with a note if there is none."""
    if not _readable(path, notes, optional, missing):
        return {}
    try:
        value = parsed(path.read_bytes()) if path.stat().st_size <= LONGEST_FILE else None
        json.dumps(value)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return {}
    except RecursionError:  # nested too deep to be shown
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not JSON (an object) and is left out.")
        return {}
    return value


def parsed(raw: bytes) -> Any:
    """The JSON value of some bytes, None if they are not JSON; halves of surrogate pairs become question marks."""
    try:
        value = json.loads(raw.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return _whole(value) if b"\\ud" in raw.lower() else value


def number(value: Any) -> float | None:
    """The value as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def step_of(row: Row) -> int | None:
    """The step of a line; None if it has none."""
    step = row.get("step")
    return step if type(step) is int and 0 <= step < LARGEST_STEP else None


class Log:
    """The numbers of many lines, by step and name: the newest where a step occurs again, as in a resumed run."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._tokens: tuple[array[int], array[float]] = (array("q"), array("d"))
        self.not_finite = 0

    def add(self, step: int, line: Row) -> None:
        """Take a line; all but its finite numbers is left out."""
        for name, value in line.items():
            if name == "step":
                continue
            found = number(value)
            if found is not None and (name in self._series or len(self._series) < NAMES):
                self._series.setdefault(name, _Series()).add(step, found)
            elif isinstance(value, float):
                self.not_finite += 1
        if (tokens := number(line.get("tokens"))) is not None:
            self._tokens[0].append(step)
            self._tokens[1].append(tokens)

    def rows(self) -> list[Row]:
        """The lines, in the order of their steps: of each number about `POINTS` at most, first and last included."""
        by_step: dict[int, Row] = {}
        for name, series in self._series.items():
            for step, value in series.all():
                by_step.setdefault(step, {"step": step})[name] = value
        return [by_step[step] for step in sorted(by_step)]

    @property
    def tokens(self) -> float | None:
        """The sum of `tokens` over all lines, thinned or not; None if none has them."""
        steps, counts = (np.array(column) for column in self._tokens)
        if not len(steps):
            return None
        _, newest = np.unique(steps[::-1], return_index=True)
        return float(counts[::-1][newest].sum())


class _Series:
    """Points of one number in the order of its steps; every second one is dropped when there are too many."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.last: tuple[int, float] | None = None
        self.seen, self.every = 0, 1

    def add(self, step: int, value: float) -> None:
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        self.last = (step, value)
        if self.seen % self.every == 0:
            self.points.append(self.last)
        self.seen += 1
        if len(self.points) > POINTS:
            self.points, self.every = self.points[::2], 2 * self.every

    def all(self) -> list[tuple[int, float]]:
        ended = self.last is None or (self.points and self.points[-1] == self.last)
        return self.points if ended or self.last is None else [*self.points, self.last]


def _readable(path: Path, notes: list[str], optional: bool, missing: str = "") -> bool:
    if path.is_file():
        return True
    if path.is_dir() or path.is_symlink() or path.exists():
        notes.append(f"{path.name} is not a file.")
    elif not optional:
        notes.append(f"There is no {path.name}{missing}.")
    return False


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value
