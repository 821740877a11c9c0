"""Whether a label folder is whole: its log, and the shards that the log lists. Every reader of labels asks here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.files import first_line
from ..data.flaws import FlawCounts
from ..errors import DataError
from ..io.files import sha256
from .manifest import MANIFEST, Manifest

STATUSES = ("ok", "skipped", "failed")
SHOWN = 10


def finished_manifest(folder: Path) -> Manifest:
    """The log of a finished folder. Raises DataError with what to do if it is not finished, or not whole."""
    manifest = Manifest.read(folder / MANIFEST)
    if manifest.finished is None:
        if parts := sorted(file.name for file in folder.glob("manifest-*-of-*.jsonl")):
            raise DataError(
                f"{folder} holds {len(parts)} parts of a job array ({', '.join(parts[:4])}). "
                f"Merge them once all are finished: rlkd data merge {folder}"
            )
        state = "an unfinished run: repeat its command to finish it" if manifest.headers else "no labels"
        raise DataError(
            f"{folder} has no finished {MANIFEST}, so it contains {state}. "
            f"Labels are written by: rlkd generate-pseudolabels --out {folder}"
        )
    if problem := next(log_problems(manifest), None):
        raise DataError(
            f"{problem}. List all problems: rlkd data verify {folder}; regenerate: rlkd data repair {folder}"
        )
    return manifest


def log_problems(manifest: Manifest) -> Iterator[str]:
    """What a log lacks or contradicts: damaged lines, no end, gaps, totals that are not the sums of its shards."""
    for number in manifest.damaged:
        yield f"{manifest.path}, line {number}, differs from its checksum, or is there twice"
    if manifest.finished is None:
        yield f"{manifest.path} is not finished: repeat its command"
    if missing := list(islice(_gaps(manifest), SHOWN)):
        yield f"{manifest.path} lacks the shards {', '.join(map(str, missing))}"
    known = {header["generation"] for header in manifest.headers}
    for k, shard in sorted(manifest.shards.items()):
        if shard["generation"] not in known:
            yield f"{manifest.path}: shard {k} was made with settings that the log lacks"
    if manifest.finished is not None and (problem := _wrong_totals(manifest)):
        yield problem


def shard_problem(manifest: Manifest, shard: dict[str, Any]) -> str | None:
    """What is wrong with the file of a shard, or with its rows; None if it is as the log says."""
    return damage(manifest.path.parent, shard) or _wrong_rows(manifest, shard)


def damage(folder: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with the file of a shard; None if it is as it was committed."""
    file = folder / shard["file"]
    if not file.is_file():
        return f"{file} is missing"
    return None if sha256(file) == shard["sha256"] else f"{file} differs from its checksum"


def total(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of what `summarise` counted in each shard."""
    sums: dict[str, Any] = {"shards": len(shards), "inputs": 0, "rows": 0, "truncated": 0, "tokens": 0}
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "finish", "reasons")}
    counts["status"].update(dict.fromkeys(STATUSES, 0))  # a part of a job array may have no shard
    templates: dict[str, Counter[str]] = {}
    for shard in shards:
        for name in ("inputs", "rows", "truncated", "tokens"):
            sums[name] += shard[name]
        for name, counter in counts.items():
            counter.update(shard[name])
        for name, by_status in shard["templates"].items():
            templates.setdefault(name, Counter()).update(by_status)
    sums |= {name: dict(counter) for name, counter in counts.items()}
    flaws = FlawCounts()
    for shard in shards:
        flaws.merge(shard.get("flaws", {}))
    if counted := flaws.to_json():
        sums["flaws"] = counted
    return sums | {"templates": {name: dict(counter) for name, counter in templates.items()}}


def _wrong_totals(manifest: Manifest) -> str | None:
    """How the `finished` line contradicts the sums of the shards."""
    told, sums = manifest.finished or {}, total(list(manifest.shards.values()))
    wrong = [name for name, value in sums.items() if told.get(name, value) != value]
    shown = ", ".join(f"{name} {told[name]} against {sums[name]}" for name in wrong[:2])
    return f"{manifest.path}: 'finished' differs from the sums of its shards ({shown})" if wrong else None


def _gaps(manifest: Manifest) -> Iterator[int]:
    """Shards that are missing from a log."""
    i, n = manifest.part or (0, 1)
    size, inputs = manifest.header["rows_per_shard"], manifest.header["scan"].get("rows")
    known = isinstance(inputs, int) and inputs > 0 and size > 0
    last = -(-inputs // size) if known else max(manifest.shards, default=-1) + 1
    return (k for k in range(i, last, n) if k not in manifest.shards)


def _wrong_rows(manifest: Manifest, shard: dict[str, Any]) -> str | None:
    """The problem, unless the rows are those of the shard's block, in order, each as often as it has labels, and as
    many of each status as the log counts.
    """
    file = manifest.path.parent / shard["file"]
    try:
        table = pq.read_table(file, columns=["row", "status", "generation"])
    except (pa.ArrowException, OSError) as error:
        return f"{file} is not readable: {first_line(error)}"
    rows = table["row"].to_numpy()
    each, rest = divmod(len(rows), max(shard["inputs"], 1))
    first = shard["shard"] * manifest.header["rows_per_shard"]
    if rest or len(rows) != shard["rows"] or (rows != first + np.arange(len(rows)) // max(each, 1)).any():
        return f"{file} does not hold the labels of rows {first} .. {first + shard['inputs'] - 1}"
    counts = Counter({entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(table["status"])})
    if +Counter(shard["status"]) != counts or pc.unique(table["generation"]).to_pylist() != [shard["generation"]]:
        return f"{file} holds other rows than {manifest.path.name} lists: status or generation differ"
    return None
