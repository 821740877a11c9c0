"""Settings of all trainers, on top of transformers' TrainingArguments (its fields are never repeated here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from ..checks import Count, Natural, check_settings
from ..errors import ConfigError
from ..io.redaction import redacted
from ..metrics import held_out
from .environment import check_half_precision, check_launch, use_one_gpu


def require(condition: bool, name: str, value: object, constraint: str) -> None:
    """Raise ConfigError for the setting `name` unless the condition holds; constraint, what is allowed instead."""
    if not condition:
        raise ConfigError(f"{name} = {value!r}: {constraint}")


@dataclass
class StudentArguments(TrainingArguments):
    """Settings of all rlkd trainers.

    Where these differ from TrainingArguments' own defaults: NaN losses are shown (and stopped), nothing is reported
    to a tracker unless requested, columns are kept for the collators, and a resumed run restores its callbacks.
    """

    shards: ClassVar[bool] = False  # whether FSDP2 may shard the student

    allow_config_change: bool = field(
        default=False, metadata={"help": "Resume a checkpoint that was written with other settings."}
    )
    alarms: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={"help": "When a logged number crosses a threshold of docs/guards.md: warn, or save and exit with 5."},
    )
    early_stopping_patience: Count | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement; null: never."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Always on: a resumed run keeps its early-stopping count."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Always off: a NaN loss must not be hidden."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off: the collators use all columns."})

    def to_dict(self) -> dict[str, Any]:
        """As in TrainingArguments, without secrets: trackers get it."""
        return redacted(super().to_dict())

    def __post_init__(self) -> None:
        check_settings(self)
        check_launch(self)  # before TrainingArguments, which would set up what is refused
        self.run_name = redacted(self.run_name)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not held_out(self.metric_for_best_model).lower_is_better
        super().__post_init__()
        use_one_gpu(self)
        patience = self.early_stopping_patience
        if patience is not None:
            require(
                self.load_best_model_at_end,
                "early_stopping_patience",
                patience,
                "needs load_best_model_at_end: true (and eval_strategy, save_strategy: epoch or steps)",
            )
        require(
            not self.load_best_model_at_end or self.save_strategy != "steps" or self.save_steps == self.eval_steps,
            "save_steps",
            self.save_steps,
            f"load_best_model_at_end keeps an evaluated step only if it is saved: set it to eval_steps = "
            f"{self.eval_steps}, or save_strategy to best",
        )


@dataclass
class DistillationArguments(StudentArguments):
    """Settings of all trainers of generating students."""

    shards = True

    max_input_tokens: Count = field(default=512, metadata={"help": "Prompts are cut to this many tokens."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Answers are cut to this many tokens."})
    eval_limit: Count | None = field(
        default=512, metadata={"help": "Evaluate on at most this many inputs; null for all."}
    )
    sample_table_rows: Natural = field(
        default=4, metadata={"help": "Rows of the prompt / student / teacher / reward table shown at each evaluation."}
    )

    @property
    def reads_labels(self) -> bool:
        """Whether the trainer learns from pseudo-labels."""
        return False

    @property
    def label_setting(self) -> str | None:
        """The setting that makes it read labels, with its value; None if none does."""
        return None

    def __post_init__(self) -> None:
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "regret"
        super().__post_init__()
        check_half_precision(self.mixed_precision, setting=self.fp16)


def check_labels(args: DistillationArguments, *, given: bool, name: str) -> None:
    """Raise ConfigError if labels are missing that the settings read, or given and not read. `name` is how they are
    given: a setting or an argument.
    """
    reason = f" ({args.label_setting})" if args.label_setting else ""
    if args.reads_labels and not given:
        raise ConfigError(
            f"{name} is not set, and the trainer learns from them{reason}: name a folder written by "
            "`rlkd generate-pseudolabels --out FOLDER`"
            + ("" if name == "pseudo_labels" else ", read with load_pseudolabels")
        )
    if given and not args.reads_labels:
        raise ConfigError(
            f"{name} is set, but labels have no effect{reason}: leave it out"
            + (f", or change {args.label_setting.split()[0]}" if args.label_setting else "")
        )
