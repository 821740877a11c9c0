"""Local files, read record by record in constant memory; every record has its place in the file, for errors.

They are not read by `datasets.load_dataset`, whose errors name neither file nor line, and which takes the columns of
JSON lines from the first row only. A reader splits a file into records cheaply and parses only the ones asked for.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "validation", "valid", "dev", "test")
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")


class BadRowError(DataError):
    """A row that cannot be used, in a source whose other rows can."""


class Reader(Protocol):
    """Records of one source. A record is raw until it is parsed, so that skipping is cheap.

    cells: all its values are text, from which whole numbers are recognised.
    """

    cells: bool

    def records(self) -> Iterator[tuple[int, Any]]:
        """(place, raw record): the line it starts in, or its number in sources without lines."""
        ...

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        """The row of a record. Raises BadRowError with the place."""
        ...

    def where(self, place: int) -> str:
        """A place in words."""
        ...


def open_local(path: Path, split: str, *, columns: Sequence[str] | None = None, quoted: bool = True) -> Reader:
    """The reader of a file or of a folder of parquet shards; columns and quoted as in `Cells`.

    Raises DataError for unknown or empty files, and for columns or quoted with files other than .csv and .tsv.
    """
    if (columns is not None or not quoted) and (path.is_dir() or path.suffix.lower() not in (".csv", ".tsv")):
        raise DataError(f"{path}: only a .csv or .tsv file takes columns or quoted. Leave them out.")
    if path.is_dir():
        return ParquetFiles(_shards(path, split), path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} has the unknown extension '{path.suffix}'. Allowed: {allowed_sources()}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. At least one row is needed.")
    if suffix == ".parquet":
        return ParquetFiles([path], path)
    if suffix in (".csv", ".tsv"):
        return Cells(path, "\t" if suffix == ".tsv" else ",", columns=columns, quoted=quoted)
    if suffix == ".json":
        with path.open("rb") as file:
            if file.read(4096).removeprefix(BOM).lstrip()[:1] == b"[":
                return JsonArray(path)
    return JsonLines(path)


class JsonLines:
    """One JSON object per line; blank lines are skipped."""

    cells = False

    def __init__(self, path: Path):
        self.path = path

    def where(self, place: int) -> str:
        return f"{self.path}:{place}"

    def records(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a text.
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if not line.isspace() and line:
                    yield number, line

    def parse(self, place: int, raw: bytes) -> dict[str, Any]:
        try:
            row = json.loads(raw.decode().rstrip())
        except json.JSONDecodeError as error:
            shown = raw.decode().strip()[:100]
            raise BadRowError(
                f"{self.where(place)}:{error.colno} is not valid JSON: {error.msg}.\n  {shown}\nFix or remove it."
            ) from error
        except UnicodeDecodeError as error:
            raise BadRowError(
                f"{self.where(place)} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8."
            ) from error
        except RecursionError as error:
            raise BadRowError(f"{self.where(place)} is nested too deeply. Flatten or remove it.") from error
        if not isinstance(row, dict):
            raise BadRowError(
                f"{self.where(place)} is a JSON {type(row).__name__}, not an object. Each line must be one {{...}}."
            )
        if b"\\u" in raw:
            _refuse_surrogates(row, self.where(place))
        return row


class JsonArray:
    """One JSON array of objects, decoded entry by entry. Invalid JSON cannot be skipped: where it ends is unknown."""

    cells = False

    def __init__(self, path: Path):
        self.path = path

    def where(self, place: int) -> str:
        return f"{self.path}, entry {place}"

    def records(self) -> Iterator[tuple[int, Any]]:
        decode = json.JSONDecoder().raw_decode
        text, position, number, before = "", 0, 0, ""  # before: the last, unfinished line of the text already dropped
        lines, ended, wanted = 0, False, "["
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            while True:
                position = SPACE.match(text, position).end()  # type: ignore[union-attr]
                try:
                    if wanted and text[position : position + 1] == wanted:
                        position, wanted = position + 1, ""
                    elif not wanted and (number or text[position : position + 1] != "]"):
                        row, end = decode(text, position)
                        if end == len(text) and not ended:
                            raise json.JSONDecodeError("unfinished", text, end)  # may continue in the next chunk
                        number, position, wanted = number + 1, end, ","
                        yield number, row
                    elif text[position : position + 1] == "]" and not SPACE.sub("", text[position + 1 :], count=1):
                        return
                    elif not wanted and not text[position:]:
                        decode(text, position)
                    else:
                        raise json.JSONDecodeError("Expecting ',' delimiter or the end of the array", text, position)
                except json.JSONDecodeError as error:
                    if ended:
                        column = error.colno + (len(before) if error.lineno == 1 else 0)
                        raise DataError(
                            f"{self.path}:{lines + error.lineno}:{column} is not valid JSON: {error.msg}.\n"
                            f"  {text[error.pos :][:100].strip()}\nFix it."
                        ) from error
                    dropped = before + text[:position]
                    lines, before = lines + text.count("\n", 0, position), dropped[dropped.rfind("\n") + 1 :]
                    more = self._read(file, max(CHUNK, len(text)))
                    text, position, ended = text[position:] + more, 0, not more

    def _read(self, file: Any, size: int) -> str:
        try:
            return file.read(size)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise BadRowError(
                f"{self.where(place)} is a JSON {type(raw).__name__}, not an object. Each row must be {{...}}."
            )
        _refuse_surrogates(raw, self.where(place))
        return raw


class Cells:
    """A CSV or TSV file; every value is text.

    columns: the column names of a file without a header line. quoted: if False, quotes are ordinary characters and
    every line is a row. Raises DataError for repeated or empty column names.
    """

    cells = True

    def __init__(self, path: Path, delimiter: str, *, columns: Sequence[str] | None = None, quoted: bool = True):
        csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
        self.path, self.delimiter, self.columns, self.quoted = path, delimiter, columns, quoted
        self.header: list[str] = list(columns or [])
        if columns is not None and not _distinct(self.header):
            raise DataError(f"{path}: columns = {self.header} must name each column once.")

    def where(self, place: int) -> str:
        return f"{self.path}:{place}"

    def records(self) -> Iterator[tuple[int, Any]]:
        with self.path.open("rb") as file:
            reader = csv.reader(
                self._lines(file),
                delimiter=self.delimiter,
                quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
                strict=True,
            )
            if self.columns is None:
                self.header = self._header(reader)
            while True:
                start = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    remedy = 'Write a quote inside a quoted cell twice: "".' if self.quoted else "Fix or remove it."
                    yield start, BadRowError(f"{self.where(start)} is malformed: {error}. {remedy}")
                    continue
                if cells:
                    yield start, cells

    def _header(self, reader: Any) -> list[str]:
        try:
            header: list[str] = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{self.path}:1 is malformed: {error}.") from error
        if not _distinct(header):
            raise DataError(
                f"{self.path}:1 must name each column once; found {header}. If the file has no header, name its "
                "columns (columns)."
            )
        return header

    def _lines(self, file: Any) -> Iterator[str]:
        """The text of each line; bytes that are not UTF-8 become surrogates, so that an error can name their line."""
        for number, line in enumerate(file):
            yield (line if number else line.removeprefix(BOM)).decode("utf-8", "surrogateescape")

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        if isinstance(raw, BadRowError):
            raise raw
        if len(raw) != len(self.header):
            remedy = 'Quote a cell that contains the delimiter: "a, b".' if self.quoted else "Fix or remove it."
            named = "the header has" if self.columns is None else "columns name"
            raise BadRowError(
                f"{self.where(place)} has {len(raw)} cells, {named} {len(self.header)} "
                f"({', '.join(self.header)}). {remedy}"
            )
        for column, value in enumerate(raw, 1):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise BadRowError(
                        f"{self.where(place)} is not UTF-8 (cell {column}, character {error.start + 1}). "
                        "Save the file as UTF-8."
                    ) from error
        return dict(zip(self.header, raw, strict=True))


class ParquetFiles:
    """The rows of parquet files, in the order given."""

    cells = False

    def __init__(self, files: list[Path], source: Path):
        self.files, self.source = files, source
        self.schema = same_schema(files)

    def where(self, place: int) -> str:
        return f"{self.source}, row {place}"

    def records(self) -> Iterator[tuple[int, tuple[list[dict[str, Any]], Any, int]]]:
        number = 0
        for path in self.files:
            try:
                for batch in pq.ParquetFile(path).iter_batches(1024):
                    rows: list[dict[str, Any]] = []  # filled when the first of them is parsed
                    for i in range(batch.num_rows):
                        number += 1
                        yield number, (rows, batch, i)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(path, error) from error

    def parse(self, place: int, raw: tuple[list[dict[str, Any]], Any, int]) -> dict[str, Any]:
        rows, batch, i = raw
        if not rows:
            rows += batch.to_pylist()
        return rows[i]


def same_schema(files: list[Path]) -> pa.Schema:
    """The schema that all files share. Raises DataError with the file that differs."""
    schemas = []
    for file in files:
        try:
            schemas.append(pq.read_schema(file))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, error) from error
        if schemas[-1].names != schemas[0].names or schemas[-1].types != schemas[0].types:
            raise DataError(
                f"{file} and {files[0].name} have different columns.\n  {file.name}: {_columns(schemas[-1])}\n"
                f"  {files[0].name}: {_columns(schemas[0])}\n"
                "Shards of one folder must have the same columns, in the same order."
            )
    return schemas[0]


def unreadable(path: Path, error: Exception) -> DataError:
    """The error of a damaged parquet file."""
    return DataError(f"{path} is not a readable parquet file: {first_line(error)}. Write it again.")


def allowed_sources() -> str:
    """The sources that a data set can come from, in words."""
    return f"a {', '.join(SUFFIXES)} file, a folder of parquet shards, or a hub data set (owner/name)"


def first_line(error: Exception) -> str:
    """The first line of a library's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def splits_of(path: Path) -> set[str]:
    """The splits that the shards of a local folder are named by; none of a file."""
    return {re.split(r"[-_.]", file.name)[0] for file in path.glob("*.parquet")} & set(SPLITS)


def _shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a folder; only those of `split` if they are named by split."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"folder {folder} has no .parquet files. Name a file instead. Allowed: {allowed_sources()}.")
    names = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    if split in names.values():
        return [file for file in files if names[file] == split]
    if present := sorted(splits_of(folder)):
        raise DataError(
            f"folder {folder} has no shards of split '{split}'. "
            f"Splits found: {', '.join(present)}.{nearest(split, present)}"
        )
    return files


def _refuse_surrogates(row: dict[str, Any], where: str) -> None:
    """Raise BadRowError for an unpaired surrogate (\\ud800): JSON can escape it, but UTF-8 cannot encode it."""
    for name, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise BadRowError(
                f"{where}: column '{name}' contains an unpaired surrogate ({error.object[error.start]!r})."
                " Fix or remove it."
            ) from error


def _distinct(names: Sequence[str]) -> bool:
    return bool(names) and len(set(names)) == len(names) and "" not in names


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
