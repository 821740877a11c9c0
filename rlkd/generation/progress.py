"""How far a run is: a bar on a terminal, a log line every 30 s elsewhere, nothing if quiet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


@contextmanager
def progress(total: int | None, done: int = 0, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function of (labels, tokens) made. total, None if unknown; done, labels that an earlier run made."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}  left"), TimeRemainingColumn())
    with Progress("labels", *columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("labels", total=total, completed=done, rate="")
        labels, tokens = done, 0
        started = logged = time.monotonic()

        def advance(new_labels: int, new_tokens: int) -> None:
            nonlocal labels, tokens, logged
            labels, tokens = labels + new_labels, tokens + new_tokens
            now = time.monotonic()
            seconds = max(now - started, 1e-9)
            rate = f"{(labels - done) / seconds:.1f} rows/s  {tokens / seconds:.0f} tokens/s"
            bar.update(task, advance=new_labels, rate=rate)
            if bar.disable and not quiet and (now - logged >= LOG_SECONDS or (labels == total and new_labels)):
                left = f"  {((total or 0) - labels) * seconds / max(labels - done, 1):.0f} s left" if total else ""
                logger.info("labels %d/%s  %s%s", labels, total or "?", rate, left)
                logged = now

        yield advance
