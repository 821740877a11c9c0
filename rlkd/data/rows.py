"""Rows from the hub or from local files, checked before any model loads: as a table (`load_rows`), or as a stream in
constant memory (`RowStream`). Both give the same rows.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..checks import check_choice
from ..choices import OnBadRow
from ..errors import DataError, nearest
from .files import (
    SUFFIXES,
    BadRowError,
    ParquetFiles,
    Reader,
    allowed_sources,
    first_line,
    open_local,
    same_schema,
    unreadable,
)

if TYPE_CHECKING:
    # Imported only where a data set is created: it takes most of a second, and reading local rows does not need it.
    import datasets

logger = logging.getLogger(__name__)

WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
KINDS = {bool: "bool", int: "integer", float: "number", str: "str", list: "list", dict: "dict"}
NUMBERS = {"integer", "number"}


def load_rows(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    quoted: bool = True,
    on_bad_row: OnBadRow = "fail",
) -> datasets.Dataset:
    """Rows of a local file, of a folder of parquet shards, or of a hub data set.

    Args: source, a path (.jsonl, .json, .csv, .tsv, .parquet, or a folder) or a hub id; split, a hub split, or the
    shards `<split>*.parquet` of a folder whose shards are named by split (a single file has one split, whatever this
    says); subset and revision, of a hub data set; limit keeps the first rows; columns, the column names of a CSV or TSV
    file without a header; quoted, False if quotes in such a file are ordinary characters (GLUE); on_bad_row, as in
    `RowStream`.
    In CSV and TSV files a column of whole numbers only is read as integers, all others as text.
    Raises: DataError that names the file, the line if there is one, and the remedy; ConfigError for another on_bad_row.
    """
    check_choice("on_bad_row", on_bad_row, OnBadRow)
    check_limit(limit)
    path = local_path(source, split=split, subset=subset, revision=revision)
    if path is not None:
        rows = _load_local(open_local(path, split, columns=columns, quoted=quoted), on_bad_row)
    elif columns is not None or not quoted:
        raise DataError(f"'{source}' is a hub data set: only a local .csv or .tsv file takes columns or quoted.")
    else:
        rows = _load_hub(source, split, subset, revision)
    if len(rows) == 0:
        raise no_rows(source, split)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def local_path(
    source: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Path | None:
    """The path of a local source, None for a hub id. Raises DataError if it is neither, or local with hub settings."""
    path = Path(source).expanduser()
    if path.exists():
        if subset or revision or "[" in split:
            raise DataError(
                f"'{source}' is local: it has no subset, revision or split slice. "
                "Leave them out, or use limit to keep the first rows."
            )
        return path
    if path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(source):
        raise DataError(f"'{source}' does not exist.{_nearest_file(path)} Allowed: {allowed_sources()}.")
    return None


def check_limit(limit: int | None) -> None:
    """Raise DataError for a limit below 1."""
    if limit is not None and limit < 1:
        raise DataError(f"limit = {limit}: the number of rows to keep must be at least 1. Leave it out to keep all.")


def no_rows(source: str, split: str) -> DataError:
    """The error of a source without rows."""
    return DataError(f"'{source}' has no rows. At least one is needed: check the file or the split '{split}'.")


def check_columns(rows: datasets.Dataset | list[str], wanted: dict[str, str], source: str) -> None:
    """Raise DataError, listing missing and present columns, unless every column of `wanted` (role -> column) exists."""
    found = rows if isinstance(rows, list) else rows.column_names
    missing = [f"{role}: '{name}'.{nearest(name, found)}" for role, name in wanted.items() if name not in found]
    if missing:
        raise DataError(
            f"'{source}' lacks {len(missing)} of the requested columns.\n  missing  "
            + "\n           ".join(missing)
            + f"\n  found    {', '.join(found)}\nName one of the columns found, or rename the column in the data."
        )


def check_text_column(dataset: datasets.Dataset, column: str, source: str, *, lists: bool = False) -> None:
    """Raise DataError unless `column` holds text (or, with `lists`, lists of texts)."""
    import datasets

    kind = dataset.features[column]
    if lists and isinstance(kind, (datasets.List, datasets.LargeList)):
        kind = kind.feature
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise not_text(source, column, dataset.features[column], lists=lists)


def not_text(place: str, column: str, found: Any, *, lists: bool) -> BadRowError:
    """The error of a column, or of one row's value, that must be text."""
    allowed = "text or lists of texts" if lists else "text"
    return BadRowError(
        f"'{place}': column '{column}' contains {found}, not {allowed}. Convert it, or name another column."
    )


def read_parquet(files: list[Path]) -> datasets.Dataset:
    """The rows of parquet files, in the order given. Raises DataError with the file that is damaged or differs."""
    import datasets

    same_schema(files)
    tables: list[pa.Table] = []
    for file in files:
        try:
            tables.append(pq.ParquetFile(file).read())
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, error) from error
    return datasets.Dataset(pa.concat_tables(tables))


class Columns:
    """Names and types of the columns, inferred row by row; in CSV, where all values are text, whole numbers too."""

    def __init__(self, kinds: dict[str, str] | None = None):
        self.kinds: dict[str, str] = dict(kinds or {})
        self._first: dict[str, int] = {}

    def add(self, place: int, row: dict[str, Any], reader: Reader) -> None:
        """Take a row into account. Raises BadRowError if a value's type differs from that in earlier rows."""
        kinds, cells = self.kinds, reader.cells
        for name, value in row.items():
            kind = KINDS.get(type(value)) or type(value).__name__
            if cells and kinds.get(name, "integer") == "integer" and WHOLE_NUMBER.fullmatch(value):
                kind = "integer"
            known = kinds.get(name, "null")
            if kind == known or value is None:
                kinds.setdefault(name, known)
            elif known == "null" or cells or {kind, known} == NUMBERS:
                kinds[name] = "number" if kind in NUMBERS and known in NUMBERS else kind
                self._first.setdefault(name, place)
            else:
                raise BadRowError(
                    f"{reader.where(place)}: column '{name}' has type {_shown(known)} in line "
                    f"{self._first.get(name, 1)} but {_shown(kind)} in line {place}. Give it one type everywhere."
                )

    def complete(self, *, cells: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A function that completes a row as in a table: all columns, and one type of number per column."""
        width, empty = len(self.kinds), dict.fromkeys(self.kinds)
        kind, to = ("integer", int) if cells else ("number", float)
        numbers = [name for name, known in self.kinds.items() if known == kind]

        def complete(row: dict[str, Any]) -> dict[str, Any]:
            if len(row) < width:
                row = empty | row
            for name in numbers:
                if row[name] is not None:
                    row[name] = to(row[name])
            return row

        return complete


def _shown(kind: str) -> str:
    return "number" if kind in NUMBERS else kind


@dataclass(frozen=True)
class Scan:
    """What a pass over a source found: identity, which changes with the data; columns, name -> type; rows, the number
    of usable rows, None if unknown before reading (hub data); bad, the places of bad rows.
    """

    identity: dict[str, Any]
    columns: dict[str, str]
    rows: int | None
    bad: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RowStream:
    """Rows of a source in order, in constant memory; arguments as in `load_rows`.

    on_bad_row: `fail` at the first row that cannot be used, or `skip` such rows and count them.
    """

    def __init__(
        self,
        source: str,
        *,
        split: str = "train",
        subset: str | None = None,
        limit: int | None = None,
        on_bad_row: OnBadRow = "fail",
    ):
        check_choice("on_bad_row", on_bad_row, OnBadRow)
        check_limit(limit)
        self.source, self.split, self.limit, self.on_bad_row = source, split, limit, on_bad_row
        self.path = local_path(source, split=split, subset=subset)
        self.reader: Reader
        if self.path is None:
            from .hub import HubRows

            self.reader = HubRows(source, split, subset)
        else:
            self.reader = open_local(self.path, split)

    def identity(self) -> dict[str, Any]:
        """Checksum of a local source's contents, or repository and commit of hub data."""
        if self.path is None:
            return {**self.reader.identity(), "limit": self.limit}  # type: ignore[attr-defined]
        files = self.reader.files if isinstance(self.reader, ParquetFiles) else [self.path]
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return {"sha256": digest.hexdigest(), "limit": self.limit, "on_bad_row": self.on_bad_row}

    def scan(
        self,
        check: Callable[[str, dict[str, Any]], str | None] = lambda where, row: None,
        quarantine: Callable[[dict[str, Any]], None] = lambda bad: None,
    ) -> Scan:
        """Read a local source once: every row must parse, have the types of the rows before it and pass `check`.

        check is called with the row's place in words and the row; it raises BadRowError for a bad row and returns the
        row's unique id (None: the row number). quarantine is called with {"place", "error", "record"} of each skipped
        row. Of hub data only the columns are read.
        Raises: DataError for the first bad row (on_bad_row = fail), for repeated ids, or if no row is left.
        """
        if self.path is None:
            return Scan(self.identity(), self.reader.columns(), self.reader.count(self.limit))  # type: ignore[attr-defined]
        columns, rows, bad, ids = Columns(), 0, array("q"), array("q")
        for place, raw in self.reader.records():
            if rows == self.limit:
                break
            try:
                row = self.reader.parse(place, raw)
                name = check(self.reader.where(place), row)
                columns.add(place, row, self.reader)
            except BadRowError as error:
                if self.on_bad_row == "fail":
                    raise
                bad.append(place)
                record = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
                quarantine({"place": place, "error": str(error), "record": None if record is error else record})
                continue
            rows += 1
            if name is not None:
                ids.append(hash(name))
        if rows == 0:
            raise no_rows(self.source, self.split)
        scan = Scan(self.identity(), columns.kinds, rows, bad.tolist())
        if len(ids):
            self._refuse_repeated(ids, scan, check)
        return scan

    def blocks(self, scan: Scan, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, list[dict]]]:
        """(k, number of the first row, rows) of every wanted block k of `size` rows; the others are skipped unparsed.

        Raises DataError if the source has changed since the scan.
        """
        bad, parse = frozenset(scan.bad), self.reader.parse
        complete = Columns(scan.columns).complete(cells=self.reader.cells) if self.path else lambda row: row
        block: list[dict] = []
        number, k, take = 0, 0, wanted(0)
        for place, raw in self.reader.records():
            if number == self.limit:
                break
            if place in bad:
                continue
            if take:
                block.append(complete(parse(place, raw)))
            number += 1
            if number % size == 0:
                if take:
                    yield k, number - size, block
                block, k = [], k + 1
                take = wanted(k)
        if block:
            yield k, k * size, block
        if self.path is not None and number != scan.rows:
            raise DataError(f"'{self.source}' had {scan.rows} rows and now has {number}: it changed during the run.")

    def _refuse_repeated(self, ids: array, scan: Scan, check: Callable[[str, dict[str, Any]], str | None]) -> None:
        """Raise DataError for repeated ids. Hashes take 8 bytes a row; only rows whose hash repeats are read again."""
        hashes = np.frombuffer(ids, dtype=np.int64).copy()
        hashes.sort()
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not repeated:
            return
        first: dict[str, str] = {}
        for place, raw in self.reader.records():
            if place in set(scan.bad):
                continue
            where = self.reader.where(place)
            name = check(where, self.reader.parse(place, raw))
            if name in first:
                raise DataError(f"{where}: the id '{name}' is also used in {first[name]}. Ids must be unique.")
            if name is not None and hash(name) in repeated:
                first[name] = where


def _load_local(reader: Reader, on_bad_row: OnBadRow) -> datasets.Dataset:
    import datasets

    if isinstance(reader, ParquetFiles):
        return read_parquet(reader.files)
    columns = Columns()
    rows: list[dict[str, Any]] = []
    bad: list[BadRowError] = []
    for place, raw in reader.records():
        try:
            row = reader.parse(place, raw)
            columns.add(place, row, reader)
        except BadRowError as error:
            if on_bad_row == "fail":
                raise
            bad.append(error)
        else:
            rows.append(row)
    if bad:
        logger.warning("skipped %d bad rows; the first: %s", len(bad), bad[0])
    complete = columns.complete(cells=reader.cells)
    rows = [complete(row) for row in rows]
    arrays = {}
    for name in columns.kinds:
        try:
            arrays[name] = pa.array([row[name] for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(
                f"{reader.path}: column '{name}' has values that do not fit one type: "  # type: ignore[attr-defined]
                f"{first_line(error)}. Give it one type everywhere."
            ) from error
    return datasets.Dataset(pa.table(arrays))


def _load_hub(source: str, split: str, subset: str | None, revision: str | None) -> datasets.Dataset:
    from .hub import load_hub

    return load_hub(source, split, subset, revision, streaming=False)


def _nearest_file(path: Path) -> str:
    return (
        nearest(path.name, [p.name for p in path.parent.iterdir()])
        if path.parent.is_dir()
        else f" Folder {path.parent} does not exist."
    )
