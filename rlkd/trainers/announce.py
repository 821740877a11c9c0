"""The first lines of a run: where it resumes, what a batch is, how much it will see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .core import StudentTrainer


class Announcement(TrainerCallback):
    """Prints them when training starts; with disable_tqdm for a whole job (`run`) only.

    checkpoint: what the run continues from, None for a new one.
    """

    def __init__(self, trainer: StudentTrainer):
        self.trainer, self.whole_job = trainer, False
        self.checkpoint: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or (args.disable_tqdm and not self.whole_job):
            return
        if self.checkpoint is not None:
            at = f"step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.3g}"
            print(f"resuming from {self.checkpoint}: {at}")
        per_epoch = max(-(-len(train_dataloader) // args.gradient_accumulation_steps), 1)
        print(self.trainer.describe_run(state.max_steps, state.max_steps / per_epoch))
