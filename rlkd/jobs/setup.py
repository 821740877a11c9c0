"""The settings of the recipes, and what they name: all cheap checks run before weights load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..checks import Count, Natural, Share, check_settings
from ..choices import OnBadRow, Truncation
from ..data.examples import Examples
from ..data.files import is_pattern, splits_of
from ..data.splits import held_out_inputs, inputs_of
from ..data.text import text_format
from ..errors import ConfigError, DataError
from ..evaluation.evaluator import TaskMetric
from ..evaluation.task_metrics import check_task_metric, references_of, task_metric_of
from ..evaluation.task_reward import TaskReward
from ..io.remote import local_copy
from ..labels.makers import differences
from ..labels.store import load_pseudolabels
from ..models.signals import SignalSource
from ..models.spec import Dtype
from ..models.teacher import TemplateCombination
from ..runs.checkpoints import check_resumed_settings
from ..settings.trl_compat import ModelConfig
from ..trainers.base_arguments import DistillationArguments, check_labels
from .chat import StudentChatArguments
from .models import check_adapter_settings, load_student, student_spec
from .several import SeveralArguments, TeacherPlan, load_local, tokenizers_of
from .teachers import (
    SignalArguments,
    check_context,
    check_models,
    check_recorded_signal,
    recorded_teacher,
    refuse_other_templates,
    served_teacher,
    teacher_spec,
)
from .text_files import TextFileArguments
from .wiring import Reading, RowSource

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclass
class DataArguments(TextFileArguments, StudentChatArguments):
    """Unlabeled inputs for training, held-out inputs for evaluation, and how each model sees them."""

    dataset: str = field(
        metadata={
            "help": "Hub id, or local .jsonl, .json, .csv, .tsv, .parquet or .arrow files: one (text also .gz, .bz2, "
            ".xz, .zst), a pattern such as data/*.jsonl, or a folder."
        },
    )
    input_column: str = field(metadata={"help": "Column that the student reads."})
    dataset_subset: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of unlabeled inputs."})
    train_limit: Count | None = field(default=None, metadata={"help": "Use only the first N inputs."})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out inputs; null takes eval_split of dataset or, if it has no splits, eval_fraction of it."
        },
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of held-out inputs."})
    eval_fraction: Share = field(
        default=0.1, metadata={"help": "Share of the inputs that is held out of a dataset without splits."}
    )
    on_bad_row: OnBadRow = field(
        default="fail", metadata={"help": "Rows that cannot be read or rendered: fail, or skip and count them."}
    )
    skip_missing: bool = field(
        default=False,
        metadata={"help": "Skip rows whose prompts print a missing value (None), which are otherwise only counted."},
    )
    skip_unknown: bool = field(
        default=False,
        metadata={"help": "Skip rows with characters that the tokenizer does not know; otherwise only counted."},
    )
    reference_column: str | None = field(
        default=None,
        metadata={"help": "Column with human answers, used only by the task metric; null if there are none."},
    )
    templates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The teacher's prompt templates: dataset[:Template name] or file.yaml[:Template name]; several "
            "are combined. None: the teacher reads what the student reads."
        },
    )
    templates_dir: str | None = field(
        default=None,
        metadata={"help": "Folder, YAML file or archive of templates; null: as in `rlkd prompts list --help`."},
    )
    all_templates: bool = field(
        default=False,
        metadata={"help": "Without a template name: include templates for tasks other than the original one."},
    )
    gold_input: bool = field(default=False, metadata={"help": "Allow templates whose input contains gold columns."})
    truncation: Truncation = field(
        default="none", metadata={"help": "t0 cuts each {{...}} at 2,048 characters, as in T0's training data."}
    )
    strict_compat: bool = field(
        default=False, metadata={"help": "Let '|||' of a row split the text where promptsource does."}
    )
    column_map: list[str] = field(
        default_factory=list, metadata={"help": "Columns to rename before anything reads them: old=new[,...], or JSON."}
    )
    label_map: list[str] = field(
        default_factory=list, metadata={"help": "Labels to change, after column_map: [column:]old=new[,...], or JSON."}
    )
    student_template: str | None = field(
        default=None, metadata={"help": "One template for the student; null: it reads the raw input_column."}
    )
    pseudo_labels: str | None = field(
        default=None, metadata={"help": "Folder of `rlkd generate-pseudolabels`, for objectives that read labels."}
    )
    task_metric: str = field(
        default="none",
        metadata={
            "help": "Task metrics of greedy and sampled answers at every evaluation: none; rouge, bleu, chrf, "
            "exact_match, token_f1, sari, several separated by commas; or module:function of (predictions, examples), "
            "named scores."
        },
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if check_task_metric(self.task_metric) and self.reference_column is None:
            raise ConfigError(
                f"task_metric = {self.task_metric!r}: needs reference_column, the column with the answers to compare "
                "with. Name it, or set task_metric to none."
            )


@dataclass
class TeacherArguments(SignalArguments, SeveralArguments):
    """The prompted teacher. The student is TRL's ModelConfig (model_name_or_path, dtype, use_peft, ...)."""

    teacher: str = field(
        default="bigscience/T0_3B",
        metadata={"help": "Hub id or folder of a language model: T5, BART, Llama, Qwen, Gemma, GPT-2 ..."},
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_dtype: Dtype = field(
        default="bfloat16", metadata={"help": "Precision of the teacher; float16 is refused for T5."}
    )
    teacher_append_eos: bool | None = field(
        default=None,
        metadata={
            "help": "End the teacher's inputs with end-of-sequence: T5 and Flan-T5 yes, T0 no. null: encoder-decoders "
            "yes; decoder-only models continue their prompts."
        },
    )
    src_lang: str | None = field(
        default=None,
        metadata={"help": "Language of inputs, for both models, as a translation model's tokenizer writes it: en_XX."},
    )
    tgt_lang: str | None = field(
        default=None, metadata={"help": "Language of answers, likewise (mBART, M2M100, NLLB)."}
    )
    template_combination: TemplateCombination = field(
        default="average", metadata={"help": "Several templates: average their rewards, or pool their log-probs."}
    )
    teacher_cache_mb: Natural = field(
        default=512, metadata={"help": "Size of the cache of the teacher's prompt states, in MB."}
    )

    allow_bin: bool = field(
        default=False,
        metadata={"help": "Teacher and student may be pickled .bin files (read with weights_only)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_signal(self.template_combination)
        self.check_teachers(self.teacher, TeacherArguments.teacher)
        if self.teachers and self.teacher_signal != "model":
            raise ConfigError(f"teacher_signal = {self.teacher_signal!r}: takes one teacher, `teachers` are several")


@dataclass
class Setup:
    """What a trainer is built from."""

    student: Any
    teacher: SignalSource | None
    tokenizer: Any
    train_examples: Examples
    eval_examples: Examples
    pseudo_labels: Any
    task_metric: TaskMetric | None
    settings: tuple[Any, ...]

    def trainer_inputs(self) -> dict[str, Any]:
        """Keyword arguments that every trainer takes."""
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
    settings = (data, teacher, student)
    check_labels(training, given=data.pseudo_labels is not None, name="pseudo_labels")
    recorded = teacher.teacher_signal == "recorded"
    if recorded:
        check_recorded_signal(training)
    ours, plan = student_spec(student, vars(teacher) | vars(data)), TeacherPlan.of(teacher, training)
    theirs = None if recorded or plan else teacher_spec(vars(teacher), training, ours)
    check_resumed_settings(training, settings)
    said = plan.check(ours, training) if plan else [check_models(theirs, ours, training)]
    check_adapter_settings(ours, student)
    task_reward = _task_reward(data, training)
    train, evaluation, labels, note = load_data(
        data,
        [ours.tokenizer, *tokenizers_of(plan or theirs)],
        references=task_reward is not None,
        same_templates=recorded,
        teacher_column=teacher.teacher_column,
    )
    frozen: SignalSource | None = None
    if plan:
        plan.divide(train, evaluation)
    elif theirs is None:
        frozen = recorded_teacher(labels, training, ours.tokenizer)
    elif theirs.model.served:
        frozen = served_teacher(theirs, ours, teacher.server, training)
    elif teacher.teacher_signal == "base":
        check_context(train, theirs, ours)
    if task_reward is not None:
        task_reward.try_on(train)
    task_metric = task_metric_of(data.task_metric)
    if check_task_metric(data.task_metric):
        rows = len(evaluation) if training.eval_limit is None else min(training.eval_limit, len(evaluation))
        references_of(evaluation[:rows])
    if training.process_index == 0:
        same = not (data.templates or teacher.teacher_system_prompt)
        lines = (note, "no templates: the teacher reads what the student reads" if same else None, *said)
        print(*filter(None, lines), sep="\n")

    model = load_student(ours, student, training.seed)
    return Setup(
        student=model,
        teacher=frozen or load_local(plan or theirs, ours, teacher, model),
        tokenizer=ours.tokenizer,
        train_examples=train,
        eval_examples=evaluation,
        pseudo_labels=labels,
        task_metric=task_metric,
        settings=settings,
    )


def _task_reward(data: DataArguments, training: DistillationArguments) -> TaskReward | None:
    """The task reward that the settings name. Raises ConfigError if it needs references and there are none."""
    name = getattr(training, "task_reward", None)
    task_reward = None if name is None else TaskReward.of(name)
    if task_reward is not None and task_reward.needs_references and data.reference_column is None:
        raise ConfigError(
            f"task_reward = {name!r}: needs reference_column, the column with the answers to compare with. Name it, or "
            "take module:function with one that needs none."
        )
    return task_reward


def load_data(
    data: DataArguments,
    tokenizers: Sequence[Any] = (),
    *,
    references: bool = False,
    same_templates: bool = False,
    teacher_column: str | None = None,
) -> tuple[Examples, Examples, Any, str]:
    """Training and evaluation examples, the pseudo-labels if requested, and a line on the held-out inputs; columns are
    checked. An input that is held out of `dataset` is in neither training examples nor pseudo-labels.

    tokenizers: to count the characters that one of them does not know. references: whether training reads them.
    same_templates: whether labels must have been made under the templates of the settings. teacher_column: read too.
    Raises DataError or ConfigError.
    """
    reading = replace(Reading.of(vars(data)), tokenizers=tuple(tokenizers), teacher_column=teacher_column)
    source = split_source(data, data.dataset, data.train_split, data.train_limit)
    labels = None if data.pseudo_labels is None else _labels(data, reading, source, same_templates)
    held_out = split_source(data, data.eval_dataset or data.dataset, data.eval_split, None)
    if held_out != replace(source, limit=None):
        # Without a task reward, training never looks at references.
        training = reading if references else replace(reading, reference_column=None)
        train, evaluation = training.examples(source), reading.examples(held_out)
        return train, evaluation, labels, f"held out: {len(evaluation)} inputs of {held_out.dataset} ({held_out.split})"
    whole = reading.examples(source)
    chosen = held_out_inputs(whole.inputs(), data.eval_fraction, data.dataset)
    train, evaluation = whole.split(chosen, references=references)
    note = (
        f"held out: {len(evaluation)} of {len(train) + len(evaluation)} inputs of {data.dataset}, split off "
        f"(eval_fraction {data.eval_fraction:g}; equal inputs stay together; eval_dataset names rows of your own)"
    )
    if labels is not None:
        kept = [i for i, texts in enumerate(inputs_of(labels)) if texts not in chosen]
        note += f"; {len(labels) - len(kept)} of {len(labels)} labels are of held-out inputs and are left out"
        if not kept:
            raise DataError(f"{data.pseudo_labels} has labels of held-out inputs only: set eval_dataset.")
        labels = labels.select(kept)
    return train, evaluation, labels, note


def split_source(data: DataArguments, dataset: str, split: str, limit: int | None) -> RowSource:
    """The rows of a split; a local source whose files are not named by split has one."""
    path = local_copy(dataset)
    local = path.exists() or is_pattern(dataset)
    return RowSource(
        dataset,
        "train" if local and split not in splits_of(path) else split,
        None if local and dataset != data.dataset else data.dataset_subset,
        limit,
        text_format(vars(data), beside=data.dataset, path=dataset),
        data.on_bad_row,
    )


def _labels(data: DataArguments, reading: Reading, train: RowSource, same_templates: bool) -> datasets.Dataset:
    """The labels to learn; warns where they were made otherwise than the settings say."""
    labels = load_pseudolabels(str(data.pseudo_labels))
    if not len(labels):
        raise DataError(
            f"pseudo_labels = {data.pseudo_labels!r}: none of its rows has a label (status ok). Its README.md says why."
        )
    student = reading.student_template
    settings = {"input": reading.input_column, "row_map": reading.row_map.to_json(),
                "student_template": student.source if student else None}  # fmt: skip
    if local_copy(data.dataset).exists() or is_pattern(data.dataset):
        settings |= {"sha256": train.stream(()).identity()["sha256"]}
    found = differences(labels, dataset=data.dataset, templates=reading.templates, settings=settings)
    if same_templates:
        refuse_other_templates(found, str(data.pseudo_labels))
    if found:
        logger.warning(
            "%s: the labels were made otherwise than this run's settings say; they count for training, the settings "
            "for evaluation:\n%s", data.pseudo_labels, "\n".join(found)
        )  # fmt: skip
    return labels
