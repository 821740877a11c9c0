"""What a training takes, from its settings alone: parameters, memory by phase, disk, updates, tokens, hours."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from ..data.files import is_pattern
from ..data.text import text_format
from ..errors import ConfigError, DataError, ModelError, RlkdError
from ..io.remote import local_copy
from ..labels.integrity import finished_manifest
from ..runs.files import METRICS
from ..trainers.arguments import OnPolicyArguments
from .encoder_memory import EncoderRehearsal
from .memory import Phase, Rehearsal
from .models import student_spec
from .several import TeacherPlan
from .teachers import OBJECTIVES, teacher_spec
from .training import TRAINING_JOBS
from .wiring import Reading, RowSource

NOT_COUNTED = (
    "not counted: evaluation, CUDA's context and kernels, memory that an allocator cannot use again, and the program "
    "itself; prompts and answers are taken to have the greatest length"
)


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    parameters  of each model, those of adapters included
    phases      in their order
    disk        bytes of the saved student, of a checkpoint, and of all that are kept (None: not known)
    updates     None if nothing says how many;  answers, rows of an update of one process;  tokens, of one of these at
                most, of prompt and answer
    operations  floating-point operations of one device for one update, rollouts included
    notes       what is not in it
    """

    job: str
    parameters: dict[str, int]
    phases: list[Phase]
    disk: dict[str, int | None]
    updates: int | None
    answers: int
    tokens: tuple[int, int]
    operations: int
    processes: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def hours(self, seconds: float | None) -> float | None:
        """Of the whole training, at so many seconds an update."""
        return None if seconds is None or self.updates is None else self.updates * seconds / 3600

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak.total}


def estimate(job: str, built: Sequence[Any], *, rows: int | None = None, processes: int = 1) -> Estimate:
    """The estimate of a job of `rlkd train` for the settings it would run with; no weights and no rows are loaded.

    rows: to learn from, if they are not here to be counted. processes: that train together, one device each.
    Raises ConfigError, ModelError or DataError for settings or models that the job would refuse without weights, and
    ModelError for a model whose code does not run without them.
    """
    data, training = built[0], built[-1]
    found = rows if rows is not None else _rows(data)
    rehearsal, notes = _encoders(built) if job == "tkd" else _language(job, built, found, processes)
    try:
        phases = rehearsal.phases()
    except RlkdError:
        raise
    # The code of any model of transformers, on tensors that it was not made for.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"memory cannot be estimated, a model does not run without weights ({reason}): train a few steps, and "
            "read the peak"
        ) from error
    on_policy = isinstance(training, OnPolicyArguments)
    answers = training.per_device_train_batch_size * training.gradient_accumulation_steps
    updates = _updates(training, found, processes)
    once = rehearsal.operations.get("rollouts", 0) + rehearsal.operations.get("evidence", 0)
    operations = rehearsal.operations["update"] * training.gradient_accumulation_steps
    if on_policy:
        operations += once // training.updates_per_rollout
    lengths = (training.max_length, 0) if job == "tkd" else (training.max_input_tokens, training.max_new_tokens)
    return Estimate(
        job, rehearsal.parameters(), phases, _disk(rehearsal, training, updates), updates, answers, lengths, operations,
        processes, [*notes, NOT_COUNTED],
    )  # fmt: skip


def _language(job: str, built: Sequence[Any], rows: int | None, processes: int) -> tuple[Rehearsal, list[str]]:
    data, teacher, student, training = built
    settings = {**vars(teacher), **vars(data)}
    own = replace(
        student_spec(student, {**settings, "random_weights": True}), random_weights=bool(settings.get("random_weights"))
    )
    if own.quantization is not None:
        raise ConfigError("load_in_4bit, load_in_8bit: memory of quantized weights is not estimated: leave them out")
    if student.use_peft and (adapter := replace(own, random_weights=True).adapter):
        own = replace(own, name=adapter.base, revision=adapter.base_revision)
    objective = next(made for kind, made in OBJECTIVES.items() if isinstance(training, kind))(training)
    notes: list[str] = []
    if getattr(training, "layer_weights", None):
        notes.append("not counted: the terms over layers (hidden_coef, attention_coef)")
    if job == "teacher":
        return Rehearsal(own, student, [], training, objective, processes=processes), notes
    signal = teacher.teacher_signal
    specs = []
    if signal == "model":
        plan = TeacherPlan.of(teacher, training)
        specs = list(plan.specs.values()) if plan else [teacher_spec(vars(teacher), training, own)]
    elif objective.needs and signal != "base":
        notes.append(
            f"teacher_signal = {signal!r}: no weights of a teacher, and no probabilities that it sends, are counted"
        )
    try:
        templates = max(len(Reading.of(vars(data)).templates), 1)
    except RlkdError as error:
        templates = max(len(data.templates), 1)
        notes.append(f"templates are counted as {templates}: {error}")
    return Rehearsal(
        own, student, [spec.model for spec in specs], training, objective, templates, signal == "base",
        teacher.teacher_cache_mb * 2**20, rows, processes,
    ), notes  # fmt: skip


def _encoders(built: Sequence[Any]) -> tuple[EncoderRehearsal, list[str]]:
    data, teacher, student, training = built
    notes = []
    if student.assistant_layers:
        notes.append("assistant_layers: the largest assistant takes as much as a student of its layers")
    if set(training.weights) - {"ce", "kd"}:
        notes.append("not counted: what terms beyond ce and kd make of the layers' outputs")
    return EncoderRehearsal.of(data, teacher, student, training), notes


def _rows(data: Any) -> int | None:
    """Rows to learn from, if they are on this machine or in object storage: labels, where there are some."""
    try:
        if (labels := getattr(data, "pseudo_labels", None)) is not None:
            shards = finished_manifest(local_copy(labels)).shards.values()
            return sum(shard["status"]["ok"] for shard in shards)
        source = getattr(data, "dataset", None) or getattr(data, "train_file", None)
        if source is None or not (local_copy(source).exists() or is_pattern(source)):
            return None
        split, limit = getattr(data, "train_split", "train"), data.train_limit
        stream = RowSource(source, split, None, limit, text_format(vars(data))).stream(())
        count = sum(1 for _ in stream.reader.records())
    except DataError:  # an unfinished folder, or a file of another kind: the job will say so
        return None
    held_out = getattr(data, "eval_dataset", None) or getattr(data, "dev_file", None)
    share = 0.0 if held_out else getattr(data, "eval_fraction", getattr(data, "dev_fraction", 0.0))
    return round((count if limit is None else min(count, limit)) * (1 - share))


def _updates(training: Any, rows: int | None, processes: int) -> int | None:
    """Optimizer steps, as the Trainer counts them."""
    if training.max_steps > 0:
        return training.max_steps
    if rows is None:
        return None
    if isinstance(training, OnPolicyArguments):
        prompts = training.rows_per_rollout // training.rollouts_per_prompt * processes
        return ceil(rows // prompts * training.updates_per_rollout * training.num_train_epochs)
    batches = ceil(rows / (training.per_device_train_batch_size * processes))
    return ceil(max(ceil(batches / training.gradient_accumulation_steps), 1) * training.num_train_epochs)


def _disk(rehearsal: Any, training: Any, updates: int | None) -> dict[str, int | None]:
    student, checkpoint = rehearsal.saved()
    kept = training.save_total_limit
    if training.save_strategy == "no":
        kept = 0
    elif training.save_strategy == "steps" and updates is not None:
        made = ceil(updates / training.save_steps)
        kept = made if kept is None else min(made, kept)
    total = None if kept is None else student + kept * checkpoint
    return {"student": student, "checkpoint": checkpoint, "checkpoints and student": total}


@dataclass(frozen=True)
class Measured:
    """seconds of an update;  peak, bytes above the level before the training: on a GPU of tensors, else resident"""

    seconds: float
    peak: int


def measure(job: str, built: Sequence[Any], updates: int) -> Measured:
    """Train so many updates for real, after a first one (or a first batch of rollouts) that is not timed; nothing of it
    is kept. Raises as the job does.
    """
    import torch

    settings, training = built[:-1], built[-1]
    cycle = getattr(training, "updates_per_rollout", 1)
    timed = cycle * ceil(updates / cycle)
    with tempfile.TemporaryDirectory() as folder:
        changed: dict[str, Any] = {
            "output_dir": folder, "max_steps": cycle + timed, "eval_strategy": "no", "save_strategy": "no",
            "logging_steps": 1, "report_to": [], "load_best_model_at_end": False, "early_stopping_patience": None,
            "resume_from_checkpoint": None, "eval_on_start": False, "push_to_hub": False, "eval_limit": 1,
            "until_ready": False, "disable_tqdm": True,
        }  # fmt: skip
        for name, value in changed.items():
            if hasattr(training, name):
                setattr(training, name, value)
        before = _resident()
        with redirect_stdout(sys.stderr):
            TRAINING_JOBS[job].run(*settings, training)
        lines = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if "loss" in line}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident() - before
    return Measured((times[cycle + timed] - times[cycle]) / timed, peak)


def _resident() -> int:
    """The largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
