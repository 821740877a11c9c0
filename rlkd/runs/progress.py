"""Training progress: transformers' bar on a terminal, a log line every 30 s elsewhere, nothing with disable_tqdm."""

from __future__ import annotations

import sys
from typing import Any

from transformers import ProgressCallback

from ..io.progress import Pace

SHOWN = ("loss", "regret", "tokens_per_second")


class TrainingProgress(ProgressCallback):
    """The bar with the newest loss, regret and tokens per second at its end; where stderr is no terminal, lines with
    steps per second and time left. A progress bar would fill a log file with carriage returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, float] = {}
        self.pace: Pace | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        else:
            self.pace = Pace("training", "steps", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        elif self.pace is not None:
            self.pace.advance(state.global_step - self.pace.done, 0)
            if self.pace.due():
                self.pace.log("".join(f"  {name} {value}" for name, value in self._shown().items()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.newest |= {name: value for name, value in (logs or {}).items() if name in SHOWN}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace = None
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def _shown(self) -> dict[str, str]:
        return {name: f"{value:.4g}" for name, value in self.newest.items()}
