"""Whether a label run may write to a folder, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..io.cards import CARD
from ..io.files import refuse_links
from ..io.folders import refuse_other_contents
from .manifest import Manifest, manifest_name

BAD_ROWS = "bad_rows.jsonl"
BAD_BATCH = "not_finite.jsonl"


def check_output(out: Path, *, overwrite: bool, part: tuple[int, int] | None = None) -> Manifest:
    """The log of an unfinished run in `out`; empty if there is none. Raises DataError if `out` is taken and must not be
    overwritten: finished labels, a run with a different sharding, shards of unknown origin; ConfigError if it holds
    something else than labels.
    """
    name = manifest_name(part)
    refuse_others(out)
    refuse_links(out / name)
    if overwrite:
        return Manifest(out / name)
    manifest = Manifest.read(out / name)
    if manifest.finished:
        raise DataError(f"{out} already holds finished labels ({name}). Choose another folder, or pass --overwrite.")
    others = {file.name for file in out.glob("manifest*.jsonl")} - {name}
    foreign = [other for other in sorted(others) if part is None or not other.endswith(f"-of-{part[1]}.jsonl")]
    if foreign:
        raise DataError(
            f"{out} holds a run with a different sharding ({', '.join(foreign[:4])}; this one would write {name}). "
            "Choose another folder, or pass --overwrite."
        )
    if not others and not manifest.headers and any(out.glob("labels-*.parquet")):
        raise DataError(
            f"{out} holds label shards without {name}, so they cannot be verified. "
            "Choose another folder, or pass --overwrite."
        )
    return manifest


def refuse_others(out: Path) -> None:
    """Raise ConfigError if `out` holds something else than labels."""
    own = (BAD_ROWS, BAD_BATCH, "partial-*.parquet", "*.tmp")
    refuse_other_contents(out, "--out", signs=("manifest*.jsonl", "labels-*.parquet"), own=own)


def clear(out: Path, part: tuple[int, int] | None) -> None:
    """Remove what a run, or one part of it, wrote. The log is removed first: without it nothing looks finished."""
    if part is None:
        patterns = ["manifest*.jsonl", "labels-*.parquet", "partial-*.parquet", CARD, BAD_ROWS]
        files = [file for pattern in patterns for file in out.glob(pattern)]
    else:
        shards = [*out.glob("labels-*.parquet"), *out.glob("partial-*.parquet")]
        numbers = {file: file.stem.split("-")[1] for file in shards}
        own = [file for file, k in numbers.items() if k.isdecimal() and int(k) % part[1] == part[0]]
        files = [out / manifest_name(None), out / manifest_name(part), *own]
    for file in files:
        file.unlink(missing_ok=True)


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per setting that differs; nested ones are named as in `source.sha256`."""
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changes(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"  {prefix}{key}: {before!r} -> {after!r}")
    return lines


def refuse(out: Path, changed: list[str], remedy: str) -> None:
    """Raise DataError: the folder holds an unfinished run with other settings."""
    raise DataError(
        f"{out} holds an unfinished run with other settings:\n"
        + "\n".join(changed)
        + f"\nChoose another folder, {remedy}or pass --overwrite."
    )
