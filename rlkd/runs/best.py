"""The best checkpoint by a held-out metric: a metric that exists, and a checkpoint found again when a run resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..errors import ConfigError, nearest


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a folder resumed under another path, where transformers forgets and deletes it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and folder.is_dir():
            state.best_model_checkpoint = str(folder)


def check_best_metric(args: TrainingArguments, held_out_names: Callable[[], list[str] | None]) -> None:
    """Raise ConfigError if evaluations will not yield `metric_for_best_model`."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    names = held_out_names()
    bare = metric.removeprefix("eval_")
    if names is None or bare in names:
        return
    raise ConfigError(
        f"metric_for_best_model = {metric!r}: no evaluation yields it. Allowed are {', '.join(names)}."
        + nearest(bare, names)
    )
