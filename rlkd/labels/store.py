"""Label shards: zstd parquet files, one per block of input rows; their bytes depend only on their rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.rows import read_parquet
from ..errors import DataError
from ..io.files import write_durably
from ..io.provenance import attach
from ..io.remote import local_copy
from ..records import PseudoLabel
from .integrity import STATUSES, finished_manifest, shard_problem
from .integrity import damage as damage
from .manifest import MANIFEST, Manifest

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "row": pa.int64(),
        "template": pa.string(),
        "template_id": pa.string(),
        "status": pa.string(),
        "error": pa.string(),
        "teacher_input": pa.string(),
        "student_input": pa.string(),
        "references": pa.list_(pa.string()),
        "label": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "sample": pa.int32(),
        "n_in": pa.int32(),
        "n_out": pa.int32(),
        "truncated": pa.bool_(),
        "finish_reason": pa.string(),
        "sum_logprob": pa.float64(),
        "choices": pa.list_(pa.string()),
        "choice_logprobs": pa.list_(pa.float64()),
        "model": pa.string(),
        "revision": pa.string(),
        "generation": pa.string(),
    }
)
TOP_K = pa.schema({"top_ids": pa.list_(pa.list_(pa.int32())), "top_logps": pa.list_(pa.list_(pa.float32()))})
MOST_REASONS = 20
LONGEST_REASON = 200


def write_labels(
    path: Path, labels: list[PseudoLabel], *, positions: list[int] | None = None, top_k: bool = False
) -> str:
    """Write one file of labels, with `positions` also their positions in the shard. Returns the file's checksum.

    Raises RlkdError naming the file and the space it needs if the disk is full.
    """
    schema = pa.schema([*SCHEMA, *TOP_K]) if top_k else SCHEMA
    columns = [pa.array(list(map(attrgetter(name), labels)), schema.field(name).type) for name in schema.names]
    table = pa.Table.from_arrays(columns, schema=schema)
    if positions is not None:
        table = table.append_column("position", pa.array(positions, pa.int64()))
    # In memory first: pyarrow's own writer aborts the interpreter on a full disk, and the checksum is then that of the
    # content, not of what reached the disk.
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    write_durably(path, content)
    return hashlib.sha256(content).hexdigest()


def read_partial(path: Path) -> dict[int, PseudoLabel]:
    """The labels of an interrupted shard by their position in it."""
    rows = pq.ParquetFile(path).read().to_pylist()
    return {row.pop("position"): PseudoLabel(**row) for row in rows}


def summarise(labels: list[PseudoLabel]) -> dict[str, Any]:
    """A shard's rows as the manifest describes them: counts by status and template, reasons, lengths."""
    reasons = Counter(reason(label.error) for label in labels if label.error is not None)
    templates: dict[str, Counter[str]] = {}
    for label in labels:
        templates.setdefault(label.template, Counter())[label.status] += 1
    made = [label for label in labels if label.status == "ok"]
    return {
        "status": {status: sum(counts[status] for counts in templates.values()) for status in STATUSES},
        "truncated": sum(bool(label.truncated) for label in made),
        "tokens": sum(label.n_out or 0 for label in made),
        "finish": dict(Counter(str(label.finish_reason) for label in made)),
        "templates": {name: dict(counts) for name, counts in templates.items()},
        "reasons": dict(reasons.most_common(MOST_REASONS)),
    }


def reason(error: str) -> str:
    """The first line of an error, short enough for a manifest."""
    return error.splitlines()[0][:LONGEST_REASON] if error else "unknown"


def load_pseudolabels(path: str | Path, *, statuses: tuple[str, ...] | None = ("ok",)) -> datasets.Dataset:
    """The rows of a finished folder in input order, columns as in PseudoLabel; statuses=None for all of them.

    Raises: DataError if the run is unfinished, its log is damaged or has gaps, a shard is missing or differs from its
    checksum, or columns are missing.
    """
    folder = local_copy(str(path))
    manifest = finished_manifest(folder)
    shards = [manifest.shards[k] for k in sorted(manifest.shards)]
    for shard in shards:
        if problem := shard_problem(manifest, shard):
            raise DataError(f"{problem}. Regenerate only that shard: rlkd data repair {folder}")
    rows = read_parquet([folder / shard["file"] for shard in shards])
    wanted = [field.name for field in fields(PseudoLabel) if field.name not in TOP_K.names]
    if missing := [name for name in wanted if name not in rows.column_names]:
        raise DataError(
            f"{folder} lacks the columns {', '.join(missing)}; found {', '.join(rows.column_names)}. "
            "Generate the labels again."
        )
    if statuses is not None:
        rows = datasets.Dataset(rows.data.table.filter(pc.is_in(rows.data.table["status"], pa.array(list(statuses)))))
    attach(rows, [_origin(folder, header) for header in manifest.headers])
    return rows


def _origin(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Where the labels of one generation come from, JSON-able."""
    return {
        "folder": str(folder),
        "generation": header["generation"],
        "dataset": ((header.get("labels") or header).get("request") or {}).get("dataset"),
        "vocabulary": header.get("vocabulary"),
        "settings": header["settings"],
    }


def labels_finished(path: str | Path) -> bool:
    """Whether the folder holds finished labels. Raises DataError if its log is damaged."""
    folder = Path(path)
    return Manifest.read(folder / MANIFEST).finished is not None and bool(finished_manifest(folder))
