"""Compares what trainers log with the alarms: a warning, a line in alarms.jsonl, the count `alarms`, or the end of the
run.

An alarm fires once per episode, which ends after a few readings within the threshold.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ..errors import DivergenceError
from .alarms import ALARMS, Alarm
from .files import ALARMS_FILE, append_lines
from .measures import History, Reading
from .paired import KEY, BestRows, Pair

logger = logging.getLogger(__name__)

CALM = 3  # readings within the threshold that end an episode


class Watch:
    """All alarms over one run's records."""

    def __init__(self) -> None:
        self.history = History()
        self.calm: dict[str, int] = {}  # readings within the threshold, of alarms that have fired
        self.count = 0

    def add(self, record: Mapping[str, Any]) -> list[tuple[Alarm, Reading]]:
        """Add a record; returns the alarms that fire."""
        self.history.add(record)
        fired = []
        for alarm in ALARMS.values():
            reading = alarm.measure(self.history) if record.keys() & set(alarm.reads) else None
            if reading is None:
                continue
            if not alarm.crossed(reading):
                self.calm[alarm.name] = self.calm.get(alarm.name, CALM) + 1
            elif self.calm.get(alarm.name, CALM) >= CALM:
                fired.append((alarm, reading))
                self.calm[alarm.name] = 0
            else:
                self.calm[alarm.name] = 0
        self.count += len(fired)
        return fired


class AlarmCallback(TrainerCallback):
    """Watches what a trainer logs; `alarms: stop` ends training at the next step a checkpoint may be written."""

    def __init__(self, trainer: Any):
        self.trainer, self.watch = trainer, Watch()
        self.stopped_by: str | None = None
        self.best_rows = BestRows()
        self._paired: dict[str, Pair | None] | None = None  # of the evaluation that is being logged

    def compare(self, scores: dict[str, Any], rows: dict[str, list[float]]) -> None:
        """Compare an evaluation that is about to be logged with the best one: score -> one value per row."""
        self._paired = self.best_rows.compare(scores, rows)

    def observe(self, logs: dict[str, Any]) -> None:
        """Check a record before it is written; lines of training also get the count of `alarms`."""
        trainer = self.trainer
        if trainer.args.alarms == "off":
            return
        for alarm, reading in self.watch.add(logs | {KEY: self._paired}):
            message = f"{alarm.name}: {reading.text}. {alarm.meaning} {alarm.advice_for(trainer.args)}"
            if trainer.args.alarms == "stop" and trainer.is_in_train and self.stopped_by is None:
                self.stopped_by = message
            if trainer.is_world_process_zero():
                logger.warning(f"alarm at step {trainer.state.global_step}, {message}")
                self._write(alarm, reading, message)
        if "loss" in logs:
            logs["alarms"] = self.watch.count

    def _write(self, alarm: Alarm, reading: Reading, message: str) -> None:
        line = {
            "step": self.trainer.state.global_step,
            "time": round(time.time(), 3),
            "alarm": alarm.name,
            "message": message,
            "value": reading.value,
            "threshold": alarm.threshold,
        }
        append_lines(self.trainer.run_folder / ALARMS_FILE, [line])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed run continues with the history of the run it resumes.
        self.watch, self.stopped_by = Watch(), None
        for record in state.log_history:
            self.watch.add(record)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._paired is not None:
            # Kept in checkpoints, so that a resumed run has the same alarms; metrics.jsonl has what was logged.
            state.log_history[-1][KEY], self._paired = self._paired, None
        self._end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end(args, state, control)

    def _end(self, args: Any, state: Any, control: Any) -> None:
        # Checkpoints fall between rollout batches.
        if self.stopped_by and state.global_step % getattr(args, "updates_per_rollout", 1) == 0:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def raise_if_stopped(self) -> None:
        """Raise DivergenceError if an alarm has ended the run."""
        if self.stopped_by is None:
            return
        step = self.trainer.state.global_step
        folder = self.trainer.run_folder / f"checkpoint-{step}"
        saved = f" The checkpoint is in {folder}." if folder.is_dir() else ""
        raise DivergenceError(f"stopped at step {step} by an alarm (alarms: stop), {self.stopped_by}{saved}")
