"""Progress of a long job: a bar on a terminal, a log line every 30 s elsewhere, nothing if quiet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class Pace:
    """Counts finished units and logs them in one line; `due` when `LOG_SECONDS` have passed since the last line."""

    def __init__(self, what: str, unit: str, total: int | None, done: int = 0):
        self.what, self.unit, self.total, self.first, self.done = what, unit, total, done, done
        self.tokens = 0
        self.started = self.logged = time.monotonic()

    def advance(self, new: int, tokens: int) -> None:
        """new, units finished; tokens in them (0 if not counted)."""
        self.done, self.tokens = self.done + new, self.tokens + tokens

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def rate(self) -> str:
        """Units and tokens per second."""
        tokens = f"  {self.tokens / self.seconds:.0f} tokens/s" if self.tokens else ""
        return f"{(self.done - self.first) / self.seconds:.1f} {self.unit}/s{tokens}"

    def due(self) -> bool:
        return time.monotonic() - self.logged >= LOG_SECONDS or self.done == self.total

    def log(self, more: str = "") -> None:
        """Log the line, and restart the clock for the next one."""
        made = max(self.done - self.first, 1)
        left = f"  {(self.total - self.done) * self.seconds / made:.0f} s left" if self.total else ""
        logger.info("%s %d/%s  %s%s%s", self.what, self.done, self.total or "?", self.rate(), left, more)
        self.logged = time.monotonic()


@contextmanager
def progress(
    total: int | None, done: int = 0, *, what: str = "labels", quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the rows and tokens finished since the last call. total, rows in all, None if unknown;
    done, rows of an earlier run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}  left"), TimeRemainingColumn())
    with Progress(what, *columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")
        pace = Pace(what, "rows", total, done)

        def advance(new: int, tokens: int) -> None:
            pace.advance(new, tokens)
            bar.update(task, advance=new, rate=pace.rate())
            if bar.disable and not quiet and new and pace.due():
                pace.log()

        yield advance
