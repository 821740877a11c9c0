"""Label folders after the run: check them, merge the parts of a job array, set damaged shards aside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from ..io.cards import CARD
from ..io.files import write_durably
from ..io.lock import writer_lock
from .card import card
from .folder import BAD_ROWS, changes
from .manifest import MANIFEST, Manifest
from .store import damage, total

DAMAGED = "damaged"


def manifests(folder: Path) -> list[Manifest]:
    """Every log in a folder. Raises DataError if there is none."""
    found = [Manifest.read(file) for file in sorted(folder.glob("manifest*.jsonl"))]
    if not any(manifest.headers for manifest in found):
        raise DataError(f"{folder} holds no labels: no {MANIFEST} and no manifest of a part there.")
    return [manifest for manifest in found if manifest.headers]


def verify(folder: Path) -> list[str]:
    """All problems of a label folder: checksums, row counts, order, gaps, damaged lines of its logs.

    Raises DataError if the folder holds no labels.
    """
    problems = []
    for manifest in manifests(folder):
        problems += [f"{manifest.path}, line {number}, differs from its checksum" for number in manifest.damaged]
        if manifest.finished is None:
            problems.append(f"{manifest.path} is not finished: repeat its command")
        for _, found in _shard_problems(manifest):
            problems.append(found)
        problems += _gaps(manifest)
    return problems


def repair(folder: Path, *, dry_run: bool = False) -> tuple[list[str], dict[str, Any] | None]:
    """Move damaged shards aside (folder `damaged`) and take them, and damaged lines, out of the log.

    Returns: what was dropped, or would be with dry_run, and the recorded request that regenerates it; None if the
    labels were not made by the command line.
    """
    dropped: list[str] = []
    request = None
    for manifest in manifests(folder):
        problems = dict(_shard_problems(manifest))
        lost = bool(manifest.damaged) or manifest.finished is None
        if not problems and not lost:
            continue
        dropped += [*problems.values(), *([f"{manifest.path}: unfinished or damaged"] if lost else [])]
        request = manifest.header["request"]
        if dry_run:
            continue
        with writer_lock(manifest.path):
            for k in problems:
                file = folder / manifest.shards[k]["file"]
                if file.exists():
                    (folder / DAMAGED).mkdir(exist_ok=True)
                    os.replace(file, folder / DAMAGED / file.name)
            manifest.append("dropped", shards=list(problems))
    return dropped, request


def merge(out: Path, parts: list[Path]) -> dict[str, Any]:
    """Merge finished parts into `out`: the same shards, in the same order, as one process writes. Returns totals.

    parts are folders; none means that all parts were written to `out` itself. Raises DataError if parts are unfinished,
    damaged, made with different settings, missing or given twice, or if `out` is taken.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in parts or [out]))
    logs = [manifest for folder in folders for manifest in manifests(folder) if manifest.part is not None]
    if not logs:
        raise DataError(f"{', '.join(map(str, folders))}: no part of a job array (manifest-I-of-N.jsonl).")
    _check_parts(logs)
    shards = {k: (log.path.parent, shard) for log in logs for k, shard in log.shards.items()}
    if missing := sorted(set(range(max(shards, default=-1) + 1)) - set(shards)):
        raise DataError(f"the parts are missing the shards {', '.join(map(str, missing[:10]))}: a part is incomplete.")
    out.mkdir(parents=True, exist_ok=True)
    with writer_lock(out / MANIFEST):
        merged = Manifest.read(out / MANIFEST)
        if merged.headers:
            raise DataError(f"{out} already holds labels ({MANIFEST}). Choose another folder.")
        for k in sorted(shards):
            folder, shard = shards[k]
            _copy(folder, out, shard)
        totals = _finish(merged, logs, [shards[k][1] for k in sorted(shards)])
        for log in logs:
            if log.path.parent == out.resolve():
                log.path.unlink()
    return totals


def _finish(merged: Manifest, logs: list[Manifest], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the card and the log of the merged parts."""
    out, first = merged.path.parent, logs[0]
    request = first.header["request"]
    merged.headers = [first.header | {"part": None, "request": request and request | {"shard": None}}]
    merged.shards = {shard["shard"]: shard for shard in shards}
    merged.finished = total(shards) | {"bad_rows": first.finished["bad_rows"] if first.finished else 0}
    bad = first.path.parent / BAD_ROWS
    if bad.exists() and bad.parent != out.resolve():
        write_durably(out / BAD_ROWS, bad.read_bytes())
    write_durably(out / CARD, card(merged.header, merged.finished).encode())
    merged.rewrite()
    return merged.finished


def _check_parts(logs: list[Manifest]) -> None:
    first = logs[0]
    _, n = first.part or (0, 1)
    for log in logs:
        if log.finished is None or log.damaged:
            raise DataError(f"{log.path} is not finished: repeat its command, then merge.")
        if log.header["generation"] != first.header["generation"] or len(log.headers) > 1:
            changed = changes(first.header["settings"], log.header["settings"])
            raise DataError("\n".join([f"{log.path} has different settings from {first.path}:", *changed]))
        if (log.part or (0, 1))[1] != n or log.header["rows_per_shard"] != first.header["rows_per_shard"]:
            raise DataError(f"{log.path} and {first.path} have different shardings: use the same n and shard_rows.")
    numbers = [(log.part or (0, 1))[0] for log in logs]
    if twice := sorted({i for i in numbers if numbers.count(i) > 1}):
        raise DataError(f"part {twice[0]} of {n} is given {numbers.count(twice[0])} times: give each part once.")
    if missing := sorted(set(range(n)) - set(numbers)):
        raise DataError(
            f"{len(numbers)} of {n} parts found; missing: {', '.join(f'{i}/{n}' for i in missing[:10])}. "
            "Run them, or name their folders."
        )


def _copy(folder: Path, out: Path, shard: dict[str, Any]) -> None:
    if problem := damage(folder, shard):
        raise DataError(f"{problem}. Repair that part first: rlkd data repair {folder}")
    if folder != out.resolve():
        write_durably(out / shard["file"], (folder / shard["file"]).read_bytes())


def _shard_problems(manifest: Manifest) -> list[tuple[int, str]]:
    """(shard, problem) of every shard with a file that does not match the log."""
    folder = manifest.path.parent
    found = []
    for k, shard in sorted(manifest.shards.items()):
        if problem := damage(folder, shard) or _wrong_rows(folder, shard, manifest):
            found.append((k, problem))
    return found


def _wrong_rows(folder: Path, shard: dict[str, Any], manifest: Manifest) -> str | None:
    """The problem, unless the rows are those of the shard's block, in order, each as often as it has labels."""
    file = folder / shard["file"]
    try:
        rows = pq.read_table(file, columns=["row"]).column("row").to_pylist()
    except (pa.ArrowException, OSError) as error:
        return f"{file} is not readable: {str(error).splitlines()[0]}"
    each = shard["rows"] // max(shard["inputs"], 1)
    first = shard["shard"] * manifest.header["rows_per_shard"]
    wanted = [first + i for i in range(shard["inputs"]) for _ in range(each)]
    return (
        None if rows == wanted else f"{file} does not hold the labels of rows {first} .. {first + shard['inputs'] - 1}"
    )


def _gaps(manifest: Manifest) -> list[str]:
    """Shards that are missing from a log."""
    i, n = manifest.part or (0, 1)
    size, inputs = manifest.header["rows_per_shard"], manifest.header["scan"].get("rows")
    last = -(-inputs // size) if inputs else max(manifest.shards, default=-1) + 1
    missing = [k for k in range(i, last, n) if k not in manifest.shards]
    return [f"{manifest.path} lacks the shards {', '.join(map(str, missing[:10]))}"] if missing else []


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`. Raises DataError unless 0 <= i < n."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise DataError(f"--shard {text}: allowed is i/n with 0 <= i < n, such as 0/4.")
    return int(i), int(n)
