"""The settings of the recipe of encoder-only students, and what they name: everything that needs no weights is checked
before weights load, and a finished teacher is never fine-tuned again.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import set_seed

from ..checks import Count, Positive, check_choice, check_settings
from ..choices import ProblemType
from ..errors import ConfigError, ModelError
from ..models.encoders.classifiers import Init, build_student, check_length, labelled_config, pretrained_student
from ..models.encoders.labels import (
    OF_WORDS,
    auto_class,
    check_problem,
    give_labels,
    head_for,
    head_of,
    label_names,
    problem_of,
)
from ..models.encoders.onnx_export import require_onnx
from ..models.encoders.rehearsal import is_encoder, rehearse
from ..models.encoders.words import reading_words
from ..models.loading import check_saved_weights, load_config, load_pretrained
from ..models.vocabulary import load_tokenizer
from ..runs.checkpoints import check_resumed_settings
from ..trainers.encoders.arguments import TKDArguments
from ..trainers.encoders.checks import check_distillation, check_recorded_teacher, check_settings_of
from .encoder_data import LabelledData, load_labelled_data
from .encoder_data_arguments import LabelledDataArguments

logger = logging.getLogger(__name__)

DEFAULT_LAYERS = 3


@dataclass
class EncoderTeacherArguments:
    """The teacher: a pretrained encoder that is fine-tuned here first, or one that is already fine-tuned."""

    teacher: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "Hub id or folder of a BERT-type model."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_finetuned: bool = field(
        default=False, metadata={"help": "The teacher is already fine-tuned on this task: use it as is."}
    )
    teacher_epochs: Positive = field(
        default=3.0, metadata={"help": "Epochs of its fine-tuning; the best checkpoint on dev is kept."}
    )
    teacher_learning_rate: Positive = field(default=2e-5, metadata={"help": "Peak learning rate of its fine-tuning."})

    allow_bin: bool = field(
        default=False,
        metadata={"help": "Teacher and student_pretrained may be pickled .bin files (read with weights_only)."},
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class EncoderStudentArguments:
    """The student, made of layers of the teacher or narrower, and the formats it is saved in."""

    student_layers: Count | None = field(
        default=None, metadata={"help": "Layers of the student; null: 3, or with pseudo_labels all of the pretrained."}
    )
    assistant_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Layers of teacher assistants, each taught by the one before, the last teaches the student."},
    )
    student_width: int | None = field(
        default=None,
        metadata={"help": "Width of a narrower student, with heads as wide as the teacher's (init random)."},
    )
    student_init: Init = field(
        default="mapped",
        metadata={"help": "Weights: the teacher's matched or first layers, another model's, or random."},
    )
    student_pretrained: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model for student_init: pretrained."}
    )
    export_onnx: bool = field(default=False, metadata={"help": "Also write the student as ONNX, in output_dir/onnx."})

    def __post_init__(self) -> None:
        check_settings(self)
        chain = [*self.assistant_layers, self.student_layers or DEFAULT_LAYERS]
        if self.assistant_layers and sorted(set(chain), reverse=True) != chain:
            raise ConfigError(
                f"assistant_layers = {self.assistant_layers}: each assistant, and then the student of "
                f"{chain[-1]} layers, must have fewer layers than the one before"
            )

    @property
    def assistants(self) -> list[EncoderStudentArguments]:
        """The settings of each assistant: the student's, with its number of layers and the teacher's width."""
        return [
            replace(self, student_layers=layers, student_width=None, assistant_layers=[])
            for layers in self.assistant_layers
        ]

    def options(self, teacher_config: Any, layer_map: list[int] | None) -> dict[str, Any]:
        """Keyword arguments of `build_student` and `student_config`. Raises ConfigError for a width without heads."""
        shape: dict[str, Any] = {}
        if self.student_width is not None:
            width, inner = teacher_config.hidden_size, getattr(teacher_config, "intermediate_size", None)
            head = width // teacher_config.num_attention_heads
            if self.student_width < head or self.student_width % head:
                raise ConfigError(f"student_width = {self.student_width}: must be a multiple of a head's width, {head}")
            shape = {
                "hidden_size": self.student_width,
                "attention_heads": self.student_width // head,
                "intermediate_size": inner and inner * self.student_width // width,
            }
        return {
            "layers": self.student_layers or DEFAULT_LAYERS,
            "init": self.student_init,
            "layer_map": layer_map,
            "pretrained": self.student_pretrained,
            **shape,
        }


@dataclass
class EncoderSetup:
    """What the job needs: settings, checked data and tokenizers; no weights yet.

    teacher_config is None where the training rows bring the teacher's logits.
    """

    data: LabelledData
    teacher: EncoderTeacherArguments
    student: EncoderStudentArguments
    training: TKDArguments
    teacher_config: Any
    tokenizer: Any
    teacher_tokenizer: Any
    settings: tuple[Any, ...]

    @property
    def teacher_folder(self) -> str:
        """Where the fine-tuned teacher is: a folder of the run, or the one that was given."""
        return self.teacher.teacher if self.teacher.teacher_finetuned else f"{self.training.output_dir}/teacher"

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that there are: teacher and student, or the student alone."""
        return ("student",) if self.data.recorded else ("teacher", "student")

    def load_teacher(self, name: str) -> Any:
        """A classifier in float32 with the labels of this task."""
        return load_pretrained(
            auto_class(self.teacher_config),
            name,
            "teacher",
            config=copy.deepcopy(self.teacher_config),
            revision=self.teacher.teacher_revision if name == self.teacher.teacher else None,
            allow_bin=self.teacher.allow_bin,
            needs="all" if name == self.teacher_folder else "layers",  # a head of another task is replaced
            dtype=torch.float32,
        )

    def new_student(self, teacher: Any) -> Any:
        """The student before training, made from its teacher; the same one for the same seed."""
        set_seed(self.training.seed)
        if self.data.recorded:
            name = str(self.student.student_pretrained)
            config = labelled_config(name, self.student.student_layers, self.data.labels)
            return pretrained_student(name, config, self.teacher.allow_bin)
        return build_student(
            teacher, allow_bin=self.teacher.allow_bin, **self.student.options(teacher.config, self.training.layer_map)
        )

    def trainer_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the `TKDTrainer` that distils."""
        return {
            "tokenizer": self.tokenizer,
            "teacher_tokenizer": self.tokenizer if self.student.assistant_layers else self.teacher_tokenizer,
            "train_rows": self.data.train,
            "eval_rows": self.data.first_dev,
            "compute_metrics": self.data.compute_metrics(),
        }


def load_saved_student(folder: str) -> Any:
    """A trained student as it is on disk, in float32."""
    config = load_config(folder, "student")
    return load_pretrained(auto_class(config), folder, "student", config=config, dtype=torch.float32, needs="all")


def prepare_encoders(
    data: LabelledDataArguments,
    teacher: EncoderTeacherArguments,
    student: EncoderStudentArguments,
    training: TKDArguments,
) -> EncoderSetup:
    """Check settings, data, configurations and tokenizers against one another. Loads no weights.

    Raises ConfigError, DataError or ModelError.
    """
    settings = (data, teacher, student)
    check_resumed_settings(training, settings)
    if student.export_onnx:
        require_onnx()
    if student.assistant_layers and training.layer_map is not None:
        raise ConfigError(
            "layer_map is set beside assistant_layers: it cannot fit every pair of the chain. Leave it out."
        )
    if data.pseudo_labels is not None:
        return _prepare_labels(data, teacher, student, training)
    config = load_config(teacher.teacher, "teacher", teacher.teacher_revision)
    check_settings_of(data.problem, training)
    teacher_tokenizer = _tokenizer(teacher.teacher, "teacher", data, teacher.teacher_revision)
    _check_encoder(config, teacher_tokenizer, teacher, problem=data.problem)
    if teacher.teacher_finetuned:
        check_problem(config, "teacher", data.problem, teacher.teacher)
    names = label_names(config) if teacher.teacher_finetuned else ()
    loaded = load_labelled_data(data, names)
    if training.process_index == 0:
        print(f"held out: {loaded.note}")
    if teacher.teacher_finetuned and config.num_labels != len(loaded.labels):
        raise ModelError(
            f"teacher '{teacher.teacher}' has {config.num_labels} labels, and {loaded.name} has {len(loaded.labels)} "
            f"({', '.join(loaded.labels)}). It was fine-tuned on another task."
        )
    if teacher.teacher_finetuned and problem_of(config) != data.problem:
        logger.warning(
            "teacher '%s' does not say what its outputs are (problem_type in config.json): they are taken for those of "
            "%s.", teacher.teacher, data.problem,
        )  # fmt: skip
    if teacher.teacher_finetuned and not names and len(loaded.labels) > 1:
        logger.warning(
            "teacher '%s' does not name its labels: its outputs are taken for %s, in this order. If it was fine-tuned "
            "with another order, set labels.", teacher.teacher, ", ".join(loaded.labels),
        )  # fmt: skip
    give_labels(config, loaded.labels, loaded.problem_type)
    tokenizer = teacher_tokenizer
    if student.student_init == "pretrained" and student.student_pretrained is not None:
        tokenizer = _tokenizer(student.student_pretrained, "student", data)
    _check_best(training, loaded)
    above, reads = config, teacher_tokenizer
    for one in [*student.assistants, student]:
        own = rehearse(
            above,
            one.options(above, training.layer_map),
            needs={"teacher": (training.teacher_needs | training.cached) - {"logits"},
                   "student": training.student_needs},
            token_types={"teacher": _token_types(reads, loaded), "student": _token_types(tokenizer, loaded)},
            gradient_checkpointing=bool(training.gradient_checkpointing),
        )  # fmt: skip
        check_distillation(training, own, above, tokenizer, reads)
        above, reads = own, tokenizer
    check_saved_weights(teacher.teacher, "teacher", teacher.teacher_revision, allow_bin=teacher.allow_bin)
    if student.student_init == "pretrained":
        check_saved_weights(str(student.student_pretrained), "student", allow_bin=teacher.allow_bin)
    return EncoderSetup(loaded, teacher, student, training, config, tokenizer, teacher_tokenizer, settings)


def _tokenizer(name: str, role: str, data: LabelledDataArguments, revision: str | None = None) -> Any:
    tokenizer = load_tokenizer(name, role, revision)
    return reading_words(tokenizer, role, name) if data.problem == "token_classification" else tokenizer


def _check_best(training: TKDArguments, data: LabelledData) -> None:
    best = (training.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["score", *data.measured, "loss"]
    check_choice("metric_for_best_model", best, known)


def _prepare_labels(
    data: LabelledDataArguments,
    teacher: EncoderTeacherArguments,
    student: EncoderStudentArguments,
    training: TKDArguments,
) -> EncoderSetup:
    """As `prepare_encoders`, for a student of recorded logits: there is no teacher to take layers from."""
    given = [name for name, value in vars(teacher).items() if name != "allow_bin" and value != getattr(
        EncoderTeacherArguments, name)]  # fmt: skip
    if given:
        raise ConfigError(f"{given[0]} is set beside pseudo_labels, which are the teacher: leave it out")
    if student.student_init != "pretrained" or student.student_pretrained is None:
        raise ConfigError(
            "pseudo_labels has no encoder that gives the student its layers. Set student_init: pretrained and "
            "student_pretrained: a model such as microsoft/MiniLM-L12-H384-uncased."
        )
    if student.assistant_layers or student.student_width is not None:
        name = "assistant_layers" if student.assistant_layers else "student_width"
        raise ConfigError(f"{name} needs an encoder as teacher, and pseudo_labels is set: leave it out")
    if training.layer_map is not None:
        raise ConfigError("layer_map matches layers of an encoder, and pseudo_labels has none: leave it out")
    check_recorded_teacher(training)
    name = student.student_pretrained
    tokenizer = load_tokenizer(name, "student")
    _check_encoder(load_config(name, "student"), tokenizer, replace(teacher, teacher=name), "student")
    loaded = load_labelled_data(data)
    if training.process_index == 0:
        print(f"held out: {loaded.note}")
    _check_best(training, loaded)
    config = labelled_config(name, student.student_layers, loaded.labels)
    check_length(training.max_length, config, "student")
    rehearse(
        config,
        {"layers": config.num_hidden_layers, "init": "pretrained", "pretrained": name},
        token_types={role: _token_types(tokenizer, loaded) for role in ("teacher", "student")},
        gradient_checkpointing=bool(training.gradient_checkpointing),
    )
    check_saved_weights(name, "student", allow_bin=teacher.allow_bin)
    return EncoderSetup(loaded, teacher, student, training, None, tokenizer, None, (data, teacher, student))


def _token_types(tokenizer: Any, data: LabelledData) -> list[int]:
    """The token_type_ids that a tokenizer gives texts, or pairs of texts; none where it gives no such input."""
    texts = ["a"] if data.train[0].get("text_pair") is None else ["a", "a"]
    return sorted(set(tokenizer(*texts).get("token_type_ids", ())))


def _check_encoder(
    config: Any,
    tokenizer: Any,
    teacher: EncoderTeacherArguments,
    role: str = "teacher",
    problem: ProblemType = "single_label_classification",
) -> None:
    name = teacher.teacher
    begins = tokenizer.cls_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    if not is_encoder(config) or not begins or tokenizer.pad_token_id is None:
        raise ModelError(
            f"{role} '{name}' is a '{config.model_type}' model, not an encoder whose texts begin with a [CLS] token. "
            "Choose one of the BERT family."
        )
    kinds = config.architectures or []
    if teacher.teacher_finetuned and head_of(config) != head_for(problem):
        words = " of words" if head_for(problem) == OF_WORDS else ""
        raise ModelError(
            f"teacher '{name}' is a {', '.join(kinds) or 'model without a head'}, not a fine-tuned classifier{words}. "
            "Leave teacher_finetuned out: the recipe fine-tunes it."
        )
