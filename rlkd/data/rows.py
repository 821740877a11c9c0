"""Rows as a data set, from local files or from the hub, checked before any model loads."""

from __future__ import annotations

import re
from pathlib import Path

import datasets

from ..errors import DataError
from .aliases import hub_id
from .row_files import SUFFIXES, allowed_sources, check_columns, first_line, nearest_file, parquet_table, read_table

__all__ = ["check_columns", "check_text_column", "load_rows", "read_parquet"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_rows(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> datasets.Dataset:
    """Rows of a local file, of a folder of parquet shards, or of a hub data set.

    Args: source, a path (.jsonl, .json, .csv, .tsv, .parquet, or a folder) or a hub id; split, a hub split, or the
    shards `<split>*.parquet` of a folder whose shards are named by split (one file has one split, whatever its name);
    subset and revision, of a hub data set only (an old name such as glue stands for its home
    today, nyu-mll/glue); limit keeps the first rows.
    In CSV and TSV a column of whole numbers only is read as integers, every other one as text.
    Raises: DataError that names the file, the line where there is one, and the remedy.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit = {limit}: the number of rows to keep must be at least 1. Leave it out to keep all.")
    path = Path(source).expanduser()
    if path.exists():
        if subset or revision or "[" in split:
            raise DataError(
                f"'{source}' is local: it has no subset, revision or split slice. "
                "Leave them out, or use limit to keep the first rows."
            )
        rows = datasets.Dataset(read_table(path, split))
    elif path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(source):
        raise DataError(f"'{source}' does not exist.{nearest_file(path)} Allowed: {allowed_sources()}.")
    else:
        rows = _load_hub(source, split, subset, revision)
    if len(rows) == 0:
        raise DataError(f"'{source}' has no rows. At least one is needed: check the file or the split '{split}'.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def read_parquet(files: list[Path]) -> datasets.Dataset:
    """The rows of parquet files, in the order given. Raises DataError naming the file that does not fit."""
    return datasets.Dataset(parquet_table(files))


def check_text_column(dataset: datasets.Dataset, column: str, source: str, *, lists: bool = False) -> None:
    """Raise DataError unless `column` holds text (or, with `lists`, lists of texts)."""
    kind = dataset.features[column]
    if lists and isinstance(kind, (datasets.List, datasets.LargeList)):
        kind = kind.feature
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        allowed = "text or lists of texts" if lists else "text"
        raise DataError(
            f"'{source}': column '{column}' holds {dataset.features[column]}, not {allowed}. "
            "Convert it, or name another column."
        )


def _load_hub(source: str, split: str, subset: str | None, revision: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(hub_id(source), subset, split=split, revision=revision)
    # The library, the hub client and the HTTP stack each have errors of their own; all mean the same to the user.
    except Exception as error:
        home = f"'{source}'" if hub_id(source) == source else f"'{source}' (on the hub: {hub_id(source)})"
        wanted = home + (f", subset '{subset}'" if subset else "") + f", split '{split}'"
        raise DataError(
            f"{wanted} is neither a path here nor a data set that could be loaded from the hub.\n"
            f"  {type(error).__name__}: {first_line(error)}\n"
            f"Check the name, the subset and the split. Local data: {allowed_sources()}."
        ) from error
