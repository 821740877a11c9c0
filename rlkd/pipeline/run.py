"""`rlkd distill`: the stages in order, each skipped when it is finished and resumed where it was killed."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from ..data.rows import local_path
from ..data.splits import plain
from ..errors import ConfigError, DataError, InterruptedRunError, RlkdError
from ..io.files import make_folder
from ..io.lock import Stop, writer_lock
from ..labels.store import labels_finished, load_pseudolabels
from ..models.cut_layers import write_small
from ..models.saving import new_folder
from ..runs.checkpoints import LOGS
from ..runs.files import HELD_OUT, SUMMARY_FILE
from ..trainers.start import too_weak
from .arguments import SMALL, DistillArguments
from .choice import Helped
from .models import Pair, contents
from .plan import Stage, stages
from .record import Record
from .rows import Rows, choices_of, read_rows, source_of, templates_of

logger = logging.getLogger(__name__)

Command = Callable[[list[str]], int]  # runs `rlkd` with these words; its exit code
ROWS_FAILED = 4  # of labels: the others are there
# Of a run folder, what is not the model; its run.json says how the model was trained, and with which lengths.
NOT_MODEL = (*LOGS, HELD_OUT, SUMMARY_FILE, "training_args.bin", "*.html", ".*")


@dataclass(frozen=True)
class Plan:
    """Everything that is known before weights load."""

    args: DistillArguments
    pair: Pair
    rows: Rows
    stages: list[Stage]
    record: Record

    @classmethod
    def of(cls, args: DistillArguments) -> Plan:
        """Checks come in order of cost: the folder, models, rows, settings of every stage; no weights are loaded.

        Raises ConfigError, DataError or ModelError.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "rlkd distill runs in one process. Several GPUs train a stage by its settings file: "
                "accelerate launch -m rlkd train seqkd --config OUT/warm-up.yaml; then repeat rlkd distill."
            )
        record = Record.read(Path(args.out))
        pair = Pair.of(args)
        rows = read_rows(args, pair)
        found = stages(args, pair, rows, digests(args))
        record.check(left_out(found, args, record))
        return cls(args, pair, rows, found, record)


def digests(args: DistillArguments) -> dict[str, Any]:
    """Of what the names in the settings stand for: a changed file is not the same run."""
    teacher = contents(args.teacher, "teacher")
    found: dict[str, Any] = {"teacher model": teacher}
    found["student model"] = teacher if args.student == SMALL else contents(args.student, "student")
    for name in ("data", "test_data"):
        value = getattr(args, name)
        if value is not None and local_path(value) is not None:
            found[f"contents of {name}"] = source_of(args, value).stream(()).identity()["sha256"][:16]
    found["contents of templates"] = [template.fingerprint[:16] for template in templates_of(args)]
    return found


def left_out(found: Sequence[Stage], args: DistillArguments, record: Record) -> list[Stage]:
    """The stages without RL, if the warmed-up student is too weak for it: then it is the student."""
    weak = "warm-up" in record.stages and record.stages["warm-up"]["finished"] and is_weak(record)
    if args.weak_start == "warn" or not weak:
        return list(found)
    return [stage for stage in found if stage.name not in ("rl", "evaluation/rl")]


def is_weak(record: Record) -> bool:
    """Whether the start check of RL would fail."""
    found = record.readiness()
    return bool(found) and too_weak(found["start_regret"], found["start_eos_price"])


def run_stages(plan: Plan, command: Command, say: Callable[[str], None]) -> list[Stage]:
    """Compute what is missing; the stages that the run has. Raises what the stages raise, LockedError while another
    process writes the folder, InterruptedRunError after a signal.
    """
    args, record, out = plan.args, plan.record, Path(plan.args.out)
    make_folder(out)
    with writer_lock(out / "distill"), Stop() as stop:
        todo = left_out(plan.stages, args, record)
        number = 0
        while number < len(todo):
            stage = todo[number]
            if stop.signum is not None:
                raise InterruptedRunError(
                    f"stopped by {Signals(stop.signum).name} before {stage.name}. Repeat the command to continue.",
                    stop.signum,
                )
            done = record.finished(stage)
            say(f"[{number + 1}/{len(todo)}] {stage.name}{': finished' if done else ''}")
            if not done:
                _run(stage, plan, command)
                if stage.name == "warm-up":
                    todo = left_out(plan.stages, args, record)
                    if len(todo) < len(plan.stages):
                        say(weak_words(record))
            number += 1
        return todo


def weak_words(record: Record) -> str:
    """Why there is no RL, and what helps."""
    words = record.readiness().get("words", "")
    return (
        f"RL is left out, and the warmed-up student is the result: {words} (--weak-start warn trains it; "
        "docs/distill.md, When the start check does not pass)"
    )


def _run(stage: Stage, plan: Plan, command: Command) -> None:
    out = Path(plan.args.out)
    plan.record.set(stage, finished=False)
    if stage.command:
        try:
            _call(stage, out, command)
        except InterruptedRunError as error:
            raise InterruptedRunError(
                f"{stage.name}: {str(error).split(' Continue with')[0]} Repeat the command to continue.",
                error.exit_code - 128,
            ) from None
    else:
        shutil.rmtree(out / stage.name, ignore_errors=True)  # a killed attempt
        _OWN[stage.name](plan, out / stage.name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    plan.record.set(stage, finished=True)


def _call(stage: Stage, out: Path, command: Command) -> None:
    """Run a stage that is a command of rlkd. Raises RlkdError if it ends with an error that it has printed."""
    labels = stage.command[0] == "generate-pseudolabels"
    if not (labels and labels_finished(out / stage.name)):  # which was killed after the last shard
        stage.write_settings(out)
        code = command(stage.words(out))
        if code not in (0, ROWS_FAILED):
            raise RlkdError(f"{stage.name} ended with exit code {code}: see above")
    if labels and labels_finished(out / stage.name):
        _refuse_no_labels(stage.name, out / stage.name)


def _refuse_no_labels(name: str, folder: Path) -> None:
    """Raise DataError if the teacher answered no row: nothing could be learned."""
    rows = load_pseudolabels(folder, statuses=None)
    if "ok" not in rows["status"]:
        error, count = Counter(rows["error"]).most_common(1)[0]
        raise DataError(
            f"{name}: the teacher has no answer to any of {len(rows)} rows ({error}: {count}). Try it with another "
            f"prompt, or another teacher; then remove {folder.parent}, or name a new --out."
        )


def _write_rows(plan: Plan, folder: Path) -> None:
    plan.rows.write(folder, plan.args)


def _write_start(plan: Plan, folder: Path) -> None:
    write_small(replace(plan.pair.teacher.model, chat=None, system_prompt=None), folder)


def _write_held_out(plan: Plan, folder: Path) -> None:
    """{text, label} of the validation and the test rows: the reference or, without one, the teacher's choice."""
    import datasets

    spelled = {plain(choice): choice for choice in choices_of(plan.rows.train.templates)}
    with new_folder(folder) as unfinished:
        for part in ("validation", "test"):
            labels = load_pseudolabels(folder.parent / f"labels-{part}")
            firsts = {label["row"]: label for label in reversed(labels.to_list())}  # of the first template
            rows = [
                {
                    "text": label["student_input"],
                    "label": spelled[plain((label["references"] or [label["label"]])[0])],
                }
                for _, label in sorted(firsts.items())
            ]
            datasets.Dataset.from_list(rows).to_parquet(unfinished / f"{part}.parquet")


def _write_student(plan: Plan, folder: Path) -> None:
    """The model, its tokenizer and its card, without what training left beside them."""
    source = trained_folder(plan)
    with new_folder(folder) as unfinished:
        for path in sorted(source.iterdir()):
            if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in NOT_MODEL):
                shutil.copy(path, unfinished)


def stage_names(plan: Plan) -> list[str]:
    """The stages that the run has, once the warm-up has said whether RL is left out."""
    return [stage.name for stage in left_out(plan.stages, plan.args, plan.record)]


def trained_folder(plan: Plan) -> Path:
    """The run folder whose model is the student."""
    out, names = Path(plan.args.out), stage_names(plan)
    if plan.pair.encoder:
        return out / "training"
    return out / ("rl" if "rl" in names and Helped.of(out / "rl") else "warm-up")


_OWN: dict[str, Callable[[Plan, Path], None]] = {
    "data": _write_rows,
    "start": _write_start,
    "held-out": _write_held_out,
    "student": _write_student,
}
