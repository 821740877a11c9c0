"""Rows of local files as one table, read and checked without `datasets`, whose import takes most of a second.

Local files are read here rather than by `datasets.load_dataset`: its errors never name the file or the line, and it
takes the columns of JSON lines from their first row only.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, nearest

if TYPE_CHECKING:
    from .prompts import Template

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "validation", "valid", "dev", "test")
WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")

# One row and the place it came from, for errors: a line of JSON lines or CSV, an entry of a JSON array.
PlacedRow = tuple[int, dict[str, Any]]


class HasColumns(Protocol):
    """A table or a data set."""

    @property
    def column_names(self) -> list[str]: ...


def read_table(path: Path, split: str) -> pa.Table:
    """The rows of a local file, or of the shards of a folder. Raises DataError as `rows.load_rows`."""
    if path.is_dir():
        return parquet_table(_shards(path, split))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} has the unknown extension '{path.suffix}'. Allowed: {allowed_sources()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. At least one row is needed.")
    if suffix == ".parquet":
        return parquet_table([path])
    if suffix in (".csv", ".tsv"):
        return _table(path, list(_read_csv(path, "\t" if suffix == ".tsv" else ",")), whole_numbers=True)
    return _table(path, list(_read_json(path)), whole_numbers=False)


def check_columns(dataset: HasColumns, wanted: dict[str, str], source: str) -> None:
    """Raise DataError unless every column of `wanted` (role -> column) exists; the error lists wanted and found."""
    found = dataset.column_names
    missing = [f"{role}: '{name}'.{nearest(name, found)}" for role, name in wanted.items() if name not in found]
    if missing:
        raise DataError(
            f"'{source}' lacks {len(missing)} of the columns asked for.\n  missing  "
            + "\n           ".join(missing)
            + f"\n  found    {', '.join(found)}\nName one of the columns found, or rename the column in the data."
        )


def check_template_columns(rows: HasColumns, templates: list[Template], source: str, *, target: bool) -> None:
    """Raise DataError unless the rows have every column the inputs (with `target`, the targets too) read."""
    check_columns(rows, template_columns(templates, target=target), source)


def template_columns(templates: list[Template], *, target: bool) -> dict[str, str]:
    """What `check_columns` wants for templates: the column each of them reads."""
    return {f"{name} in {t}": name for t in templates for name in sorted(t.columns(target=target))}


def parquet_table(files: list[Path]) -> pa.Table:
    """The rows of parquet files, in the order given. Raises DataError naming the file that does not fit."""
    tables: list[pa.Table] = []
    for file in files:
        try:
            tables.append(pq.ParquetFile(file).read())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable parquet file: {first_line(error)}. Write it again.") from error
        if tables[-1].schema.names != tables[0].schema.names or tables[-1].schema.types != tables[0].schema.types:
            raise DataError(
                f"{file} has other columns than {files[0].name}.\n  {file.name}: {_columns(tables[-1])}\n"
                f"  {files[0].name}: {_columns(tables[0])}\n"
                "Shards of one folder must have the same columns, in the same order."
            )
    return pa.concat_tables(tables)


def _shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a folder; only those of `split` if they are named by split."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"folder {folder} has no .parquet files. Name one file instead. Allowed: {allowed_sources()}.")
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


def _table(path: Path, rows: list[PlacedRow], *, whole_numbers: bool) -> pa.Table:
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
    return pa.table(columns)


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
    return f"has values that do not fit one type: {first_line(error)}. Give it one type everywhere."


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def allowed_sources() -> str:
    """What `source` may be, for errors."""
    return f"a {', '.join(SUFFIXES)} file, a folder of parquet shards, or a hub data set (owner/name)"


def nearest_file(path: Path) -> str:
    """A hint at the file that was meant."""
    return (
        nearest(path.name, [p.name for p in path.parent.iterdir()])
        if path.parent.is_dir()
        else f" Folder {path.parent} does not exist."
    )


def first_line(error: Exception) -> str:
    """The first line of an error of another library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
