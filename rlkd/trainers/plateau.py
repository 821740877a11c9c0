"""The settings that `until_ready` implies, and those that contradict it."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

# After an evaluation the rate is lowered by `factor` when the best regret was not beaten by `threshold` (a share of it)
# for more than `patience` evaluations; the warm-up ends when that happens at `min_lr`.
PLATEAU = {"factor": 0.3, "patience": 1, "threshold": 0.01}
LOWEST_RATE = 0.03  # min_lr, a share of learning_rate


def prepare_warm_up(args: Any) -> None:
    """Before transformers sees them: evaluations and checkpoints as a warm-up needs them, its schedule, the best
    checkpoint at the end. Raises ConfigError for settings that contradict them.
    """
    given = {name: getattr(value, "value", value) for name, value in vars(args).items()}
    evaluation = given["eval_strategy"]
    watched = (given["metric_for_best_model"] or "regret").removeprefix("eval_")
    required = {
        "eval_strategy": (evaluation in ("steps", "epoch"), "watches held-out regret: set it to steps or epoch"),
        "save_strategy": (
            given["save_strategy"] in (evaluation, "best"),
            f"keeps the best checkpoint: set it to {evaluation}, as eval_strategy, or to best",
        ),
        "lr_scheduler_type": (
            given["lr_scheduler_type"] in ("linear", "reduce_lr_on_plateau"),  # the default stands for no choice
            "lowers the rate when regret stops falling: leave it out (lr_scheduler_kwargs has the details)",
        ),
        "warmup_steps": (not given["warmup_steps"], "starts at the full learning_rate: leave it out"),
        "early_stopping_patience": (
            given["early_stopping_patience"] is None,
            "stops by itself: leave it out (patience is in lr_scheduler_kwargs)",
        ),
        "metric_for_best_model": (watched in ("regret", "sample_regret"), "takes regret (greedy) or sample_regret"),
        "greater_is_better": (not given["greater_is_better"], "watches regret: leave it out"),
    }
    for name, (fits, constraint) in required.items():
        if not fits:
            raise ConfigError(f"{name} = {given[name]!r}: until_ready {constraint}")
    args.lr_scheduler_type, args.load_best_model_at_end = "reduce_lr_on_plateau", True


def complete_schedule(args: Any) -> None:
    """`lr_scheduler_kwargs` with the defaults of what is not given. Raises ConfigError."""
    given = dict(args.lr_scheduler_kwargs or {})
    kwargs = {**PLATEAU, "min_lr": LOWEST_RATE * args.learning_rate, "eps": 0.0, **given}
    if kwargs.keys() - {*PLATEAU, "min_lr", "eps"} or not 0 < kwargs["factor"] < 1:
        raise ConfigError(
            f"lr_scheduler_kwargs = {given}: until_ready takes factor (between 0 and 1), patience, threshold and min_lr"
        )
    args.lr_scheduler_kwargs = kwargs
