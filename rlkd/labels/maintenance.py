"""Label folders after the run: check them, merge the parts of a job array, set damaged shards aside."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..io.cards import CARD
from ..io.files import refuse_links, write_durably
from ..io.lock import writer_lock
from .card import card
from .folder import BAD_ROWS, changes, refuse_others
from .integrity import SHOWN, log_problems, shard_problem, total
from .manifest import MANIFEST, Manifest

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
    problems, found = [], manifests(folder)
    for manifest in found:
        problems += [*log_problems(manifest), *(problem for _, problem in _shard_problems(manifest))]
    if all(manifest.finished for manifest in found):
        listed = {shard["file"] for manifest in found for shard in manifest.shards.values()}
        files = (file for file in sorted(folder.glob("labels-*.parquet")) if file.name not in listed)
        problems += [f"{file} is in no log: remove it" for file in files]
    return problems


def repair(folder: Path, *, dry_run: bool = False) -> tuple[list[str], list[dict[str, Any] | None]]:
    """Move damaged shards aside (folder `damaged`) and take them, and damaged lines, out of the log.

    Returns: what was dropped, or would be with dry_run, and the recorded requests that regenerate it, one per log; None
    for labels that the command line did not make.
    """
    dropped: list[str] = []
    requests: list[dict[str, Any] | None] = []
    for manifest in manifests(folder):
        problems, lost = dict(_shard_problems(manifest)), list(log_problems(manifest))
        if not problems and not lost:
            continue
        dropped += [*problems.values(), *lost]
        requests.append(manifest.header["request"])
        if dry_run:
            continue
        refuse_links(manifest.path, folder / DAMAGED)
        with writer_lock(manifest.path):
            for k in problems:
                file = folder / manifest.shards[k]["file"]
                if file.exists():
                    (folder / DAMAGED).mkdir(exist_ok=True)
                    os.replace(file, folder / DAMAGED / file.name)
            manifest.append("dropped", shards=list(problems))
    return dropped, requests


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
    refuse_others(out)
    shards = {k: (log, shard) for log in logs for k, shard in log.shards.items()}
    with writer_lock(out / MANIFEST):
        merged = Manifest.read(out / MANIFEST)
        if merged.headers:
            raise DataError(f"{out} already holds labels ({MANIFEST}). Choose another folder.")
        for k in sorted(shards):
            _copy(*shards[k], out)
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
    refuse_links(bad)
    if bad.exists() and bad.parent != out.resolve():
        write_durably(out / BAD_ROWS, bad.read_bytes())
    write_durably(out / CARD, card(merged.header, merged.finished).encode())
    merged.rewrite()
    return merged.finished


def _check_parts(logs: list[Manifest]) -> None:
    first = logs[0]
    _, n = first.part or (0, 1)
    for log in logs:
        if log.finished is None:
            raise DataError(f"{log.path} is not finished: repeat its command, then merge.")
        if log.header["generation"] != first.header["generation"] or len(log.headers) > 1:
            changed = changes(first.header["settings"], log.header["settings"])
            raise DataError("\n".join([f"{log.path} has different settings from {first.path}:", *changed]))
        if (log.part or (0, 1))[1] != n or log.header["rows_per_shard"] != first.header["rows_per_shard"]:
            raise DataError(f"{log.path} and {first.path} have different shardings: use the same n and shard_rows.")
    numbers = [(log.part or (0, 1))[0] for log in logs]
    if twice := sorted({i for i in numbers if numbers.count(i) > 1}):
        raise DataError(f"part {twice[0]} of {n} is given {numbers.count(twice[0])} times: give each part once.")
    if missing := list(islice((i for i in range(n) if i not in numbers), SHOWN)):
        raise DataError(
            f"{len(numbers)} of {n} parts found; missing: {', '.join(f'{i}/{n}' for i in missing)}. "
            "Run them, or name their folders."
        )
    for log in logs:
        if problem := next(log_problems(log), None):
            raise DataError(f"{problem}. Repair that part first: rlkd data repair {log.path.parent}")


def _copy(log: Manifest, shard: dict[str, Any], out: Path) -> None:
    folder = log.path.parent
    if problem := shard_problem(log, shard):
        raise DataError(f"{problem}. Repair that part first: rlkd data repair {folder}")
    if folder != out.resolve():
        write_durably(out / shard["file"], (folder / shard["file"]).read_bytes())


def _shard_problems(manifest: Manifest) -> list[tuple[int, str]]:
    """(shard, problem) of every shard with a file that does not match the log."""
    found = ((k, shard_problem(manifest, shard)) for k, shard in sorted(manifest.shards.items()))
    return [(k, problem) for k, problem in found if problem]


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`. Raises DataError unless 0 <= i < n."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise DataError(f"--shard {text}: allowed is i/n with 0 <= i < n, such as 0/4.")
    return int(i), int(n)
