"""The best checkpoint by a held-out metric: a metric that exists, and a checkpoint found again when a run resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import ConfigError, nearest


class BestCheckpoint(TrainerCallback):
    """When a run resumes: finds the best checkpoint of a folder under another path, where transformers forgets and
    deletes it, and counts on towards the patience, which may be another one now and may be spent.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and args.early_stopping_patience is not None:
                callback.early_stopping_patience = args.early_stopping_patience  # that of the checkpoint was restored
                control.should_training_stop = callback.early_stopping_patience_counter >= args.early_stopping_patience
        folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and folder.is_dir():
            state.best_model_checkpoint = str(folder)


def check_best_metric(args: TrainingArguments, held_out_names: Callable[[], list[str] | None]) -> None:
    """Raise ConfigError if evaluations will not yield `metric_for_best_model`."""
    metric, names = args.metric_for_best_model, held_out_names()
    if metric is None or args.eval_strategy == "no":
        return
    bare = metric.removeprefix("eval_")
    if names is None or bare in names:
        return
    raise ConfigError(
        f"metric_for_best_model = {metric!r}: no evaluation yields it. Allowed are {', '.join(names)}."
        + nearest(bare, names)
    )


def check_held_out(args: TrainingArguments, held_out: Any) -> None:
    """Raise ConfigError if evaluations are asked for and there is nothing to evaluate."""
    for name, off in (("eval_strategy", "no"), ("eval_on_start", False)):
        value = getattr(args, name)
        if held_out is None and value != off:
            raise ConfigError(
                f"{name} = {getattr(value, 'value', value)!r}: there are no held-out rows. Give some (eval_examples, "
                f"eval_rows), or set {name} to {str(off).lower()}."
            )
