"""The settings of the labelled rows that an encoder-only student learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from ..checks import Count, OneOf, Share, check_settings
from ..choices import OnBadRow, ProblemType
from ..data.glue import TASKS, find_task
from ..errors import ConfigError
from ..evaluation.problems import CLASSIFICATION_METRICS, PROBLEMS
from ..metrics import held_out
from .encoder_label_folder import parse_choice_labels
from .text_files import TextFileArguments


@dataclass
class LabelledDataArguments(TextFileArguments):
    """Labelled sentences or pairs: a task from the hub, or your own files, which take precedence."""

    task: Annotated[str, OneOf(TASKS)] | None = field(
        default=None, metadata={"help": "A GLUE task or another labelled data set, read from the hub."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Your own .csv, .tsv, .jsonl or .parquet file, instead of a task."}
    )
    dev_file: str | None = field(default=None, metadata={"help": "Held-out rows; null splits them off train_file."})
    on_bad_row: OnBadRow = field(
        default="fail", metadata={"help": "Rows that cannot be read: fail, or skip and count them."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of train_file with the sentence, or with its list of words."}
    )
    pair_column: str | None = field(default=None, metadata={"help": "Column with the second sentence of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, a name or a number."})
    problem_type: ProblemType | None = field(
        default=None,
        metadata={
            "help": "What label_column holds: one label, lists of labels, numbers, a tag for each word; null: the "
            "task's, else one."
        },
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What separates the names in label_column, where lists are written as text."}
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "Label names in the order of their indices; null finds them in train_file."}
    )
    metrics: list[Annotated[str, OneOf(CLASSIFICATION_METRICS)]] | None = field(
        default=None,
        metadata={"help": "Dev metrics; their mean is `score`. null: the task's, or the problem's."},
    )
    dev_fraction: Share = field(default=0.1, metadata={"help": "Share of (each label's) rows that is split off."})
    dev_seed: int = field(default=0, metadata={"help": "Seed of that split, independent of the training seed."})
    pseudo_labels: str | None = field(
        default=None,
        metadata={"help": "Folder of labels made with --strategy rank: the teacher, and the training rows."},
    )
    choice_labels: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The label that each answer choice stands for; null: that of its name."}
    )
    content_free_labels: str | None = field(
        default=None, metadata={"help": "Folder of the same teacher's labels of content-free inputs, to calibrate by."}
    )
    test_files: list[str] = field(
        default_factory=list, metadata={"help": "Further labelled rows, which only the final table scores."}
    )
    train_limit: Count | None = field(default=None, metadata={"help": "Use only the first N rows."})
    dev_limit: Count | None = field(default=None, metadata={"help": "Use only the first N held-out rows."})

    def __post_init__(self) -> None:
        check_settings(self)
        self.choice_labels = parse_choice_labels(self.choice_labels)
        self._check_problem()
        if self.pseudo_labels is not None:
            self._check_pseudo_labels()
            return
        for name in ("choice_labels", "content_free_labels"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} is set without pseudo_labels, which it describes")
        if self.train_file is None:
            if self.task is None:
                raise ConfigError(
                    "none of task, train_file and pseudo_labels is set: name a task (sst2, rte, ...) or your own file"
                )
            if self.dev_file is not None:
                raise ConfigError("dev_file is set without train_file: a task brings its own held-out rows")
            for name in ("pair_column", "labels"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is set without train_file: task {self.task} has its own")

    @property
    def problem(self) -> ProblemType:
        """What the labels are."""
        task = None if self.task is None or self.train_file is not None else find_task(self.task)
        return self.problem_type or (task.problem_type if task else "single_label_classification")

    def _check_problem(self) -> None:
        kind = self.problem
        if self.task is not None and self.train_file is None and find_task(self.task).problem_type != kind:
            raise ConfigError(
                f"problem_type = {kind!r}: task {self.task} is of {find_task(self.task).problem_type}. Leave it out."
            )
        if self.pseudo_labels is not None and kind != "single_label_classification":
            raise ConfigError(
                f"problem_type is {kind} and pseudo_labels is set: its scores of answer choices are one label a row. "
                "Leave one of them out."
            )
        if self.label_separator is not None and (kind != "multi_label_classification" or not self.label_separator):
            raise ConfigError(
                f"label_separator = {self.label_separator!r}: separates the labels of a row, under problem_type: "
                "multi_label_classification alone, and is not empty. Leave it out, or set that."
            )
        if self.pair_column is not None and kind == "token_classification":
            raise ConfigError(
                "pair_column is set, and problem_type is token_classification, of single texts: leave it out"
            )
        if self.labels is not None and kind == "regression":
            raise ConfigError("labels is set, and problem_type is regression, which has none. Leave it out.")
        allowed = [name for name in PROBLEMS[kind].scores if not held_out(name).lower_is_better]
        for name in self.metrics or ():
            if name not in allowed:
                raise ConfigError(
                    f"metrics: {name}: under problem_type {kind}, {', '.join(allowed)} are allowed, whose mean is "
                    f"`score`; {', '.join(PROBLEMS[kind].always)} are measured in any case."
                )

    def _check_pseudo_labels(self) -> None:
        """dev rows come from dev_file, from task, or from the folder's own gold labels."""
        if self.train_file is not None:
            raise ConfigError(
                "pseudo_labels and train_file are both set: each brings the training rows. Leave one out."
            )
        if self.dev_file is not None and self.task is not None:
            raise ConfigError(
                "dev_file and task are both set beside pseudo_labels: each brings dev rows. Leave one out."
            )
        if self.pair_column is not None:
            raise ConfigError("pair_column is set beside pseudo_labels, whose rows are single texts: leave it out")
        if self.task is not None and self.labels is not None:
            raise ConfigError(f"labels is set beside task {self.task}, which has its own")
