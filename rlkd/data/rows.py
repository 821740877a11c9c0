"""Rows from the hub or from local files, checked before any model loads: as a table (`load_rows`), or as a stream in
constant memory (`RowStream`). Both give the same rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..checks import check_choice
from ..choices import OnBadRow
from ..errors import DataError, nearest
from ..io.remote import local_copy
from .columns import UNREAD, Columns
from .files import SUFFIXES, allowed_sources, is_pattern, open_local
from .readers import FILE, Reader
from .tables import TableFiles, as_dataset
from .text import PLAIN, TextFormat, plain_suffix
from .values import BadRowError

if TYPE_CHECKING:
    # Imported only where a data set is created: it takes most of a second, and reading local rows does not need it.
    import datasets

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_rows(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    text_format: TextFormat = PLAIN,
    only: Collection[str] | None = None,
    on_bad_row: OnBadRow = "fail",
) -> datasets.Dataset:
    """Rows of local files or of a hub data set.

    Args: source, a path (a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file, the text files also compressed;
    a pattern with *; a folder, see `open_local`) or a hub id; split, a hub split, or that of a folder whose files are
    named by split (a single file has one split, whatever this says); subset and revision, of a hub data set; limit
    keeps the first rows; text_format, of text files; only, the columns to read, those that exist (None: all);
    on_bad_row, as in `RowStream`.
    In CSV and TSV files a column of whole numbers only is read as integers, all others as text.
    Raises: DataError that names the file, the line if there is one, and the remedy; ConfigError for another on_bad_row.
    """
    where = {"split": split, "subset": subset, "revision": revision}
    return load_table(source, where, limit=limit, text_format=text_format, only=only, on_bad_row=on_bad_row)[0]


def load_table(
    source: str,
    where: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    text_format: TextFormat = PLAIN,
    only: Collection[str] | None = None,
    on_bad_row: OnBadRow = "fail",
) -> tuple[datasets.Dataset, list[str]]:
    """The rows, and the names of all columns, read or not. where: split, subset and revision. Raises as `load_rows`."""
    check_choice("on_bad_row", on_bad_row, OnBadRow)
    check_limit(limit)
    where = {"split": "train", "subset": None, "revision": None} | dict(where or {})
    path = local_path(source, **where)
    if path is not None:
        reader = open_local(path, where["split"], text_format=text_format, only=only)
        rows, names = _load_local(reader, source, on_bad_row), list(reader.names)
    elif text_format != PLAIN:
        raise not_local(source)
    else:
        rows = _load_hub(source, where["split"], where["subset"], where["revision"])
        names = rows.column_names
        rows = rows if only is None else rows.select_columns([name for name in names if name in only])
    # Rows without any of the columns have no length; it is the columns that are missing then.
    if len(rows) == 0 and (only is None or not names or set(only) & set(names)):
        raise no_rows(source, where["split"])
    return rows if limit is None else rows.select(range(min(limit, len(rows)))), names


def local_path(
    source: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Path | None:
    """The path of a local source, None for a hub id. Raises DataError if it is neither, or local with hub settings."""
    path = local_copy(source)
    if path.exists() or is_pattern(path):
        if subset or revision or "[" in split:
            raise DataError(
                f"'{source}' is local: it has no subset, revision or split slice. "
                "Leave them out, or use limit to keep the first rows."
            )
        return path
    if plain_suffix(path) in SUFFIXES or not HUB_ID.fullmatch(source):
        link = " It is a link to a file that is not there." if path.is_symlink() else _nearest_file(path)
        raise DataError(f"'{source}' does not exist.{link} Allowed: {allowed_sources()}.")
    return None


def check_limit(limit: int | None) -> None:
    """Raise DataError for a limit below 1."""
    if limit is not None and limit < 1:
        raise DataError(f"limit = {limit}: the number of rows to keep must be at least 1. Leave it out to keep all.")


def not_local(source: str) -> DataError:
    """The error of a hub data set that is to be read in the format of a text file."""
    return DataError(f"'{source}' is a hub data set: only local text files take columns, delimiter or encoding.")


def no_rows(source: str, split: str) -> DataError:
    """The error of a source without rows."""
    return DataError(f"'{source}' has no rows. At least one is needed: check the file or the split '{split}'.")


def check_columns(rows: datasets.Dataset | list[str], wanted: dict[str, str], source: str) -> None:
    """Raise DataError, listing missing and present columns, unless every column of `wanted` (role -> column) exists."""
    found = rows if isinstance(rows, list) else rows.column_names
    missing = [f"{role}: '{name}'.{nearest(name, found)}" for role, name in wanted.items() if name not in found]
    if missing:
        cells = plain_suffix(Path(source)) in (".csv", ".tsv")
        header = " If the file has no header, name its columns (columns)." if cells else ""
        raise DataError(
            f"'{source}' lacks {len(missing)} of the requested columns.\n  missing  "
            + "\n           ".join(missing)
            + f"\n  found    {', '.join(name[:60] for name in found)}\n"
            + f"Name one of the columns found, or rename the column in the data.{header}"
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
    return as_dataset(TableFiles(files, files[0].parent).table(), files[0].parent)


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
        text_format: TextFormat = PLAIN,
        only: Collection[str] | None = None,
        on_bad_row: OnBadRow = "fail",
    ):
        check_choice("on_bad_row", on_bad_row, OnBadRow)
        check_limit(limit)
        self.source, self.split, self.limit, self.on_bad_row = source, split, limit, on_bad_row
        self.path, self.text_format = local_path(source, split=split, subset=subset), text_format
        self.reader: Reader
        if self.path is None:
            from .hub import HubRows

            if text_format != PLAIN:
                raise not_local(source)
            self.reader = HubRows(source, split, subset, only)
        else:
            self.reader = open_local(self.path, split, text_format=text_format, only=only)

    def identity(self) -> dict[str, Any]:
        """Checksum of a local source's contents, or repository and commit of hub data."""
        if self.path is None:
            return {**self.reader.identity(), "limit": self.limit}  # type: ignore[attr-defined]
        digest = hashlib.sha256()
        for file in self.reader.files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        constants = getattr(self.reader, "constants", ())
        if any(constants):
            digest.update(json.dumps(constants).encode())
        return {
            "sha256": digest.hexdigest(),
            "limit": self.limit,
            "on_bad_row": self.on_bad_row,
            **self.text_format.to_json(),
        }

    def scan(
        self,
        check: Callable[[str, dict[str, Any]], str | None] = lambda where, row: None,
        quarantine: Callable[[dict[str, Any]], None] = lambda bad: None,
    ) -> Scan:
        """Read a local source once: every row must parse, have the types of the rows before it and pass `check`.

        check is called with the row's place in words and the row; it raises BadRowError for a bad row and returns the
        row's unique id (None: the row number). quarantine is called with {"place", "error", "record"} of each skipped
        row, place being its line or number in its file. Of hub data only the columns are read.
        Raises: DataError for the first bad row (on_bad_row = fail), for repeated ids, or if no row is left.
        """
        if self.path is None:
            return Scan(self.identity(), self.reader.columns(), self.reader.count(self.limit))  # type: ignore[attr-defined]
        columns = Columns()
        rows, ids, bad = self._pass(columns, check)
        if likelier := columns.likelier():
            columns = Columns(likelier)
            rows, ids, bad = self._pass(columns, check)
        if rows == 0:
            raise no_rows(self.source, self.split)
        names = dict.fromkeys(self.reader.names, UNREAD)
        scan = Scan(self.identity(), names | columns.kinds, rows, [place for place, *_ in bad])
        for place, raw, error in self._repeated(ids, scan, check):
            if self.on_bad_row == "fail":
                raise error
            bad.append((place, raw, error))
        for place, raw, error in bad:
            quarantine({"place": place % FILE, "error": str(error), "record": _shown_record(raw)})
        places = [place for place, *_ in bad]
        return replace(scan, rows=rows - (len(bad) - len(scan.bad)), bad=places)

    def _pass(
        self, columns: Columns, check: Callable[[str, dict[str, Any]], str | None]
    ) -> tuple[int, array, list[tuple[int, Any, BadRowError]]]:
        """The number of usable rows, the hashes of their ids, and (place, record, error) of the bad ones."""
        rows, ids, bad = 0, array("q"), list[tuple[int, Any, BadRowError]]()
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
                bad.append((place, raw, error))
                continue
            rows += 1
            if name is not None:
                ids.append(hash(name))
        return rows, ids, bad

    def blocks(self, scan: Scan, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, list[dict]]]:
        """(k, number of the first row, rows) of every wanted block k of `size` rows; the others are skipped unparsed.

        Raises DataError if the source has changed since the scan.
        """
        bad, parse = frozenset(scan.bad), self.reader.parse
        complete = Columns(scan.columns).complete(cells=self.reader.cells) if self.path else lambda row: row
        # Rows beyond the limit were not scanned.
        limit = scan.rows if self.limit and self.path else self.limit
        block: list[dict] = []
        number, k, take = 0, 0, wanted(0)
        for place, raw in self.reader.records():
            if number == limit:
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

    def _repeated(
        self, ids: array, scan: Scan, check: Callable[[str, dict[str, Any]], str | None]
    ) -> Iterator[tuple[int, Any, BadRowError]]:
        """(place, record, error) of each row whose id an earlier row has. Hashes take 8 bytes a row; only if one
        repeats, the rows are read again.
        """
        hashes = np.frombuffer(ids, dtype=np.int64).copy()
        hashes.sort()
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not repeated:
            return
        first: dict[str, str] = {}
        bad = set(scan.bad)
        usable = ((place, raw) for place, raw in self.reader.records() if place not in bad)
        for place, raw in islice(usable, scan.rows):
            where = self.reader.where(place)
            name = check(where, self.reader.parse(place, raw))
            if name in first:
                words = f"{where}: the id '{name}' is also used in {first[name]}. Ids must be unique."
                yield place, raw, BadRowError(words)
            elif name is not None and hash(name) in repeated:
                first[name] = where


def _load_local(reader: Reader, source: str, on_bad_row: OnBadRow) -> datasets.Dataset:
    bad: list[BadRowError] = []

    def usable(rows: Iterable[tuple[int, Any]], use: Callable[[int, dict[str, Any]], None]) -> None:
        for place, raw in rows:
            try:
                use(place, reader.parse(place, raw))
            except BadRowError as error:
                if on_bad_row == "fail":
                    raise
                bad.append(error)

    if isinstance(reader, TableFiles):
        table = reader.table()
        try:
            table.validate(full=True)
            table.select([field.name for field in table.schema if pa.types.is_temporal(field.type)]).to_pylist()
        except (ValueError, OverflowError):  # some row has text that is no UTF-8, or a date that Python does not have
            numbers: list[int] = []
            usable(reader.records(), lambda place, row: numbers.append(place - 1))
            table = table.take(numbers)
    else:
        columns, rows = Columns(nested=True), list[dict[str, Any]]()

        def use(place: int, row: dict[str, Any]) -> None:
            columns.add(place, row, reader)
            rows.append(row)

        usable(reader.records(), use)
        if likelier := columns.likelier():
            columns, rows, bad = Columns(likelier, nested=True), [], []
            usable(reader.records(), use)
        table = columns.table(list(map(columns.complete(cells=reader.cells), rows)))
    if bad:
        logger.warning("skipped %d bad rows; the first: %s", len(bad), bad[0])
    return as_dataset(table, source)


def _shown_record(raw: Any) -> Any:
    """A raw record as it is kept in the list of bad rows."""
    if isinstance(raw, bytes):
        return raw.decode(errors="replace")
    return raw if isinstance(raw, (dict, list)) else None


def _load_hub(source: str, split: str, subset: str | None, revision: str | None) -> datasets.Dataset:
    from .hub import load_hub

    return load_hub(source, split, subset, revision, streaming=False)


def _nearest_file(path: Path) -> str:
    return (
        nearest(path.name, [p.name for p in path.parent.iterdir()])
        if path.parent.is_dir()
        else f" Folder {path.parent} does not exist."
    )
