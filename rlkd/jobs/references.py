"""The job of `rlkd train teacher`: a model learns the references of one's own rows, as a prompted model reads them.

What it makes is a teacher for the other jobs where no hub is. Cheap checks run before weights load.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import check_settings
from ..data.answered import Answered
from ..data.splits import held_out_inputs
from ..errors import ConfigError
from ..evaluation.task_metrics import check_task_metric, task_metric_of
from ..models.footprint import count_parameters
from ..models.spec import ModelSpec
from ..models.vocabulary import NO_LIMIT, encode_answers, encode_prompts
from ..runs.checkpoints import check_resumed_settings
from ..settings.trl_compat import ModelConfig
from ..trainers.base_arguments import require
from ..trainers.supervised import ReferenceTrainer
from ..trainers.supervised_arguments import SupervisedArguments
from .models import check_adapter_settings, load_student, student_spec
from .setup import DataArguments, split_source
from .wiring import Reading

logger = logging.getLogger(__name__)
# What only a teacher can tell of answers.
TEACHERS_SCORES = ("regret", "logprob", "match")


@dataclass
class ReferenceArguments(DataArguments):
    """Rows with right answers, and the templates under which the model reads them; each row under each template."""

    input_column: str = field(
        metadata={"help": "Column of the raw input: what the model reads without templates, and what is held out."}
    )
    reference_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the answers to learn: a text, or a list of texts, each of which is learned; null: the "
            "templates' own targets, after '|||'."
        },
    )
    task_metric: str = field(
        default="exact_match,chrf", metadata={"help": "Scores of held-out answers, as in the other jobs."}
    )
    # Of students.
    student_template: str | None = field(default=None, init=False)
    pseudo_labels: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_settings(self)
        check_task_metric(self.task_metric)
        if self.reference_column is None and not self.templates:
            raise ConfigError(
                "reference_column and templates are both unset: name the column with the answers to learn, or "
                "templates with a target after '|||'"
            )


@dataclass
class OwnModelArguments:
    """The model beside TRL's ModelConfig (model_name_or_path, dtype, use_peft, ...)."""

    random_weights: bool = field(
        default=False,
        metadata={
            "help": "Of model_name_or_path read only the configuration and the tokenizer; weights start at random."
        },
    )
    allow_bin: bool = field(
        default=False, metadata={"help": "Weights may be pickled .bin files (read with weights_only)."}
    )
    src_lang: str | None = field(
        default=None,
        metadata={"help": "Language of inputs, as a translation model's tokenizer writes it: en_XX."},
    )
    tgt_lang: str | None = field(
        default=None, metadata={"help": "Language of answers, likewise (mBART, M2M100, NLLB)."}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        require(not (self.random_weights and self.allow_bin), "allow_bin", True, "random_weights reads no weights")

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError for settings of pretrained weights where there are none."""
        for name in ("use_peft", "load_in_8bit", "load_in_4bit"):
            given = self.random_weights and getattr(model, name)
            require(not given, name, True, "the weights would stay random (random_weights): leave one of the two out")


@dataclass
class ReferenceTrainingArguments(SupervisedArguments):
    """Cross-entropy on the references; of the settings of distillation there are none."""

    objective: str = field(default="sequence", init=False)
    label_weights: str = field(default="equal", init=False)  # type: ignore[assignment]
    until_ready: bool = field(default=False, init=False)
    temperature: float = field(default=1.0, init=False)
    alpha: float | None = field(default=None, init=False)
    beta: float | None = field(default=None, init=False)
    hidden_coef: float = field(default=0.0, init=False)
    attention_coef: float = field(default=0.0, init=False)
    encoder_layer_map: list[int] | None = field(default=None, init=False)
    decoder_layer_map: list[int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        watched = (self.metric_for_best_model or "").removeprefix("eval_").removeprefix("sample_")
        require(
            watched not in TEACHERS_SCORES,
            "metric_for_best_model",
            self.metric_for_best_model,
            "takes a teacher, and there is none: name a score of task_metric, such as exact_match",
        )


def train_on_references(
    data: ReferenceArguments, own: OwnModelArguments, model: ModelConfig, training: ReferenceTrainingArguments
) -> None:
    """Train, evaluate and save the model. Raises ModelError, DataError or ConfigError, each before weights load."""
    settings = (data, own, model)
    own.check_model(model)
    spec = student_spec(model, vars(data) | vars(own))
    check_resumed_settings(training, settings)
    spec.check()
    spec.check_lengths(training.max_input_tokens, training.max_new_tokens)
    check_adapter_settings(spec, model)
    pairs, held_out, note = load_references(data, spec.tokenizer)
    lines = [note, *cut_lines(pairs, spec, training)]
    task_metric = task_metric_of(data.task_metric)
    weights = load_student(spec, model, training.seed)
    if own.random_weights:
        lines.append(f"random weights: {count_parameters(weights):,}")
    if training.process_index == 0:
        print(*lines, sep="\n")
    trainer = ReferenceTrainer(
        weights,
        training,
        tokenizer=spec.tokenizer,
        train_dataset=pairs,
        eval_examples=held_out,
        task_metric=task_metric,
    )
    trainer.run(settings)


def load_references(data: ReferenceArguments, tokenizer: Any) -> tuple[Answered, Answered, str]:
    """Pairs to learn, held-out examples, and a line on both. The inputs that are held out of `dataset` are those that
    the other jobs hold out of the same rows. Raises DataError or ConfigError.
    """
    reading = replace(Reading.of(vars(data)), tokenizers=(tokenizer,))
    source = split_source(data, data.dataset, data.train_split, data.train_limit)
    held_out = split_source(data, data.eval_dataset or data.dataset, data.eval_split, None)
    train = reading.answered(source)
    if held_out != replace(source, limit=None):
        evaluation, which = reading.answered(held_out), f"of {held_out.dataset} ({held_out.split})"
    else:
        chosen = held_out_inputs(iter(train.all_inputs), data.eval_fraction, data.dataset)
        train, evaluation = train.split(chosen)
        which = (
            f"of {len(chosen)} inputs, split off {data.dataset} (eval_fraction {data.eval_fraction:g}; equal inputs "
            "stay together; eval_dataset names rows of your own)"
        )
    pairs = train.pairs()
    return pairs, evaluation, f"to learn: {len(pairs)} answers; held out: {len(evaluation)} prompts {which}"


def cut_lines(pairs: Answered, spec: ModelSpec, training: ReferenceTrainingArguments) -> list[str]:
    """What training cuts, one line each for answers and prompts."""
    prompts = list(dict.fromkeys(pair["student_input"] for pair in pairs))
    read = encode_prompts(spec.tokenizer, prompts, NO_LIMIT, append_eos=spec.rules.end_of_prompts)
    learned = encode_answers(spec.tokenizer, [pair["label"] for pair in pairs], NO_LIMIT, spec.rules)
    found = (
        ("prompts", "max_input_tokens", "the model reads a part of them", read),
        ("answers", "max_new_tokens", "the model does not learn to end them", learned),
    )
    return [
        f"cut: {count} of {len(rows)} {what} have more than {limit} tokens ({setting}): {so}"
        for what, setting, so, rows in found
        if (count := sum(len(row) > (limit := getattr(training, setting)) for row in rows))
    ]
