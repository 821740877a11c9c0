"""From settings to loaded models and data, for the recipes: everything that can fail cheaply fails before weights
load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checks import Count, Natural, check_settings
from ..data.examples import Examples
from ..data.row_maps import parse_row_map
from ..data.rows import check_columns, load_rows
from ..errors import ConfigError
from ..evaluation.evaluator import TaskMetric
from ..evaluation.task_metrics import TASK_METRICS
from ..labels.pseudolabels import load_pseudolabels
from ..models.architectures import architecture_of, language_model
from ..models.loading import check_config, load_config, load_model, resolve_dtype
from ..models.teacher import Teacher
from ..models.vocabulary import check_same_vocabulary, check_vocabulary_fits, load_tokenizer
from ..runs.checkpoints import check_resumed_settings
from ..settings.trl_compat import ModelConfig, get_peft_config, get_quantization_config
from ..templates.template import load_templates
from ..trainers.arguments import DistillationArguments


@dataclass
class DataArguments:
    """Unlabeled inputs for training, held-out inputs for evaluation, and how each model sees them."""

    dataset: str = field(
        default="knkarthick/dialogsum", metadata={"help": "Hub id, or a local .jsonl / .csv / .tsv / .parquet file."}
    )
    dataset_subset: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of unlabeled inputs."})
    train_limit: Count | None = field(default=None, metadata={"help": "Use only the first so many inputs."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out inputs; null takes eval_split of dataset."}
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of held-out inputs."})
    input_column: str = field(default="dialogue", metadata={"help": "Column the student reads."})
    reference_column: str | None = field(
        default="summary",
        metadata={"help": "Column with human answers, for the task metric only; null if there are none."},
    )
    templates: list[str] = field(
        default_factory=lambda: ["dialogsum"],
        metadata={
            "help": "What the teacher is asked: dataset[:Template name] or file.yaml[:Template name]; several are "
            "combined."
        },
    )
    templates_dir: str | None = field(
        default=None, metadata={"help": "Folder, YAML file or archive of templates; null: `rlkd prompts --help`."}
    )
    all_templates: bool = field(
        default=False, metadata={"help": "With no name: also templates of other than the original task."}
    )
    gold_input: bool = field(default=False, metadata={"help": "Allow templates whose input shows gold columns."})
    truncation: Literal["none", "t0"] = field(
        default="none", metadata={"help": "t0 cuts each {{...}} at 2,048 characters, as T0's training data were."}
    )
    strict_compat: bool = field(
        default=False, metadata={"help": "Let a '|||' inside a row's lists split the text, as promptsource."}
    )
    column_map: list[str] = field(
        default_factory=list, metadata={"help": "Columns to rename first: old=new[,...], or JSON."}
    )
    label_map: list[str] = field(
        default_factory=list, metadata={"help": "Labels to change then: [column:]old=new[,...], or JSON."}
    )
    student_template: str | None = field(
        default=None, metadata={"help": "One template for the student; null gives it the raw input_column."}
    )
    pseudo_labels: str | None = field(
        default=None, metadata={"help": "Folder written by `rlkd generate-pseudolabels` (supervised recipes)."}
    )
    task_metric: Literal["none", "rouge", "bleu", "exact_match"] = field(
        default="none", metadata={"help": "Scored on greedy and sampled answers at every evaluation."}
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class TeacherArguments:
    """The prompted teacher. The student is TRL's ModelConfig (model_name_or_path, dtype, use_peft, ...)."""

    teacher: str = field(
        default="bigscience/T0_3B", metadata={"help": "Hub id or folder of a T5- or BART-family model."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Precision of the teacher; float16 is refused for T5."}
    )
    teacher_append_eos: bool = field(
        default=True, metadata={"help": "End the teacher's inputs with end-of-sequence: T5 and Flan-T5 yes, T0 no."}
    )
    template_combination: Literal["average", "pool"] = field(
        default="average", metadata={"help": "Several templates: average their rewards, or pool their log-probs."}
    )
    teacher_cache_mb: Natural = field(
        default=512, metadata={"help": "Room for the teacher's encoder states of prompts seen."}
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class Setup:
    """What a trainer is built from."""

    student: Any
    teacher: Teacher
    tokenizer: Any
    train_examples: Examples
    eval_examples: Examples
    pseudo_labels: Any
    task_metric: TaskMetric | None
    settings: tuple[Any, ...]

    def trainer_inputs(self) -> dict[str, Any]:
        """Keyword arguments every trainer takes."""
        return {
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "eval_examples": self.eval_examples,
            "task_metric": self.task_metric,
        }


def prepare(
    data: DataArguments, teacher: TeacherArguments, student: ModelConfig, training: DistillationArguments
) -> Setup:
    """Check names, settings, vocabularies, files, columns and templates; then load weights.

    Raises ModelError, DataError or ConfigError, each before any weights load; among them that of a checkpoint to resume
    that was written with other settings.
    """
    name = student.model_name_or_path
    if not name:
        raise ConfigError("model_name_or_path is not set: name the student, e.g. google-t5/t5-base")
    if student.use_peft:
        config = load_config(name, "student", student.model_revision)
        student.lora_task_type = architecture_of(config, "student", name).lora_task_type
    settings = (data, teacher, student)
    check_resumed_settings(training, settings)
    tokenizer = _check_models(teacher, student, name)
    train, evaluation, labels = _load_data(data)

    model = load_model(
        name,
        "student",
        dtype=_student_dtype(student),
        revision=student.model_revision,
        attention=student.attn_implementation,
        quantization=get_quantization_config(student),
    )
    if student.use_peft:
        from peft import get_peft_model

        model = get_peft_model(model, get_peft_config(student))  # type: ignore[arg-type]
    frozen = load_model(teacher.teacher, "teacher", dtype=teacher.teacher_dtype, revision=teacher.teacher_revision)
    frozen.to(training.device)
    return Setup(
        model,
        Teacher(
            language_model(frozen, tokenizer),
            tokenizer,
            max_input_tokens=training.max_input_tokens,
            append_eos=teacher.teacher_append_eos,
            combination=teacher.template_combination,
            cache_bytes=teacher.teacher_cache_mb * 2**20,
        ),
        tokenizer,
        train,
        evaluation,
        labels,
        TASK_METRICS.get(data.task_metric),
        settings,
    )


def _check_models(teacher: TeacherArguments, student: ModelConfig, name: str) -> Any:
    """Configurations and tokenizers of both models; returns the shared tokenizer."""
    configs = {}
    for role, model, dtype in (
        ("teacher", teacher.teacher, teacher.teacher_dtype),
        ("student", name, _student_dtype(student)),
    ):
        configs[role] = load_config(
            model, role, teacher.teacher_revision if role == "teacher" else student.model_revision
        )
        check_config(configs[role], role, model, resolve_dtype(dtype, f"{role}_dtype"))
    tokenizer = load_tokenizer(name, "student", student.model_revision)
    size = check_same_vocabulary(
        load_tokenizer(teacher.teacher, "teacher", teacher.teacher_revision), tokenizer, teacher.teacher, name
    )
    check_vocabulary_fits(configs["teacher"], size, "teacher", teacher.teacher)
    check_vocabulary_fits(configs["student"], size, "student", name)
    return tokenizer


def _student_dtype(student: ModelConfig) -> str:
    return student.dtype if student.dtype not in (None, "auto") else "float32"


def _load_data(data: DataArguments) -> tuple[Examples, Examples, Any]:
    """Rows, templates and pseudo-labels, with every column checked."""
    reading: dict[str, Any] = {
        "folder": Path(data.templates_dir) if data.templates_dir else None,
        **{name: getattr(data, name) for name in ("all_templates", "gold_input", "truncation", "strict_compat")},
    }
    row_map = parse_row_map(data.column_map, data.label_map)
    templates = [template for spec in data.templates for template in load_templates(spec, **reading)]
    student_template = None
    if data.student_template is not None:
        found = load_templates(data.student_template, **reading)
        if len(found) != 1:
            raise ConfigError(
                f"student_template = {data.student_template!r} names {len(found)} templates: add one's name after a "
                f"colon"
            )
        student_template = found[0]
    sources = {
        "train": (data.dataset, data.train_split, data.train_limit),
        "evaluation": (data.eval_dataset or data.dataset, data.eval_split, None),
    }
    examples = {}
    for part, (source, split, limit) in sources.items():
        split = "train" if Path(source).exists() else split
        rows = row_map.dataset(load_rows(source, split=split, subset=data.dataset_subset, limit=limit))
        wanted = {"input_column": data.input_column}
        # Training never looks at references.
        reference = data.reference_column if part == "evaluation" else None
        if reference is not None:
            wanted["reference_column"] = reference
        check_columns(rows, wanted, source)
        examples[part] = Examples(
            rows,
            templates,
            student_column=data.input_column,
            student_template=student_template,
            reference_column=reference,
            source=source,
        )
    labels = load_pseudolabels(Path(data.pseudo_labels)) if data.pseudo_labels is not None else None
    return examples["train"], examples["evaluation"], labels
