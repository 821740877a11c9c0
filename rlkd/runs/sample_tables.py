"""Evaluated samples: on stderr, and as a table in the trackers of `report_to` with the same columns in each."""

from __future__ import annotations

from collections.abc import Collection
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table

from .trackers import Outage

TEXTS = ("id", "input", "teacher", "student", "regret", "sample_student", "sample_regret")
COLUMNS = ("step", *TEXTS, "tokens", "sample_tokens")
NAME = "samples"


class SampleTables:
    """One table per tracker: that of wandb grows with every evaluation, trackio keeps one per evaluation."""

    def __init__(self, trackers: Collection[str]):
        senders = {"wandb": self._to_wandb, "trackio": self._to_trackio}
        self._send = [
            Outage(f"{name}'s table of samples").survived(send) for name, send in senders.items() if name in trackers
        ]
        self._wandb: Any = None

    def log(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Send rows of an `Evaluator`. The trackers' runs are open, as the Trainer has logged to them before."""
        cells = [
            [step, *(row.get(name) for name in TEXTS), with_rewards(row), with_rewards(row, "sample_")] for row in rows
        ]
        for send in self._send:
            send(cells)

    def _to_wandb(self, cells: list[list[Any]]) -> None:
        import wandb

        if self._wandb is None:
            self._wandb = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for row in cells:
            self._wandb.add_data(*row)
        wandb.log({NAME: self._wandb}, commit=False)

    def _to_trackio(self, cells: list[list[Any]]) -> None:
        import trackio

        trackio.log({NAME: trackio.Table(columns=list(COLUMNS), data=cells)})


def with_rewards(row: dict[str, Any], prefix: str = "") -> str:
    """The tokens of an answer, each with its reward in nats: `pen (0.00) and (-0.31)`; without, if none is known."""
    if f"{prefix}rewards" not in row:
        return " ".join(token.strip() for token in row[f"{prefix}tokens"])
    pairs = zip(row[f"{prefix}tokens"], row[f"{prefix}rewards"], strict=True)
    return " ".join(f"{token.strip()} ({reward:.2f})" for token, reward in pairs)


def print_samples(step: int, rows: list[dict[str, Any]]) -> None:
    """The samples on stderr: a table on a terminal; in a log file four lines each, which can be searched."""
    title, console = f"samples at step {step}", Console(stderr=True)
    if not console.is_terminal:
        console.print("\n".join([title, *map(_in_lines, rows)]), soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(title=title, show_lines=True)
    known = [column for column in TEXTS if any(column in row for row in rows)]
    for column in known:
        table.add_column(column, overflow="fold", justify="right" if "regret" in column else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in known))
    console.print(table)


def _in_lines(row: dict[str, Any]) -> str:
    answers = (("student", "student", "regret"), ("sampled", "sample_student", "sample_regret"))
    lines = [f"  {row['id']}: {shorten(row['input'], 200)}"]
    if "teacher" in row:
        lines.append(f"    teacher: {row['teacher']}")
    for name, text, regret in answers:
        lines.append(f"    {name}: {row[text]}" + (f" (regret {row[regret]:.2f})" if regret in row else ""))
    return "\n".join(lines)
