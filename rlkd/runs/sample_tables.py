"""The table of evaluated samples in the trackers of `report_to`, with the same columns in each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

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
            [step, *(row[name] for name in TEXTS), with_rewards(row), with_rewards(row, "sample_")] for row in rows
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
    """The tokens of an answer, each with its reward in nats: `pen (0.00) and (-0.31)`."""
    pairs = zip(row[f"{prefix}tokens"], row[f"{prefix}rewards"], strict=True)
    return " ".join(f"{token.strip()} ({reward:.2f})" for token, reward in pairs)
