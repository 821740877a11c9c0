"""The settings of `rlkd distill`."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import Count, Share, check_settings
from ..choices import OnBadRow
from ..errors import ConfigError
from ..evaluation.task_metrics import check_task_metric
from ..jobs.chat import StudentChatArguments, TeacherChatArguments
from ..jobs.text_files import TextFileArguments
from ..models.spec import Dtype

SMALL = "small"


@dataclass(kw_only=True)
class DistillArguments(TextFileArguments, TeacherChatArguments, StudentChatArguments):
    """What to distil, and from what; everything else has a default that is a rule (docs/distill.md)."""

    teacher: str = field(metadata={"help": "The prompted teacher: hub id or folder of a language model."})
    student: str = field(
        metadata={
            "help": "What is trained: hub id or folder of a language model or of an encoder (BERT ...), or small: a "
            "third of the teacher's layers."
        }
    )
    data: str = field(
        metadata={"help": "Rows without labels: a .csv, .tsv, .jsonl, .parquet ... file, a folder, a hub id."}
    )
    input_column: str = field(metadata={"help": "Column that the student reads."})
    out: str = field(metadata={"help": "Folder of the whole run; the same command continues it."})
    prompt: str | None = field(
        default=None, metadata={"help": "What the teacher reads: a text with columns, 'Summarise: {{ text }}' (jinja)."}
    )
    answer_choices: str | None = field(
        default=None,
        metadata={"help": "Answers that the prompt allows, with ||| between; an encoder's labels."},
    )
    templates: list[str] = field(
        default_factory=list,
        metadata={"help": "Templates in place of prompt: file.yaml[:name] or dataset[/subset][:name] of promptsource."},
    )
    student_template: str | None = field(
        default=None, metadata={"help": "One template for the student; null: it reads the raw input_column."}
    )
    column_map: list[str] = field(
        default_factory=list, metadata={"help": "Columns to rename before anything reads them: old=new[,...], or JSON."}
    )
    reference_column: str | None = field(
        default=None, metadata={"help": "Column with right answers, which only evaluations read; null: there are none."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "Score against the references: rouge, bleu, chrf, exact_match, token_f1, sari, or module:function; "
            "null: rouge (of encoders, accuracy)."
        },
    )
    test_data: str | None = field(
        default=None,
        metadata={"help": "Rows of the last evaluation; null: split off data. None of them is trained on."},
    )
    eval_fraction: Share = field(
        default=0.1,
        metadata={"help": "Share of the inputs that is held out as validation rows, and as many as test rows."},
    )
    eval_rows: Count = field(default=500, metadata={"help": "Largest number of validation inputs, and of test inputs."})
    limit: Count | None = field(default=None, metadata={"help": "Use only the first N rows."})
    on_bad_row: OnBadRow = field(
        default="fail", metadata={"help": "Rows that cannot be read or rendered: fail, or skip and count them."}
    )
    max_input_tokens: Count = field(default=512, metadata={"help": "Prompts are cut to this many tokens."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Answers are cut to this many tokens."})
    teacher_dtype: Dtype | None = field(
        default=None, metadata={"help": "Precision of the teacher; null: bfloat16 on a GPU, else float32."}
    )
    input_eos: bool | None = field(
        default=None,
        metadata={"help": "End the teacher's prompts with end-of-sequence (T0: false); null: encoder-decoders yes."},
    )
    allow_bin: bool = field(
        default=False, metadata={"help": "Models may be pickled .bin files (read with weights_only)."}
    )
    weak_start: Literal["warn", "refuse"] = field(
        default="warn",
        metadata={"help": "If the warmed-up student is weak for RL: warn and train, or refuse, which leaves RL out."},
    )
    warm_up: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of the warm-up, as of `rlkd train seqkd` (encoders: tkd)."}
    )
    rl: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of RL, as of `rlkd train ppo`."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of training, and of templates with random choices."})
    dry_run: bool = field(
        default=False, metadata={"help": "Only list the stages, their sizes, time and disk; nothing is written."}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("prompt is empty: write what the teacher reads, such as 'Summarise: {{ text }}'")
        if (self.prompt is None) == (not self.templates):
            which = "both set" if self.templates else "both unset"
            raise ConfigError(
                f"prompt and templates are {which}: give one, a text such as 'Summarise: {{{{ text }}}}', or the name "
                "of a template"
            )
        if self.answer_choices is not None and self.prompt is None:
            raise ConfigError("answer_choices go with prompt: templates have their own")
        if self.metric is not None and self.reference_column is None:
            raise ConfigError(f"metric = {self.metric!r}: needs reference_column, the column with the right answers")
        if self.metric == "none":
            raise ConfigError("metric = 'none': leave it and reference_column out")
        check_task_metric(self.task_metric)
        for name in ("warm_up", "rl"):
            setattr(self, name, _mapping(name, getattr(self, name)))

    @property
    def task_metric(self) -> str:
        """The metric of generating students."""
        return "none" if self.reference_column is None else self.metric or "rouge"


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """Settings of a stage, from YAML, or from a flag in JSON. Raises ConfigError."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f'{name} = {value!r}: must be a mapping of settings; as a flag, JSON: {{"learning_rate": 1e-4}}'
        )
    return value or {}
