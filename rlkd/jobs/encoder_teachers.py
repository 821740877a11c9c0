"""The models that teach: a fine-tuned encoder and, if asked for, a chain of assistants. What is finished is never
trained again, and what was interrupted continues.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..errors import ConfigError
from ..io.files import write_text
from ..models.digests import tokenizer_digest, weights_digest
from ..runs.record import FREE, LENGTH, settings_of
from ..settings.fields import own_names
from ..trainers.base_arguments import StudentArguments
from ..trainers.encoders.arguments import TKDArguments
from ..trainers.encoders.tkd import TKDTrainer
from .encoder_setup import EncoderSetup, EncoderStudentArguments, load_saved_student

TEACHER_RECORD = "fine_tuning.json"
ASSISTANT_RECORD = "assistant.json"


def teacher_of_student(setup: EncoderSetup) -> Any:
    """The model that teaches the student: the fine-tuned teacher, or the last of the assistants, trained now unless
    they are finished. None where the training rows bring the teacher's logits.

    Teacher assistants (Mirzadeh et al. 2020, arXiv 1902.03393): each student teaches the next, smaller one. Raises
    ConfigError as `fine_tuned_teacher` does.
    """
    if setup.data.recorded:
        return None
    teacher = fine_tuned_teacher(setup)
    for number, settings in enumerate(setup.student.assistants, start=1):
        teacher = _assistant(setup, settings, teacher, number)
    return teacher


def _assistant(setup: EncoderSetup, settings: EncoderStudentArguments, teacher: Any, number: int) -> Any:
    """Assistant `number` (from 1) in its folder of the run, in evaluation mode."""
    folder, training = Path(f"{setup.training.output_dir}/assistant-{number}"), setup.training
    path = folder / ASSISTANT_RECORD
    wanted = {
        "teacher": weights_digest(teacher),
        "student": {name: value for name, value in asdict(settings).items() if name != "export_onnx"},
        "training": {name: v for name, v in settings_of([training]).items() if name not in FREE | LENGTH},
        "epochs": training.num_train_epochs,
        "data": _digest([*setup.data.train, *setup.data.first_dev]),
    }
    wanted = json.loads(json.dumps(wanted, default=str))
    record = json.loads(path.read_text()) if path.exists() else {"settings": wanted}
    if changed := _changes(record["settings"], wanted):
        raise ConfigError(
            f"{folder} was trained with {', '.join(changed)}. Give another output_dir, or remove that folder."
        )
    if not record.get("finished"):
        student = replace(setup, student=settings).new_student(teacher)
        args = replace(
            training,
            output_dir=str(folder),
            report_to=[],  # a tracker shows the student's run
            resume_from_checkpoint="auto" if path.exists() else None,
        )
        inputs = setup.trainer_inputs()
        if number == 1:
            inputs["teacher_tokenizer"] = setup.teacher_tokenizer
        trainer = TKDTrainer(student, args, teacher=teacher, **inputs)
        if trainer.is_world_process_zero():
            print(f"training the assistant of {settings.student_layers} layers in {folder}")
            _write(path, record)
        trainer.run(setup.settings)
        if trainer.is_world_process_zero():
            _write(path, {**record, "finished": True})
        trainer.accelerator.wait_for_everyone()
    return load_saved_student(str(folder)).eval()


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
        "problem_type": setup.data.problem_type,
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
