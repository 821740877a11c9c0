"""Checkpoints on disk: complete or absent, and checked before they are used.

A checkpoint is written in `_unfinished/`, flushed to disk, given a manifest with the size and the sha256 of each of its
files, and only then renamed to `checkpoint-N`. What a killed save leaves in `_unfinished/` is put in place at the next
start if it is whole and its place is empty; the rest is removed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, RlkdError
from ..io.files import explained, sha256, sync_folder, write_durably
from ..io.folders import refuse_other_contents
from .files import ALARMS_FILE, HELD_OUT, METRICS, RUN_FILE, SAMPLES, TOKEN_REWARDS
from .record import check_settings

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE_FILE = "rlkd_state.json"
UNFINISHED = "_unfinished"
REPLACED = ".replaced"
SET_ASIDE = "set_aside"
# The logs of a run; a resumed run removes the lines after its checkpoint.
LOGS = (METRICS, SAMPLES, TOKEN_REWARDS, ALARMS_FILE)
# What may be in a run folder before run.json is: logs of an evaluation, the fine-tuned teacher and its outputs.
OWN = (
    *LOGS,
    HELD_OUT,
    UNFINISHED,
    SET_ASIDE,
    "fine_tuning.json",
    "assistant.json",
    "teacher",
    "teacher_cache",
    "diverged",
    "onnx",
    "*.html",
)
# Bytes that a checkpoint takes in addition to its tensors, and a disk in addition to its files.
SMALL_FILES = 2**20
RESUME = "--resume_from_checkpoint auto"


def checkpoint_path(run: Path, step: int) -> Path:
    """The path of the checkpoint of `step`, once it is complete."""
    return run / f"checkpoint-{step}"


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, newest first; `damage` checks whether they are intact."""
    found = {
        int(m[1]): path for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return {step: found[step] for step in sorted(found, reverse=True)}


# Writing


def clear_unfinished(run: Path) -> None:
    """Remove what a killed save left."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def put_back(run: Path) -> None:
    """Put whole checkpoints in `_unfinished/` in their places if these are empty: a save was killed before its rename.
    The new one of a step comes before the one that it was to replace.
    """
    for path in sorted((run / UNFINISHED).glob("checkpoint-*")):
        final = run / path.name.removesuffix(REPLACED)
        if not final.exists() and damage(path) is None:
            os.rename(path, final)
            sync_folder(run)
            logger.warning(f"{final} is back: it was whole when the process that saved it was killed")


def commit(written: Path, final: Path) -> None:
    """Make the files in `written` the checkpoint `final`, in one step that a crash leaves done or not done."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in {path.parent for path in files} - {written}:
        sync_folder(folder)
    entries = {
        path.relative_to(written).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_durably(written / MANIFEST, json.dumps({"files": entries}, indent=2).encode())
    if final.exists():  # of the same step and run: an epoch may end where a save was due
        os.rename(final, written.with_name(final.name + REPLACED))
    os.rename(written, final)
    sync_folder(final.parent)
    clear_unfinished(final.parent)


def explained_save(error: Exception, final: Path, needed: int, *, checkpoint: bool = True) -> Exception:
    """The error to raise for a failed save to `final`: an RlkdError if the disk is full or refuses, else `error`. Frees
    what was written.

    needed: bytes of the tensors to save; checkpoint: they are those of a checkpoint, not of the student alone.
    """
    run = final.parent if checkpoint else final
    if isinstance(error, RlkdError):
        if not isinstance(error.__cause__, OSError):
            return error
        error = error.__cause__  # of one file of many
    if not run.is_dir():
        return RlkdError(f"{run} was removed while this run was writing to it. Restore it, or start anew.")
    needed = needed if not checkpoint else max([needed, *(_size(path) for path in list(checkpoints(run).values())[:1])])
    room = shutil.disk_usage(run).free + _size(run / UNFINISHED)
    clear_unfinished(run)
    # safetensors and torch each have an error of their own for a full disk.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and room > needed + SMALL_FILES:
        return explained(error, final, needed) if isinstance(error, OSError) else error
    return RlkdError(
        f"no space left for {final}: it needs about {needed / 1e6:.2f} MB, {room / 1e6:.2f} MB are free. "
        f"Earlier checkpoints are intact: free some space and repeat the command with {RESUME}."
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Finding


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save was cut off, or it is not a checkpoint of rlkd"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if sha256(path) != checksum:
            return f"{name} was changed after it was written: its sha256 differs"
    if STATE_FILE not in expected:
        return f"it has no {STATE_FILE}: with save_only_model a checkpoint holds nothing to resume from"
    return None


def requested(resume_from_checkpoint: str | bool | None) -> str | None:
    """ "auto" (also for True and "true"), a folder, or None for a new run."""
    word = str(resume_from_checkpoint).lower()
    if word in ("none", "false", ""):
        return None
    return "auto" if word in ("true", "auto") else str(resume_from_checkpoint)


def check_run_folder(run: Path, models: Iterable[str | None] = ()) -> None:
    """Raise ConfigError if `run` holds something else than a run, or is the folder of one of the models it reads."""
    for model in models:
        if model and run.exists() and Path(model).exists() and run.samefile(model):
            raise ConfigError(f"output_dir {run} is the folder of a model that the run reads. Name another folder.")
    refuse_other_contents(run, "output_dir", signs=(RUN_FILE, "checkpoint-*"), own=OWN)


def find_checkpoint(wanted: str | None, run: Path) -> Path | None:
    """The checkpoint to resume from; None for a new run.

    wanted: a folder; or auto, the newest intact checkpoint of the run; why newer ones are skipped is logged.
    Raises CheckpointError if there are checkpoints but none is intact, ConfigError if a new run would mix with those of
    an earlier one.
    """
    check_run_folder(run)
    put_back(run)
    own = checkpoints(run)
    if wanted is None:
        if own:
            raise ConfigError(
                f"{run} holds checkpoints of an earlier run (up to step {max(own)}). Continue it ({RESUME}), or "
                "choose another output_dir."
            )
        return None
    if wanted != "auto":
        return _given(Path(wanted))
    reasons = []
    for path in own.values():
        reason = damage(path)
        if reason is None:
            return path
        logger.warning(f"skipped {path}: {reason}")
        reasons.append(f"\n  {path.name}: {reason}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {run} can be resumed from:{''.join(reasons)}\nRestore one, or choose another output_dir."
        )
    logger.warning(f"no checkpoint in {run} yet: starting a new run")
    return None


def check_resumed_settings(args: Any, sections: Iterable[Any]) -> None:
    """Raise ConfigError if the checkpoint that a recipe is to resume was written with other settings, or if output_dir
    is something else's; for recipes, before a model is read. args, the trainer's settings; sections, the others.
    """
    named = [getattr(section, name, None) for section in sections for name in ("teacher", "model_name_or_path")]
    check_run_folder(Path(str(args.output_dir)), named)
    wanted, own = requested(args.resume_from_checkpoint), checkpoints(Path(str(args.output_dir)))
    checkpoint = next(iter(own.values()), None) if wanted == "auto" else wanted
    if checkpoint:
        check_settings(Path(checkpoint), (*sections, args), allow_change=args.allow_config_change)


def _given(folder: Path) -> Path:
    """`folder` if it is an intact checkpoint. Raises CheckpointError."""
    reason = damage(folder) if folder.is_dir() else "there is no such folder"
    if reason is None:
        return folder
    near = checkpoints(folder) or checkpoints(folder.parent)
    hint = f" Checkpoints there: {', '.join(path.name for path in near.values())}." if near else ""
    raise CheckpointError(f"cannot resume from {folder}: {reason}.{hint}")


# Returning a run folder to a checkpoint


def log_sizes(run: Path) -> dict[str, int]:
    """Bytes in each log of the run, flushed to disk."""
    sizes = {}
    for name in LOGS:
        if (run / name).exists():
            with (run / name).open("rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


def rewind(run: Path, checkpoint: Path | None) -> None:
    """Restore the run folder to its state when `checkpoint` was saved (None: to before the first step).

    Later checkpoints move to `set_aside/`. Log lines written after the checkpoint are cut off: the resumed run writes
    them again. Logs of a run that never reached a checkpoint move to `set_aside/`.
    """
    clear_unfinished(run)
    step = 0 if checkpoint is None else json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    for later, path in checkpoints(run).items():
        if later > step:
            _set_aside(path)
    if checkpoint is None:
        for name in LOGS:
            if (run / name).exists():
                _set_aside(run / name)
    elif checkpoint.resolve().parent == run.resolve():
        sizes = read_state(checkpoint)["logs"]
        for name in LOGS:
            _cut(run / name, sizes.get(name))


def _set_aside(path: Path) -> None:
    target = path.parent / SET_ASIDE / path.name
    target.parent.mkdir(exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)
    logger.warning(f"moved {path} to {target}: the run continues from an earlier checkpoint")


def _cut(path: Path, size: int | None) -> None:
    if size is None:  # a log begun after the checkpoint: that it is there decides what its first lines are
        path.unlink(missing_ok=True)
    elif path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What rlkd saved in addition to weights, optimizer, scheduler and random state."""
    return json.loads((checkpoint / STATE_FILE).read_text())
