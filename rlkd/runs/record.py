"""run.json: trainer, settings and data of a run; and the check that a resumed run is the same run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError
from ..io.files import write_text
from ..io.provenance import described
from ..io.redaction import redacted
from ..io.versions import changed_versions, code_digest, versions_of
from ..settings.fields import default_of, own_names, plain
from .files import RUN_FILE

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes")
# Settings that a resumed run may change: they decide where and when something is written or shown, what is kept in
# memory, which checkpoint is the best, or whether the run stops earlier, and nothing that affects the
# weights. When and what is evaluated is not among them: evaluation draws from the same random numbers as dropout.
FREE = {
    "alarms", "allow_bin", "allow_config_change", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "disable_tqdm", "do_eval", "do_predict",
    "do_train", "early_stopping_patience", "greater_is_better", "hub_always_push", "hub_model_id", "hub_private_repo",
    "hub_revision", "hub_strategy", "hub_token", "ignore_data_skip", "load_best_model_at_end", "local_rank",
    "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps", "logging_strategy",
    "metric_for_best_model", "output_dir", "project", "push_to_hub", "report_to",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name", "sample_table_rows",
    "save_on_each_node", "save_only_model", "save_steps", "save_strategy", "save_total_limit", "server_api",
    "server_concurrency", "server_timeout", "server_url", "skip_memory_metrics",
    "teacher_cache_dir", "teacher_cache_mb", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "weak_start",
}  # fmt: skip
# A run may be made longer under these schedules only: all others end where the run ends.
LENGTH = {"max_steps", "num_train_epochs"}
ACCUMULATION = "gradient_accumulation_steps"
ENDLESS = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"}


def now() -> str:
    """ISO time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def git_state(folder: str) -> dict[str, Any] | None:
    """{commit, dirty} of the repository around `folder`, None without one or without git; asked once per process.

    dirty: files under version control differ from the commit; None if that takes too long to find out.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(folder: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=3, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass
class RunRecord:
    """The content of run.json.

    rlkd, versions  of rlkd, of python and of rlkd's dependencies; None for a package that is not installed
    code            a digest of rlkd's modules
    trainer         its class; command, sys.argv
    started         ISO time of the first start; resumed, one entry per later start: time, checkpoint, command, changed
                    settings and inputs, changed versions
    settings        every setting of ours, and those of transformers and TRL that differ from their defaults
    git             {commit, dirty} of the working directory, None outside a repository
    data            role -> {source, rows, fingerprint}, of labels also their makers
    templates       [{name, id, fingerprint}]
    models          teacher and student: name or folder; revisions, the commit or a digest of the weights
    inputs          digests of all weights, configurations and tokenizers before training, by name
    environment     what accelerate's configuration and variables make the run do: precision, compiler, device ...
    machine         what decides the last bits: GPU, or the processor's instructions and threads
    processes       how many train together
    readiness       of a warm-up (`until_ready`), at its end: {ready, saturated, step, words} and what was measured
    """

    trainer: str
    settings: dict[str, Any]
    data: dict[str, dict[str, Any]]
    templates: list[dict[str, str]]
    models: dict[str, str | None]
    revisions: dict[str, str | None]
    inputs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    rlkd: str = __version__
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    started: str = field(default_factory=now)
    versions: dict[str, str | None] = field(default_factory=lambda: versions_of(PACKAGES))
    code: str | None = field(default_factory=code_digest)
    git: dict[str, Any] | None = field(default_factory=lambda: git_state(os.getcwd()))
    resumed: list[dict[str, Any]] = field(default_factory=list)
    readiness: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write run.json into `folder`, atomically and without secrets. Raises RlkdError if the disk is full."""
        text = json.dumps(redacted(asdict(self)), indent=2, ensure_ascii=False)
        write_text(folder / RUN_FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """The record in `folder`; None if there is none, or it is not readable."""
        try:
            return cls(**{"code": None, **json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))})
        except (OSError, ValueError, TypeError):
            return None

    def resume(self, checkpoint: Path, sections: Iterable[Any], *, allow_change: bool) -> None:
        """Make this the record of a run that continues from `checkpoint`. Raises ConfigError as `check_settings` does,
        and for other inputs: data, templates, models, tokenizers. Other versions are named in a warning.
        """
        before = RunRecord.read(checkpoint)
        if before is None:
            logger.warning("%s has no %s: cannot check whether the settings are the same", checkpoint, RUN_FILE)
            return
        changed = before.changed_settings(sections) + self._changed_inputs(before)
        _refuse(checkpoint, changed, allow_change)
        versions = self._changed_versions(before)
        again = {"time": self.started, "checkpoint": str(checkpoint), "command": self.command, "changed": changed}
        self.started, self.resumed = before.started, [*before.resumed, again | {"versions": versions}]
        unknown = [name for name in self.inputs if name not in before.inputs]
        unknown += ["environment"] if self.environment and not before.environment else []
        if unknown:
            logger.warning("%s does not record %s: not compared", checkpoint / RUN_FILE, ", ".join(unknown))
        if versions:
            logger.warning(
                "%s was written by other versions or another machine: %s. It goes on, but not bit for bit",
                checkpoint,
                ", ".join(versions),
            )

    def changed_settings(self, sections: Iterable[Any]) -> list[str]:
        """As the function, for a run that may have another number of processes: an update has the same micro-batches
        if there are more steps of accumulation by as many.
        """
        sections = list(sections)
        counts = [
            getattr(section, ACCUMULATION) * section.world_size
            for section in sections
            if hasattr(section, ACCUMULATION)
        ]
        same = counts == [self.settings.get(ACCUMULATION, 1) * self.processes]
        return changed_settings(self.settings, sections, free={ACCUMULATION} if same else set())

    def _changed_inputs(self, before: RunRecord) -> list[str]:
        roles = ("train", "labels", "eval")
        pairs = {f"data.{role}": (_shown_data(before, role), _shown_data(self, role)) for role in roles}
        pairs["templates"] = _shown_templates(before), _shown_templates(self)
        pairs["models"] = ", ".join(sorted(before.models)), ", ".join(sorted(self.models))
        pairs |= {name: (then, self.inputs[name]) for name, then in before.inputs.items() if name in self.inputs}
        if before.environment:
            for name in {**before.environment, **self.environment}:
                pairs[f"environment.{name}"] = before.environment.get(name, "none"), self.environment.get(name, "none")
        return [f"  {name}: {then} -> {new}" for name, (then, new) in pairs.items() if then != new]

    def _changed_versions(self, before: RunRecord) -> list[str]:
        then, now = ({**record.versions, "rlkd": record.rlkd, **record.machine} for record in (before, self))
        if before.rlkd == self.rlkd:  # one version stands for many states of the code
            then["rlkd's code"], now["rlkd's code"] = before.code, self.code
        if before.git and self.git:
            then["git commit"], now["git commit"] = _shown_commit(before.git), _shown_commit(self.git)
        return changed_versions(then, now)


def check_settings(checkpoint: Path, sections: Iterable[Any], *, allow_change: bool) -> None:
    """Raise ConfigError listing every setting that differs from those `checkpoint` was written with, and may not.

    A checkpoint without a record is not checked. `sections` are dataclasses of settings.
    """
    before = RunRecord.read(checkpoint)
    if before is not None:
        _refuse(checkpoint, before.changed_settings(sections), allow_change)


def settings_of(sections: Iterable[Any]) -> dict[str, Any]:
    """Every setting of ours, and those of other packages' dataclasses that differ from their defaults, as JSON has
    them; `sections` are instances.
    """
    out: dict[str, Any] = {}
    for section in sections:
        ours = own_names(type(section))
        for item in fields(section):
            value = plain(getattr(section, item.name))
            if item.init and (item.name in ours or value != default_of(item)):
                out[item.name] = value
    return redacted(out)


def changed_settings(
    then: Mapping[str, Any], sections: Iterable[Any], free: Collection[str] = frozenset()
) -> list[str]:
    """`  name: then -> now` of each recorded setting that has changed, those that may change left out; free: others."""
    lines = []
    sections = list(sections)
    current = settings_of(sections)
    free = {*free, *FREE, *(LENGTH if _is_endless(then) and _is_endless(current) else ())}
    for section in sections:
        ours = own_names(type(section))
        for item in fields(section):
            name = item.name
            # A setting that is not in the record is newer than the record, or was unknown to its writer.
            if name in free or not item.init or (name in ours and name not in then):
                continue
            before, after = (record.get(name, redacted(default_of(item), name)) for record in (then, current))
            if before != after:
                lines.append(f"  {name}: {_shown(before)} -> {_shown(after)}")
    return lines


def fingerprint(rows: Any) -> str:
    """SHA-256 (its first 16 digits) over the content that trains: equal rows in equal order, equal fingerprints."""
    if known := getattr(rows, "fingerprint", None):
        return known
    digest = sha256()
    batches = rows.iter(1000) if hasattr(rows, "iter") else rows
    for item in batches:
        content = asdict(item) if is_dataclass(item) and not isinstance(item, type) else item
        digest.update(json.dumps(content, default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def describe_data(rows: Any) -> dict[str, Any]:
    """{source, rows, fingerprint} of training or evaluation data; source is None for rows made in memory. Labels also
    have {labels}: who made them, and from what (`io.provenance.described`).
    """
    labels = described(rows)
    folders = ", ".join(dict.fromkeys(made["folder"] for made in labels if "folder" in made))
    source = getattr(rows, "source", None) or folders or None
    data = {"source": source, "rows": len(rows), "fingerprint": fingerprint(rows)}
    return data | ({"labels": labels} if labels else {})


def describe_templates(*data: Any) -> list[dict[str, str]]:
    """{name, id, fingerprint} of each template that some data are read under."""
    templates = [template for rows in data for template in getattr(rows, "templates", ())]
    return list({t.fingerprint: {"name": t.name, "id": t.id, "fingerprint": t.fingerprint} for t in templates}.values())


def _is_endless(settings: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step does not depend on the length of the run."""
    schedule, warmup = settings.get("lr_scheduler_type", "linear"), settings.get("warmup_steps", 0)
    return schedule in ENDLESS and (schedule in ("constant", "reduce_lr_on_plateau") or warmup == 0 or warmup >= 1)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shown_data(record: RunRecord, role: str) -> str:
    data = record.data.get(role)
    return "none" if data is None else f"{data['rows']} rows ({data['fingerprint']})"


def _shown_templates(record: RunRecord) -> str:
    return ", ".join(f"{t['name']} ({t['fingerprint']})" for t in record.templates) or "none"


def _shown_commit(git: Mapping[str, Any]) -> str:
    return git["commit"] + (" with uncommitted changes" if git["dirty"] else "")


def _refuse(checkpoint: Path, changed: list[str], allow_change: bool) -> None:
    if changed and not allow_change:
        raise ConfigError(
            f"{checkpoint} was written with other settings or inputs:\n"
            + "\n".join(changed)
            + "\nRestore them to continue the same run, set allow_config_change: true to continue with the new ones "
            "(run.json records the changes), or start a new run in another output_dir."
        )
