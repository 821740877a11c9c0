"""The settings of the recipe of encoder-only students, and what they name: everything that needs no weights is checked
before weights load, and a finished teacher is never fine-tuned again.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, set_seed

from ..checks import Positive, check_choice, check_settings
from ..errors import ConfigError, ModelError
from ..io.files import write_text
from ..models.digests import tokenizer_digest, weights_digest
from ..models.encoders.classifiers import Init, build_student
from ..models.encoders.labels import check_single_label, give_labels, label_names
from ..models.encoders.onnx_export import require_onnx
from ..models.encoders.rehearsal import is_encoder, rehearse
from ..models.loading import check_saved_weights, load_config, load_pretrained
from ..models.vocabulary import load_tokenizer
from ..runs.checkpoints import check_resumed_settings
from ..runs.record import FREE, LENGTH, settings_of
from ..settings.fields import own_names
from ..trainers.base_arguments import StudentArguments
from ..trainers.encoders.arguments import TKDArguments
from ..trainers.encoders.checks import check_distillation
from ..trainers.encoders.tkd import TKDTrainer
from .encoder_data import LabelledData, LabelledDataArguments, load_labelled_data

logger = logging.getLogger(__name__)

TEACHER_RECORD = "fine_tuning.json"


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

    student_layers: int = field(default=3, metadata={"help": "Layers of the student."})
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
            "layers": self.student_layers,
            "init": self.student_init,
            "layer_map": layer_map,
            "pretrained": self.student_pretrained,
            **shape,
        }


@dataclass
class EncoderSetup:
    """What the job needs: settings, checked data and tokenizers; no weights yet."""

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

    def load_teacher(self, name: str) -> Any:
        """A sequence classifier in float32 with the labels of this task."""
        return load_pretrained(
            AutoModelForSequenceClassification,
            name,
            "teacher",
            config=copy.deepcopy(self.teacher_config),
            revision=self.teacher.teacher_revision if name == self.teacher.teacher else None,
            allow_bin=self.teacher.allow_bin,
            needs="all" if name == self.teacher_folder else "layers",  # a head of another task is replaced
            dtype=torch.float32,
        )

    def new_student(self, teacher: Any) -> Any:
        """The student before training, made from the fine-tuned teacher; the same one for the same seed."""
        set_seed(self.training.seed)
        return build_student(
            teacher, allow_bin=self.teacher.allow_bin, **self.student.options(teacher.config, self.training.layer_map)
        )

    def trainer_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the `TKDTrainer` that distils."""
        return {
            "tokenizer": self.tokenizer,
            "teacher_tokenizer": self.teacher_tokenizer,
            "train_rows": self.data.train,
            "eval_rows": self.data.first_dev,
            "compute_metrics": self.data.compute_metrics(),
        }


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
    config = load_config(teacher.teacher, "teacher", teacher.teacher_revision)
    teacher_tokenizer = load_tokenizer(teacher.teacher, "teacher", teacher.teacher_revision)
    _check_encoder(config, teacher_tokenizer, teacher)
    names = label_names(config) if teacher.teacher_finetuned else ()
    loaded = load_labelled_data(data, names)
    if training.process_index == 0:
        print(f"held out: {loaded.note}")
    if teacher.teacher_finetuned and config.num_labels != len(loaded.labels):
        raise ModelError(
            f"teacher '{teacher.teacher}' has {config.num_labels} labels, and {loaded.name} has {len(loaded.labels)} "
            f"({', '.join(loaded.labels)}). It was fine-tuned on another task."
        )
    if teacher.teacher_finetuned and not names:
        logger.warning(
            "teacher '%s' does not name its labels: its outputs are taken for %s, in this order. If it was fine-tuned "
            "with another order, set labels.", teacher.teacher, ", ".join(loaded.labels),
        )  # fmt: skip
    give_labels(config, loaded.labels)
    tokenizer = teacher_tokenizer
    if student.student_init == "pretrained" and student.student_pretrained is not None:
        tokenizer = load_tokenizer(student.student_pretrained, "student")
    best = (training.metric_for_best_model or "loss").removeprefix("eval_")
    known = list(dict.fromkeys(["score", *loaded.metrics, "accuracy", "loss"]))
    check_choice("metric_for_best_model", best, known)
    own = rehearse(
        config,
        student.options(config, training.layer_map),
        needs={"teacher": (training.teacher_needs | training.cached) - {"logits"}, "student": training.student_needs},
        token_types={"teacher": _token_types(teacher_tokenizer, loaded), "student": _token_types(tokenizer, loaded)},
        gradient_checkpointing=bool(training.gradient_checkpointing),
    )
    check_distillation(training, own, config, tokenizer, teacher_tokenizer)
    check_saved_weights(teacher.teacher, "teacher", teacher.teacher_revision, allow_bin=teacher.allow_bin)
    if student.student_init == "pretrained":
        check_saved_weights(str(student.student_pretrained), "student", allow_bin=teacher.allow_bin)
    return EncoderSetup(loaded, teacher, student, training, config, tokenizer, teacher_tokenizer, settings)


def _token_types(tokenizer: Any, data: LabelledData) -> list[int]:
    """The token_type_ids that a tokenizer gives texts, or pairs of texts; none where it gives no such input."""
    texts = ["a"] if data.train[0].get("text_pair") is None else ["a", "a"]
    return sorted(set(tokenizer(*texts).get("token_type_ids", ())))


def _check_encoder(config: Any, tokenizer: Any, teacher: EncoderTeacherArguments) -> None:
    name = teacher.teacher
    begins = tokenizer.cls_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    if not is_encoder(config) or not begins or tokenizer.pad_token_id is None:
        raise ModelError(
            f"teacher '{name}' is a '{config.model_type}' model, not an encoder whose texts begin with a [CLS] token. "
            "Choose one of the BERT family."
        )
    kinds = config.architectures or []
    if teacher.teacher_finetuned and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"teacher '{name}' is a {', '.join(kinds) or 'model without a head'}, not a fine-tuned classifier. "
            "Leave teacher_finetuned out: the recipe fine-tunes it."
        )
    if teacher.teacher_finetuned:
        check_single_label(config, "teacher", name)


def fine_tuned_teacher(setup: EncoderSetup) -> Any:
    """The fine-tuned teacher, in evaluation mode: the one given, or the one in the run folder, which is fine-tuned now
    unless it is finished. An interrupted fine-tuning continues from its last checkpoint.

    Raises ConfigError if the teacher in the run folder was made with other settings or other data.
    """
    if not setup.teacher.teacher_finetuned:
        _fine_tune(setup)
    return setup.load_teacher(setup.teacher_folder).eval()


def _fine_tune(setup: EncoderSetup) -> None:
    folder, training = Path(setup.teacher_folder), setup.training
    path, wanted = folder / TEACHER_RECORD, _fine_tuning_settings(setup)
    record = json.loads(path.read_text()) if path.exists() else {"settings": wanted}
    changed = _changes(record["settings"], {name: wanted[name] for name in wanted if name in record["settings"]})
    if not record.get("finished"):  # a finished one stays when only the student's training changes
        changed += _changes(record.setdefault("training", now := _other_settings(training)), now)
    if changed:
        raise ConfigError(
            f"{folder} was fine-tuned with {', '.join(changed)}. Give another output_dir, or remove that folder."
        )
    if record.get("finished"):
        return
    args = replace(
        training,
        preset="ft",
        terms=None,
        noise_probability=0.5,
        noise_deviation=0.5,
        relation_heads=None,
        output_dir=str(folder),
        num_train_epochs=setup.teacher.teacher_epochs,
        learning_rate=setup.teacher.teacher_learning_rate,
        max_steps=-1,
        report_to=[],  # a tracker shows the student's run
        teacher_cache="none",
        tree_start_epoch=0.0,
        resume_from_checkpoint="auto" if path.exists() else None,
        allow_config_change=True,  # the settings that affect the teacher were compared above
    )
    set_seed(training.seed)
    inputs = setup.trainer_inputs() | {"tokenizer": setup.teacher_tokenizer, "teacher_tokenizer": None}
    inputs["train_rows"] = [row for row in setup.data.train if row["label"] is not None]
    model = setup.load_teacher(setup.teacher.teacher)
    _check_same_weights(record, model, setup)
    trainer = TKDTrainer(model, args, **inputs)
    if trainer.is_world_process_zero():
        print(f"fine-tuning the teacher in {folder}")
        _write(path, record)
    trainer.run(setup.settings)
    if trainer.is_world_process_zero():
        _write(path, {**record, "finished": True})
    trainer.accelerator.wait_for_everyone()


def _check_same_weights(record: dict[str, Any], model: Any, setup: EncoderSetup) -> None:
    """Note the weights that the fine-tuning begins with. Raises ConfigError if it began with others."""
    weights = weights_digest(model)
    if record.setdefault("weights", weights) != weights:
        raise ConfigError(
            f"the weights of {setup.teacher.teacher} have changed since its fine-tuning in {setup.teacher_folder} "
            "began. Restore them, give another output_dir, or remove that folder."
        )


def _fine_tuning_settings(setup: EncoderSetup) -> dict[str, Any]:
    """The settings that determine the fine-tuned teacher."""
    teacher, training = setup.teacher, setup.training
    return {
        "teacher": teacher.teacher,
        "teacher_revision": teacher.teacher_revision,
        "teacher_epochs": teacher.teacher_epochs,
        "teacher_learning_rate": teacher.teacher_learning_rate,
        "max_length": training.max_length,
        "seed": training.seed,
        "mixed_precision": training.mixed_precision,
        "labels": list(setup.data.labels),
        "data": _digest([*setup.data.train, *setup.data.first_dev]),
        "tokenizer": tokenizer_digest(setup.teacher_tokenizer),
    }


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} {then.get(name)} (now {now.get(name)})" for name in {**then, **now} if then.get(name) != now.get(name)
    ]


def _other_settings(training: TKDArguments) -> dict[str, Any]:
    """The settings of a training run that fine-tuning shares with distillation; those of the loss are not its own."""
    own = own_names(TKDArguments) - own_names(StudentArguments)
    given = settings_of([training]).items()
    return {name: value for name, value in given if name not in FREE | LENGTH | own}


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    return sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _write(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")
