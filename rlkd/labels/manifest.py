"""The commit log of a label folder: one JSON line per event, appended and flushed, each with its own checksum.

header    settings and source of the labels; another line if the run was continued with changed settings
shard     a shard was committed: file, rows, checksum, counts
partial   answers of a shard that a signal interrupted
dropped   damaged shards, to be regenerated
finished  totals; the run is complete
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


def manifest_name(part: tuple[int, int] | None) -> str:
    """File name of the log of part (i, n) of a job array, or of a whole run."""
    return MANIFEST if part is None else f"manifest-{part[0]}-of-{part[1]}.jsonl"


@dataclass
class Manifest:
    """The log in memory. Reading tolerates a torn last line and lines that differ from their checksum (their numbers
    are in `damaged`): what they recorded counts as not done.
    """

    path: Path
    headers: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)
    partials: dict[int, dict[str, Any]] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    damaged: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The log at `path`; empty if there is none. Raises DataError if its header is not readable."""
        manifest = cls(path)
        if not path.exists():
            return manifest
        lines = path.read_bytes().split(b"\n")
        torn = lines.pop()  # b"" if the last line is whole
        for number, line in enumerate(lines, 1):
            entry = _decode(line)
            if entry is None:
                manifest.damaged.append(number)
            else:
                manifest._apply(entry)
        if torn:
            manifest.damaged.append(len(lines) + 1)
        if not manifest.headers and len(lines) + bool(torn) > 1:
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
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return (
        record
        if _encode(record).rstrip(b"\n") == line and check == _check(json.dumps(record, ensure_ascii=False))
        else None
    )


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
