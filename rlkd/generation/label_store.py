"""Label folders: parquet shards, the settings they were made with, and a manifest that marks a finished run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.rows import read_parquet
from ..errors import DataError
from ..records import PseudoLabel

MANIFEST, SETTINGS = "manifest.json", "settings.json"
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "template": pa.string(),
        "teacher_input": pa.string(),
        "student_input": pa.string(),
        "references": pa.list_(pa.string()),
        "label": pa.string(),
        "token_ids": pa.list_(pa.int64()),
        "sample": pa.int64(),
        "sum_logprob": pa.float64(),
        "finished": pa.bool_(),
    }
)
INPUT_COLUMNS = ["id", "template", "teacher_input", "student_input", "references", "sample"]


@dataclass(frozen=True, slots=True)
class Job:
    """One label to make: the inputs of a PseudoLabel."""

    id: str
    template: str
    teacher_input: str
    student_input: str
    references: list[str]
    sample: int


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise DataError if `out` holds finished labels; with `overwrite` remove them (shards, settings, manifest)."""
    if overwrite:
        # The manifest goes first: without it nothing left behind can pass for a finished run.
        for file in (out / MANIFEST, out / SETTINGS, *out.glob("labels-*.parquet")):
            file.unlink(missing_ok=True)
    elif (out / MANIFEST).exists():
        raise DataError(
            f"{out} already holds finished labels ({MANIFEST}). Choose another folder, or pass --overwrite."
        )


def load_pseudolabels(path: str | Path) -> datasets.Dataset:
    """The rows of a finished folder, columns as in PseudoLabel.

    Raises: DataError if the run is unfinished, a shard is missing or differs from its checksum, or columns are missing.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        state = (
            "holds an unfinished run: repeat its command to finish it"
            if (folder / SETTINGS).exists()
            else "holds no labels"
        )
        raise DataError(
            f"{folder} has no {MANIFEST}, so it {state}. "
            f"Labels are written by: rlkd generate-pseudolabels --out {folder}"
        )
    try:
        shards = [(folder / s["file"], s["sha256"]) for s in json.loads((folder / MANIFEST).read_text())["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged: {error!r}. Generate the labels again with --overwrite."
        ) from error
    for file, checksum in shards:
        if not file.is_file() or sha256(file) != checksum:
            state = "differs from its checksum" if file.is_file() else "is missing"
            raise DataError(
                f"{file} {state}. Delete {folder / MANIFEST} and that shard, then repeat the command: "
                "only it is made again."
            )
    rows = read_parquet([file for file, _ in shards])
    wanted = [field.name for field in fields(PseudoLabel)]
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise DataError(
            f"{folder} lacks the columns {', '.join(missing)}; found {', '.join(rows.column_names)}. "
            "Generate the labels again."
        )
    return rows


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Claim `out` for these settings. Raises DataError if an unfinished run there has others."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [f"  {k}: {theirs.get(k)!r} -> {v!r}" for k, v in settings.items() if theirs.get(k) != v]
        if changed:
            raise DataError(
                f"{out} holds an unfinished run with other settings:\n"
                + "\n".join(changed)
                + "\nChoose another folder, or pass --overwrite."
            )
    elif any(out.glob("labels-*.parquet")):
        raise DataError(
            f"{out} holds label shards without {SETTINGS}, so they cannot be trusted. "
            "Choose another folder, or pass --overwrite."
        )
    write_atomically(path, lambda file: file.write_text(json.dumps(settings, indent=2) + "\n"))


def holds(path: Path, jobs: list[Job]) -> bool:
    """Whether a shard of an interrupted run is whole and labels exactly these jobs."""
    if not path.exists():
        return False
    try:
        return pq.read_table(path, columns=INPUT_COLUMNS).to_pylist() == [asdict(job) for job in jobs]
    except (pa.ArrowException, OSError):
        return False


def write_shard(path: Path, labels: list[PseudoLabel]) -> None:
    """Write one zstd parquet file of labels."""
    table = pa.Table.from_pylist([asdict(label) for label in labels], schema=SCHEMA)
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))


def write_manifest(
    out: Path, shards: list[dict[str, Any]], settings: dict[str, Any], *, seconds: float
) -> dict[str, Any]:
    """Mark the run finished. Returns what was written: rows, shards with checksums, settings, packages, seconds."""
    rows = sum(shard["rows"] for shard in shards)
    manifest = {"rows": rows, "shards": shards, "settings": settings, "packages": packages(), "seconds": seconds}
    write_atomically(out / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))
    return manifest


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, flush to disk, then rename: `path` is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(model: Any) -> str:
    """Cheap identity of the weights, from 64 values of each: a teacher trained further under its old name differs."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        digest.update(
            f"{name}{tuple(weight.shape)}".encode() + repr(flat[:: max(flat.numel() // 64, 1)].tolist()).encode()
        )
    return digest.hexdigest()[:16]


def packages() -> dict[str, str]:
    """Versions of what made the labels."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("rlkd", "torch", "transformers", "datasets", "pyarrow")
    }
