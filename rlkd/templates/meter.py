"""Limits of a template, and the meter that counts one rendering against them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.runtime import LoopContext

from ..checks import Count, Positive, check_settings
from ..errors import DataError, RlkdError

# Characters that cost one step: reading a value, and writing a template's own text in a loop.
READ_PER_STEP = 256
WRITTEN_PER_STEP = 32
# Integers as large as the largest float: to compute with them takes no longer than a step.
MAX_INT_BITS = 1024
# Thousands of larger integers have the same hash, so that each is compared with all the others.
MAX_HASHED_BITS = 64

SCALARS: frozenset[type] = frozenset({str, int, float, bool, type(None)})
VIEWS: frozenset[type] = frozenset({type({}.keys()), type({}.values()), type({}.items())})
CONTAINERS = frozenset({list, tuple, dict, range}) | VIEWS


class SandboxError(DataError):
    """A template does something that the sandbox does not allow, or exceeds a limit."""


class BudgetError(RlkdError):
    """The rows of a job have used up its time: unlike an error of one row, it ends the job."""

    exit_code = DataError.exit_code


@dataclass(frozen=True)
class Limits:
    """Limits of one template. All but the last three apply in any process and do not depend on time.

    source       characters of its jinja
    nesting      levels of its syntax, and of the lists and dicts it works on
    steps        loop iterations, items visited and characters read, over the whole rendering of a row
    value        characters of a text, items of a list
    output       characters of the rendered text
    seconds      wall-clock time of a row in a RenderWorker
    job_seconds  processor time of all rows in a RenderWorker, beyond 0.1 s a row
    memory_mb    memory of a RenderWorker
    Raises ConfigError for limits that are not positive.
    """

    source: Count = 20_000
    nesting: Count = 60
    steps: Count = 1_000_000
    value: Count = 4_000_000
    output: Count = 4_000_000
    seconds: Positive = 10.0
    job_seconds: Positive = 60.0
    memory_mb: Count = 2048

    def __post_init__(self) -> None:
        check_settings(self)

    def exceeded(self, name: str) -> SandboxError:
        """The error for exceeding the limit `name`."""
        return SandboxError(
            f"exceeds the limit {name} = {getattr(self, name):,} "
            f"({_MEANING[name]}). Simplify the template, shorten the row's values, or raise Limits.{name}."
        )


DEFAULT_LIMITS = Limits()
_MEANING = {
    "source": "characters of a template's source",
    "nesting": "levels of syntax, lists and dicts",
    "steps": "loop iterations and items visited",
    "value": "characters of a text, items of a list",
    "output": "characters of the rendered text",
    "seconds": "wall-clock time of a row",
    "job_seconds": "time of all rows, beyond 0.1 s each",
    "memory_mb": "memory of the rendering process",
}


class Meter:
    """Counts the steps and the output of one rendering. Its methods raise SandboxError at a limit."""

    __slots__ = ("limits", "output", "steps")

    def __init__(self, limits: Limits):
        self.limits, self.steps, self.output = limits, limits.steps, limits.output

    def charge(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise self.limits.exceeded("steps")

    def write(self, size: int) -> None:
        """Count characters of output, those of `{% set %}` blocks included."""
        self.output -= size
        if self.output < 0:
            raise self.limits.exceeded("output")

    def read(self, size: int) -> None:
        """Count the reading of a text of this size."""
        if size > READ_PER_STEP:
            self.charge(size // READ_PER_STEP)

    def integers(self, *values: Any) -> None:
        """Raise SandboxError for an integer too large to compute with."""
        for value in values:
            if type(value) is int and value.bit_length() > MAX_INT_BITS:
                raise self.limits.exceeded("value")

    def hashable(self, value: Any) -> None:
        """Raise SandboxError for numbers, in containers too, of which thousands can have the same hash."""
        if type(value) is int:
            if value.bit_length() > MAX_HASHED_BITS:
                raise SandboxError(f"uses a number of over {MAX_HASHED_BITS} bits as a key. Make it a text.")
        elif type(value) in CONTAINERS:
            for item in (value[:1], value[-1:]) if type(value) is range and len(value) > 1 else value:
                self.hashable(item)

    def fits(self, size: int) -> None:
        """Raise SandboxError for a value of this size before it is created."""
        if size > self.limits.value:
            raise self.limits.exceeded("value")

    def loop(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self.steps -= cost
            if self.steps < 0:
                raise self.limits.exceeded("steps")
            yield item

    def settled(self, value: Any, cost: int = 1) -> Any:
        """A lazy value as a list, counted; any other value unchanged."""
        lazy = type(value) not in SCALARS and hasattr(type(value), "__next__") and type(value) is not LoopContext
        return list(self.loop(value, cost)) if lazy else value

    def made(self, value: Any, cost: int = 1) -> Any:
        """A new value, counted; a lazy one is counted as it is read, at `cost` steps an item."""
        kind = type(value)
        if kind is str:
            if len(value) > READ_PER_STEP:
                self.fits(len(value))
                self.read(len(value))
        elif kind is dict:
            self.charge(len(value) // 4)
        elif kind is list or kind is tuple:
            self.fits(len(value))
            self.charge(len(value) // 4)  # objects of some dozen bytes each
        elif kind is int:
            self.integers(value)
        elif kind not in SCALARS and hasattr(kind, "__next__"):
            return self.loop(value, cost)
        return value

    def weigh(self, value: Any) -> int:
        """Approximately the length of `str(value)`, never much less; reading that many characters is charged.

        Lists may share items, so that even a small one can have an endless text: this stops at the limit.
        """
        kind = type(value)
        if kind is str:
            self.read(len(value))
            return len(value)
        if kind in SCALARS:
            return self._scalar(value)
        total, level, depth = 0, [value], 0
        while level:
            if depth > self.limits.nesting:
                raise self.limits.exceeded("nesting")
            self.charge(len(level))
            below: list[Any] = []
            for item in level:
                total += self._open(item, below)
                if total + len(below) > self.limits.value:
                    raise self.limits.exceeded("value")
            level, depth = below, depth + 1
        self.charge(total // READ_PER_STEP)
        return total

    def _open(self, item: Any, below: list[Any]) -> int:
        """The size of an item without its contents, which are added to `below`."""
        kind = type(item)
        if kind is str:
            return len(item) + 2
        if kind in SCALARS:
            return self._scalar(item)
        if kind in CONTAINERS:
            self.fits(2 * len(item))
            below.extend(item)
            if kind is dict:
                below.extend(item.values())
            return 2 + 2 * len(item)
        if isinstance(item, jinja2.Undefined):
            return len(str(item))  # raises for a column that cannot be read
        raise SandboxError(f"uses a {kind.__name__} as a value. Call it, loop over it or make it a list first.")

    def _scalar(self, value: Any) -> int:
        if type(value) is not int:
            return 8
        bits = value.bit_length()
        if bits > MAX_INT_BITS:  # printing it takes time in proportion to the square
            self.charge((bits // 512) ** 2)
        return 1 + bits // 3

    def weigh_arguments(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
        """The size of all arguments of a call, counted."""
        return sum(map(self.weigh, args)) + sum(map(self.weigh, kwargs.values()))
