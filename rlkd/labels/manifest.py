"""The commit log of a label folder: one JSON line per event, appended and flushed, each with its own checksum.

header    settings and source of the labels; another line if the run was continued with changed settings
shard     a shard was committed: file, rows, checksum, counts
partial   answers of a shard that a signal interrupted
dropped   damaged shards, to be regenerated
finished  totals; the run is complete

A folder may come from elsewhere: a line that names another file than its shard's, or lacks a field, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..io.files import explained, write_durably

FORMAT = 1
MANIFEST = "manifest.jsonl"
START = b'{"kind": "header"'
# Fields of each kind of line, and their JSON types.
FIELDS: dict[str, dict[str, type]] = {
    "header": {"generation": str, "settings": dict, "rows_per_shard": int, "scan": dict, "packages": dict},
    "shard": {"shard": int, "file": str, "inputs": int, "rows": int, "sha256": str, "generation": str, "status": dict,
              "truncated": int, "tokens": int, "finish": dict, "templates": dict, "reasons": dict},
    "partial": {"shard": int, "file": str, "rows": int, "sha256": str, "generation": str},
    "dropped": {"shards": list},
    "finished": {"shards": int, "inputs": int, "rows": int, "status": dict, "bad_rows": int},
}  # fmt: skip


def shard_name(k: int) -> str:
    return f"labels-{k:05d}.parquet"


def partial_name(k: int) -> str:
    return f"partial-{k:05d}.parquet"


def manifest_name(part: tuple[int, int] | None) -> str:
    """File name of the log of part (i, n) of a job array, or of a whole run."""
    return MANIFEST if part is None else f"manifest-{part[0]}-of-{part[1]}.jsonl"


@dataclass
class Manifest:
    """The log in memory. Reading tolerates a torn last line, lines that differ from their checksum and lines that occur
    twice (their numbers are in `damaged`): what they recorded counts as not done.
    """

    path: Path
    headers: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)
    partials: dict[int, dict[str, Any]] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    damaged: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The log at `path`; empty if there is none. Raises DataError if its header is not readable, or for a line that
        rlkd does not write.
        """
        manifest = cls(path)
        if not path.exists():
            return manifest
        content = path.read_bytes()
        lines = content.split(b"\n")
        torn = lines.pop()  # b"" if the last line is whole
        for number, line in enumerate(lines, 1):
            entry = _decode(line)
            if entry is not None and (problem := _foreign(entry)):
                raise DataError(f"{path}:{number}: {problem}. Get the labels from their source again.")
            if entry is None or not manifest._follows(entry):
                manifest.damaged.append(number)
            else:
                manifest._apply(entry)
        if torn:
            manifest.damaged.append(len(lines) + 1)
        # A run that was killed at once leaves a torn header; anything else is not ours to continue.
        if not manifest.headers and (len(lines) + bool(torn) > 1 or not START.startswith(content[: len(START)])):
            raise DataError(
                f"{path} is damaged: its first line, the header, is not readable. Restore it, or --overwrite."
            )
        return manifest

    @property
    def header(self) -> dict[str, Any]:
        """The settings in force."""
        return self.headers[-1]

    @property
    def part(self) -> tuple[int, int] | None:
        part = self.header["part"]
        return None if part is None else (part[0], part[1])

    def append(self, kind: str, **entry: Any) -> None:
        """Add one event. Raises RlkdError if the disk is full; the log is then as before."""
        record = {"kind": kind, **entry}
        line = _encode(record)
        if self.damaged:
            self.rewrite()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise explained(error, self.path, len(line)) from error
        self._apply(record)

    def rewrite(self) -> None:
        """Rewrite the log without its damaged lines."""
        self.damaged = []
        write_durably(self.path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The log as it would be had nothing been interrupted, dropped or damaged."""
        entries = [{"kind": "header", **header} for header in self.headers]
        entries += [{"kind": "shard", **self.shards[k]} for k in sorted(self.shards)]
        entries += [{"kind": "partial", **self.partials[k]} for k in sorted(self.partials)]
        entries += [{"kind": "finished", **self.finished}] if self.finished else []
        return b"".join(_encode(entry) for entry in entries)

    def _follows(self, entry: dict[str, Any]) -> bool:
        """Whether a run writes this line after those before: not twice, and nothing but `dropped` once finished."""
        match entry["kind"]:
            case "header":
                return self.finished is None and (not self.headers or entry != {"kind": "header", **self.headers[-1]})
            case "shard" | "partial":
                return self.finished is None and entry["shard"] not in self.shards
            case "finished":
                return self.finished is None
        return True

    def _apply(self, entry: dict[str, Any]) -> None:
        content = {key: value for key, value in entry.items() if key != "kind"}
        match entry["kind"]:
            case "header":
                self.headers.append(content)
            case "shard":
                self.shards[content["shard"]] = content
                self.partials.pop(content["shard"], None)
            case "partial":
                self.partials[content["shard"]] = content
            case "dropped":
                self.finished = None
                for k in content["shards"]:
                    self.shards.pop(k, None)
            case "finished":
                self.finished = content


def _encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False)
    return (json.dumps(record | {"check": _check(text)}, ensure_ascii=False) + "\n").encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is not as it was written."""
    try:
        record = json.loads(line)
        check = record.pop("check")
        intact = _encode(record).rstrip(b"\n") == line and check == _check(json.dumps(record, ensure_ascii=False))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return record if intact else None


def _foreign(entry: dict[str, Any]) -> str | None:
    """What a line holds that no run writes; None if it is one of ours."""
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"unknown kind {_short(kind)}"
    if kind == "header" and entry.get("format") != FORMAT:
        return (
            f"format {_short(entry.get('format'))}, but this version of rlkd reads {FORMAT}: use the one that wrote it"
        )
    for name, wanted in FIELDS[kind].items():
        value = entry.get(name)
        if type(value) is not wanted or (isinstance(value, int) and value < 0):
            return f"{kind}: {name} is {_short(value)}, not {'a count' if wanted is int else f'a {wanted.__name__}'}"
    if kind == "shard" and not all(_are_counts(entry[name]) for name in ("status", "finish", "templates", "reasons")):
        return f"shard {entry['shard']}: its counts are not numbers"
    if kind in ("shard", "partial"):
        canonical = shard_name(entry["shard"]) if kind == "shard" else partial_name(entry["shard"])
        if entry["file"] != canonical:
            return f"{kind} {entry['shard']} names the file {_short(entry['file'])}, not {canonical}"
    if kind == "header" and not _is_part(entry.get("part")):
        return f"header: part is {_short(entry['part'])}, not [i, n]"
    for name in ("request", "vocabulary", "labels") if kind == "header" else ():
        if not isinstance(entry.get(name), dict | None):
            return f"header: {name} is {_short(entry[name])}, not an object"
    return None


def _are_counts(value: Any) -> bool:
    return all(map(_are_counts, value.values())) if isinstance(value, dict) else type(value) is int


def _is_part(part: Any) -> bool:
    if part is None:
        return True
    return isinstance(part, list) and len(part) == 2 and all(type(i) is int for i in part) and 0 <= part[0] < part[1]


def _short(value: Any) -> str:
    """A value of unknown size and type, quoted in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
