"""Training that reports its CPU seconds, or has a budget of them: fair for arms with steps of different cost."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from .study_runner import say

LINE_SECONDS = 10.0
SHOWN = ("regret", "loss")


def timed_training(trainer: Trainer, stage: str, cpu_seconds: float | None = None) -> dict[str, float]:
    """Train with a line of progress every ten seconds; returns `steps` and `cpu_seconds`.

    With `cpu_seconds` the training ends with the step that reaches them, the learning rate falling linearly to 0 over
    them after the warm-up steps (set max_steps high), and the seconds returned are those of the steps. Without, they
    are those of the whole call.
    """
    clock = _Clock(stage, cpu_seconds, max(int(trainer.args.warmup_steps), 1))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    started = time.process_time()
    trainer.train()
    used = time.process_time() - started
    return {"steps": trainer.state.global_step, "cpu_seconds": used if cpu_seconds is None else clock.used}


class _Clock(TrainerCallback):
    """Progress lines, and a stop at the end of the CPU budget."""

    def __init__(self, stage: str, budget: float | None, warmup_steps: int):
        self.stage, self.budget, self.warmup_steps, self.newest, self.used = stage, budget, warmup_steps, "", 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started_cpu, self.started = time.process_time(), time.monotonic()
        self.shown = self.started

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.budget is None:
            return
        left = max(1 - (time.process_time() - self.started_cpu) / self.budget, 0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(left, (state.global_step + 1) / self.warmup_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        name = next((name for name in SHOWN if name in (logs or {})), None)
        if name:
            self.newest = f", {name} {logs[name]:.2f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.used, now = time.process_time() - self.started_cpu, time.monotonic()
        if self.budget is not None:
            control.should_training_stop = self.used >= self.budget
        if control.should_training_stop or state.global_step == state.max_steps or now - self.shown >= LINE_SECONDS:
            say(f"{self.stage}: {self.progress(state, now)}{self.newest}")
            self.shown = now

    def progress(self, state: Any, now: float) -> str:
        """Progress as text."""
        if self.budget is not None:
            return f"{state.global_step} steps, {self.used:.0f} of {self.budget:.0f} CPU s"
        rate = state.global_step / (now - self.started)
        left = (state.max_steps - state.global_step) / rate
        return f"step {state.global_step}/{state.max_steps}, {rate:.1f}/s, {left:.0f} s left"
