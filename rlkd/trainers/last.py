"""The evaluation of the student that a run saves: made once, before trackers close."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .core import StudentTrainer


class LastEvaluation(TrainerCallback):
    """At the end of training, evaluates the student if it was not evaluated at this step (`wanted` by `run`).

    metrics    the numbers of the student that is saved, `eval_*`
    best_step  the step whose weights were loaded at the end (load_best_model_at_end); None for the last ones
    """

    def __init__(self, trainer: StudentTrainer):
        self.trainer, self.wanted = trainer, False
        self.metrics: dict[str, Any] = {}
        self.best_step: int | None = None
        self._trusted_after = -1

    @property
    def step(self) -> int:
        """The step whose weights the student has."""
        return self.trainer.state.global_step if self.best_step is None else self.best_step

    def distrust_if(self, changed: bool, checkpoint: Path) -> None:
        """Do not reuse evaluations up to a checkpoint that other settings or data were used for."""
        if changed:
            self._trusted_after = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]

    def newest(self) -> dict[str, Any]:
        """The evaluation of the student as it is, else the last one before; {} without any."""
        lines = [line for line in self._evaluations() if line["step"] <= self.step]
        return lines[-1] if lines else {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.best_step = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.wanted:
            return
        self.trainer.is_in_train = False  # alarms have nothing to stop
        known = [line for line in self._evaluations() if line["step"] == self.step > self._trusted_after]
        if not known:
            self.trainer.evaluate()
        self.metrics = (known or self._evaluations())[-1]
        if known and self.step < self.trainer.state.global_step:
            self.trainer.refresh_held_out()

    def _evaluations(self) -> list[dict[str, Any]]:
        history = self.trainer.state.log_history
        return [line for line in history if any(name.startswith("eval_") for name in line)]
