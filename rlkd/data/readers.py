"""Readers of text files: JSON lines, JSON arrays and cells (CSV, TSV), in constant memory.

A reader splits a file into records cheaply and parses only the ones asked for. Every record has its place in the file,
for errors; one that cannot be used is a BadRowError, and the others can still be read.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError, encodable
from .text import PLAIN, TextFile, TextFormat, say_once
from .values import DECODER, BadRowError, Repeated, check_row

CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
MOST_LINES = 10_000  # of one quoted cell; an open quote would swallow the rest of the file
FIX = "Fix or remove it."
FILE = 1 << 40  # places in one file


class Reader(Protocol):
    """Records of one source. A record is raw until it is parsed, so that skipping is cheap.

    files: the local files that are read. cells: all its values are text, from which whole numbers are recognised.
    names: the columns found so far, whether or not they are read.
    """

    files: list[Path]
    cells: bool

    @property
    def names(self) -> dict[str, None]: ...

    def records(self) -> Iterator[tuple[int, Any]]:
        """(place, raw record): the line it starts in, or its number in sources without lines."""
        ...

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        """The row of a record. Raises BadRowError with the place."""
        ...

    def where(self, place: int) -> str:
        """A place in words."""
        ...


class JsonRows:
    """What both kinds of JSON file share. only: the columns to read; None for all."""

    cells = False

    def __init__(self, file: TextFile, only: Collection[str] | None = None):
        self.file, self.path, self.files, self.only = file, file.path, [file.path], only
        self.names: dict[str, None] = {}

    def where(self, place: int) -> str:
        return f"{self.path}:{place}"

    def row(self, place: int, value: Any, form: str) -> dict[str, Any]:
        """The columns to read of a decoded object. Raises BadRowError if it is not one, or for values of these."""
        if not isinstance(value, dict):
            raise BadRowError(f"{self.where(place)} is a JSON {type(value).__name__}, not an object. {form}")
        if self.only is None or type(value) is Repeated:
            row = check_row(value, self.where(place))
        else:
            row = check_row({name: value[name] for name in value if name in self.only}, self.where(place))
        if not value.keys() <= self.names.keys():
            self.names |= dict.fromkeys(map(encodable, value))
        return row


class JsonLines(JsonRows):
    """One JSON object per line; blank lines are skipped."""

    def records(self) -> Iterator[tuple[int, bytes]]:
        # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a text.
        for number, line in enumerate(self.file.lines(), 1):
            if not line.isspace() and line:
                yield number, line

    def parse(self, place: int, raw: bytes) -> dict[str, Any]:
        try:
            value = DECODER.decode(raw.decode().rstrip())
        except json.JSONDecodeError as error:
            whole = " A .json file holds an array of objects, or one object a line." if self._is_json else ""
            raise BadRowError(
                f"{self.where(place)}:{error.colno} is not valid JSON: {error.msg}.\n"
                f"  {raw.decode().strip()[:100]}\nFix or remove it.{whole}"
            ) from error
        except UnicodeDecodeError as error:
            raise BadRowError(self.file.not_text(self.where(place), error)) from error
        except RecursionError as error:
            raise BadRowError(f"{self.where(place)} is nested too deeply. Flatten or remove it.") from error
        if place == 1 and self._is_json and self._is_table(value):
            raise BadRowError(
                f"{self.path} is one object of lists or objects ({encodable(', '.join(value))[:80]}): "
                "a table by columns, or rows inside another object. Save the rows as an array of objects (pandas: "
                "orient='records')."
            )
        return self.row(place, value, "Each line must be one {...}.")

    def _is_table(self, value: Any) -> bool:
        """Whether the only line of a file holds more than one row."""
        alone = "\n" not in self.file.sample.strip()
        return alone and isinstance(value, dict) and all(isinstance(part, (list, dict)) for part in value.values())

    @property
    def _is_json(self) -> bool:
        return ".json" in self.path.suffixes


class JsonArray(JsonRows):
    """One JSON array of objects, decoded entry by entry. Invalid JSON cannot be skipped: where it ends is unknown."""

    def where(self, place: int) -> str:
        return f"{self.path}, entry {place}"

    def records(self) -> Iterator[tuple[int, Any]]:
        decode = DECODER.raw_decode
        text, position, number, before = "", 0, 0, ""  # before: the last, unfinished line of the text already dropped
        lines, ended, wanted = 0, False, "["
        with self.file.opened() as file:
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
                    more = file.read(max(CHUNK, len(text)))
                    text, position, ended = text[position:] + more, 0, not more
                except RecursionError as error:
                    raise DataError(f"{self.where(number + 1)} is nested too deeply. Flatten or remove it.") from error

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        return self.row(place, raw, "Each row must be {...}.")


class _Lines:
    """Lines for csv.reader, with their number; those that a malformed record swallowed can be read again."""

    def __init__(self, lines: Iterable[str]):
        self._lines, self._again = iter(lines), deque[str]()
        self._taken: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self._taken) == MOST_LINES:
            raise csv.Error(f"a quote is not closed within {MOST_LINES:,} lines")
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        self.number += 1
        return line

    def begin(self) -> int:
        """Begin a record; returns the line it starts in."""
        self._taken.clear()
        return self.number + 1

    def give_back(self) -> None:
        """All lines of this record but the first are read again: each may be a record of its own."""
        self._again.extendleft(reversed(self._taken[1:]))
        self.number -= max(len(self._taken) - 1, 0)


class Cells:
    """A CSV or TSV file; every value is text. Columns without a name are not read.

    text_format: with the delimiter that the file has. only: the columns to read; None for all.
    Raises DataError for a header that names a column twice.
    """

    cells = True

    def __init__(self, file: TextFile, text_format: TextFormat = PLAIN, only: Collection[str] | None = None):
        csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
        self.file, self.path, self.files, self.only = file, file.path, [file.path], only
        self.delimiter, self.columns, self.quoted = (
            text_format.delimiter or ",",
            text_format.columns,
            text_format.quoted,
        )
        self.header: list[str] = list(text_format.columns or self._header())
        self.names = {name: None for name in self.header if name.strip()}
        if not all(name.strip() for name in self.header):
            say_once(f"{self.path}:1 has a column without a name, which is not read")

    def where(self, place: int) -> str:
        return f"{self.path}:{place}"

    def records(self) -> Iterator[tuple[int, Any]]:
        lines, reader = self._reader()
        if self.columns is None:
            next(filter(None, reader))
        first = True
        while True:
            start = lines.begin()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.give_back()
                yield start, BadRowError(f"{self.where(start)} is malformed: {_plainly(error)}")
                continue
            if cells and not (first and self._is_header(cells)):
                yield start, cells
            first = first and not cells

    def _is_header(self, cells: list[str]) -> bool:
        """Whether a first record is the header that `columns` says is not there."""
        if self.columns is None or [cell.strip() for cell in cells] != [*self.columns]:
            return False
        say_once(f"{self.path}:1 is the header, not a row: its names are those of columns")
        return True

    def _reader(self) -> tuple[_Lines, Iterator[list[str]]]:
        """The lines, and the records in them, header included; bytes that are no text become surrogates."""
        lines = _Lines(line.decode("utf-8", "surrogateescape") for line in self.file.lines())
        if self.quoted and re.match(r"sep=.\r?$", self.file.sample.partition("\n")[0]):
            next(lines)  # Excel's own way to name the delimiter
        return lines, csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            strict=True,
        )

    def _header(self) -> list[str]:
        try:
            header = next(filter(None, self._reader()[1]), [])
        except csv.Error as error:
            raise DataError(f"{self.path}:1 is malformed: {_plainly(error)}") from error
        if not header:
            raise DataError(f"{self.path} is empty. At least one row is needed.")
        named = [name for name in header if self.only is None or name in self.only]
        unnamed = [i for i, name in enumerate(header) if not name.strip() and i not in (0, len(header) - 1)]
        if not any(name.strip() for name in header) or unnamed or any(named.count(name) > 1 for name in named if name):
            shown = [name[:40] for name in header[:20]]
            raise DataError(
                f"{self.path}:1 must name each column once; found {shown}. If the file has no header, name its "
                "columns (columns)."
            )
        return header

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        if isinstance(raw, BadRowError):
            raise raw
        if len(raw) != len(self.header):
            raise BadRowError(self._ragged(place, raw))
        if not self.header[-1].strip() and raw[-1]:
            raise BadRowError(
                f"{self.where(place)} has {raw[-1][:40]!r} in its last cell, which has no column name. {self._remedy}"
            )
        row = {
            name: value
            for name, value in zip(self.header, raw, strict=True)
            if name.strip() and (self.only is None or name in self.only)
        }
        for name, value in row.items():
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise BadRowError(self.file.not_text(f"{self.where(place)}, column '{name}',")) from error
        return row

    def _ragged(self, place: int, raw: Sequence[str]) -> str:
        """The words for a record with too many or too few cells."""
        named = "the header has" if self.columns is None else "columns name"
        extra = raw[len(self.header) :]
        empty = extra and not any(extra) and self.header[-1].strip()
        remedy = "Remove the delimiters at its end." if empty else self._remedy
        return (
            f"{self.where(place)} has {len(raw)} cells, {named} {len(self.header)} "
            f"({', '.join(self.header[:20])}). {remedy}"
        )

    @property
    def _remedy(self) -> str:
        return f'Quote a cell that contains the delimiter: "a{self.delimiter} b".' if self.quoted else FIX


def _plainly(error: csv.Error) -> str:
    """What is wrong with a record, and the remedy: Python's words where they say so."""
    if "new-line character" in str(error):
        return "it has a carriage return outside quotes. Quote that cell, or remove it."
    reason = "a quote is never closed" if "unexpected end" in str(error) else str(error)
    return f'{reason}. Write a quote inside a quoted cell twice: "".'


class Several:
    """Files of one format, one after the other; those in folders named column=value have that column too.

    A place is that of the file's reader, plus the number of the file times FILE.
    """

    def __init__(self, readers: Sequence[Any], constants: Sequence[dict[str, Any]], only: Collection[str] | None):
        self.readers, self.cells = readers, readers[0].cells
        self.files = [reader.path for reader in readers]
        self.constants = [
            {name: value for name, value in values.items() if only is None or name in only} for values in constants
        ]
        self._all = dict.fromkeys(name for values in constants for name in values)

    @property
    def names(self) -> dict[str, None]:
        return {name: None for reader in self.readers for name in reader.names} | self._all

    def where(self, place: int) -> str:
        return self.readers[place // FILE].where(place % FILE)

    def records(self) -> Iterator[tuple[int, Any]]:
        for number, reader in enumerate(self.readers):
            for place, raw in reader.records():
                yield number * FILE + place, raw

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        number = place // FILE
        return self.readers[number].parse(place % FILE, raw) | self.constants[number]
