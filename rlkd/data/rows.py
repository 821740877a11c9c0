"""Rows from the hub or from local files, checked before any model loads.

Local files are read here rather than by `datasets.load_dataset`: its errors never name the file or the line, and it
takes the columns of JSON lines from their first row only.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "validation", "valid", "dev", "test")
WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# One row and the place it came from, for errors: a line of JSON lines or CSV, an entry of a JSON array.
PlacedRow = tuple[int, dict[str, Any]]


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
    subset and revision, of a hub data set only; limit keeps the first rows.
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
        rows = _load_local(path, split)
    elif path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(source):
        raise DataError(f"'{source}' does not exist.{_nearest_file(path)} Allowed: {_allowed()}.")
    else:
        rows = _load_hub(source, split, subset, revision)
    if len(rows) == 0:
        raise DataError(f"'{source}' has no rows. At least one is needed: check the file or the split '{split}'.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def check_columns(dataset: datasets.Dataset, wanted: dict[str, str], source: str) -> None:
    """Raise DataError unless every column of `wanted` (role -> column) exists; the error lists wanted and found."""
    found = dataset.column_names
    missing = [f"{role}: '{name}'.{nearest(name, found)}" for role, name in wanted.items() if name not in found]
    if missing:
        raise DataError(
            f"'{source}' lacks {len(missing)} of the columns asked for.\n  missing  "
            + "\n           ".join(missing)
            + f"\n  found    {', '.join(found)}\nName one of the columns found, or rename the column in the data."
        )


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


def read_parquet(files: list[Path]) -> datasets.Dataset:
    """The rows of parquet files, in the order given. Raises DataError naming the file that does not fit."""
    tables: list[pa.Table] = []
    for file in files:
        try:
            tables.append(pq.ParquetFile(file).read())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable parquet file: {_first_line(error)}. Write it again.") from error
        if tables[-1].schema.names != tables[0].schema.names or tables[-1].schema.types != tables[0].schema.types:
            raise DataError(
                f"{file} has other columns than {files[0].name}.\n  {file.name}: {_columns(tables[-1])}\n"
                f"  {files[0].name}: {_columns(tables[0])}\n"
                "Shards of one folder must have the same columns, in the same order."
            )
    return datasets.Dataset(pa.concat_tables(tables))


def _load_local(path: Path, split: str) -> datasets.Dataset:
    if path.is_dir():
        return read_parquet(_shards(path, split))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} has the unknown extension '{path.suffix}'. Allowed: {_allowed()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. At least one row is needed.")
    if suffix == ".parquet":
        return read_parquet([path])
    if suffix in (".csv", ".tsv"):
        return _table(path, list(_read_csv(path, "\t" if suffix == ".tsv" else ",")), whole_numbers=True)
    return _table(path, list(_read_json(path)), whole_numbers=False)


def _shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a folder; only those of `split` if they are named by split."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"folder {folder} has no .parquet files. Name one file instead. Allowed: {_allowed()}.")
    names = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    if split in names.values():
        return [file for file in files if names[file] == split]
    present = sorted({name for name in names.values() if name in SPLITS})
    if present:
        raise DataError(
            f"folder {folder} has no shards of split '{split}'. "
            f"Splits found: {', '.join(present)}.{nearest(split, present)}"
        )
    return files


def _load_hub(source: str, split: str, subset: str | None, revision: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source, subset, split=split, revision=revision)
    # The library, the hub client and the HTTP stack each have errors of their own; all mean the same to the user.
    except Exception as error:
        wanted = f"'{source}'" + (f", subset '{subset}'" if subset else "") + f", split '{split}'"
        raise DataError(
            f"{wanted} is neither a path here nor a data set that could be loaded from the hub.\n"
            f"  {type(error).__name__}: {_first_line(error)}\n"
            f"Check the name, the subset and the split. Local data: {_allowed()}."
        ) from error


def _read_json(path: Path) -> Iterator[PlacedRow]:
    """Rows of JSON lines, or of one JSON array in a .json file."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".json" and raw.lstrip()[:1] == b"[":
        for number, row in enumerate(_parse_json(raw, path, 1), 1):
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, entry {number} is a JSON {type(row).__name__}, not an object. Each row must be {{...}}."
                )
            yield number, row
        return
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a text.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        row = _parse_json(line, path, number)
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number} is a JSON {type(row).__name__}, not an object. Each line must be one {{...}}."
            )
        yield number, row


def _parse_json(raw: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}:{error.colno}"
        shown = raw.decode("utf-8").split("\n")[error.lineno - 1].strip()
        raise DataError(f"{place} is not valid JSON: {error.msg}.\n  {shown[:100]}\nMend or remove it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error


def _read_csv(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    """Rows of a CSV or TSV file with a header line; every value as text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if not header or len(set(header)) < len(header) or "" in header:
                raise DataError(f"{path}:1 must name each column once; found {header}.")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num} has {len(cells)} cells, "
                        f"the header has {len(header)} ({', '.join(header)}). "
                        'Quote a cell that contains the delimiter: "a, b".'
                    )
                if cells:
                    yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(
                f'{path}:{reader.line_num} is malformed: {error}. Write a quote inside a quoted cell twice: "".'
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {reader.line_num}: not UTF-8. Save the file as UTF-8.") from error


def _table(path: Path, rows: list[PlacedRow], *, whole_numbers: bool) -> datasets.Dataset:
    """Columns over the union of all rows' names; a name a row lacks is None there."""
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {}
    for name in names:
        values: list[Any] = [row.get(name) for _, row in rows]
        if whole_numbers and all(WHOLE_NUMBER.fullmatch(value) for value in values):
            values = [int(value) for value in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(f"{path}: column '{name}' {_conflict(name, rows, error)}") from error
    return datasets.Dataset(pa.table(columns))


def _conflict(name: str, rows: list[PlacedRow], error: Exception) -> str:
    """Why the values of a column do not form one type, with the two lines that disagree when types differ."""
    first: tuple[int, str] | None = None
    for number, row in rows:
        if row.get(name) is None:
            continue
        kind = "number" if type(row[name]) in (int, float) else type(row[name]).__name__
        first = first or (number, kind)
        if kind != first[1]:
            return f"is of type {first[1]} in line {first[0]} but {kind} in line {number}. Give it one type everywhere."
    return f"has values that do not fit one type: {_first_line(error)}. Give it one type everywhere."


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def _allowed() -> str:
    return f"a {', '.join(SUFFIXES)} file, a folder of parquet shards, or a hub data set (owner/name)"


def _nearest_file(path: Path) -> str:
    return (
        nearest(path.name, [p.name for p in path.parent.iterdir()])
        if path.parent.is_dir()
        else f" Folder {path.parent} does not exist."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
