"""Text files as people have them: compressed, in any encoding, with any delimiter; read as lines of UTF-8."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import logging
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from ..errors import ConfigError, DataError, nearest

logger = logging.getLogger(__name__)

SAMPLE = 1 << 16  # bytes that encoding and delimiter are judged by
SAMPLE_RECORDS = 100
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
DELIMITER_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|", "pipe": "|", "space": " "}
# The longer ones first: that of UTF-32 begins with that of UTF-16.
BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What other kinds of file begin with, and what to do with them.
BEGINNINGS = {
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls): save it as CSV (UTF-8)",
    b"PAR1": "a parquet file: rename it to .parquet",
    b"ARROW1": "an Arrow file: rename it to .arrow",
    b"\x1f\x8b": "compressed with gzip: add .gz to its name",
    b"BZh": "compressed with bzip2: add .bz2 to its name",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard: add .zst to its name",
    b"\xfd7zXZ": "compressed with xz: add .xz to its name",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it",
    b"%PDF": "a PDF document: extract its text",
    b"SQLite format 3": "an SQLite database: export a table as CSV",
    b"Obj\x01": "an Avro file: convert it to parquet",
    b"ORC": "an ORC file: convert it to parquet",
    b"\x89HDF": "an HDF5 file: convert it to parquet",
    b"\x80\x04": "a pickle: save its rows as parquet",
    b"\x80\x05": "a pickle: save its rows as parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    b"<!doctype html": "a web page: the download failed, or needs another address",
    b"<html": "a web page: the download failed, or needs another address",
}
OFFICE = {"xl/": "an Excel workbook (.xlsx): save it as CSV (UTF-8)", "word/": "a Word document: extract its text"}


@dataclass(frozen=True)
class TextFormat:
    """How text files are read, where the file does not say so itself.

    delimiter  of .csv and .tsv files, one character or the name of one (tab, semicolon, ...); None: found in the file
    encoding   None: UTF-8, or what a byte order mark says
    columns    the column names of a .csv or .tsv file without a header line
    quoted     False if quotes in such a file are ordinary characters (GLUE), so that every line is a row
    Raises ConfigError for a delimiter, encoding or columns that cannot be used.
    """

    delimiter: str | None = None
    encoding: str | None = None
    columns: Sequence[str] | None = None
    quoted: bool = True

    def __post_init__(self) -> None:
        if self.delimiter is not None:
            character = DELIMITER_NAMES.get(self.delimiter, self.delimiter)
            if len(character) != 1 or character in '"\r\n' or character.isalnum():
                raise ConfigError(
                    f"delimiter = {self.delimiter!r}: allowed are one character other than letters, digits, quotes and "
                    f"line ends, or one of {', '.join(DELIMITER_NAMES)}."
                )
            object.__setattr__(self, "delimiter", character)
        if self.encoding is not None and not _is_encoding(self.encoding):
            raise ConfigError(
                f"encoding = {self.encoding!r} is not known. Allowed are Python's, such as utf-8, utf-16, cp1252, "
                f"latin-1, shift_jis.{nearest(self.encoding, ['utf-8', 'utf-16', 'cp1252', 'latin-1', 'shift_jis'])}"
            )
        if self.columns is not None and (
            not self.columns or "" in self.columns or len(set(self.columns)) < len(self.columns)
        ):
            raise ConfigError(f"columns = {list(self.columns)} must name each column once.")

    @property
    def of_cells(self) -> bool:
        """Whether it says anything that is meant for .csv and .tsv files only."""
        return self.delimiter is not None or self.columns is not None or not self.quoted

    def to_json(self) -> dict[str, Any]:
        """What differs from the default."""
        values = {"delimiter": self.delimiter, "encoding": self.encoding, "columns": self.columns and [*self.columns]}
        return {name: value for name, value in values.items() if value} | ({} if self.quoted else {"quoted": False})


PLAIN = TextFormat()


def text_format(settings: Mapping[str, Any], *, beside: str | None = None, path: str | None = None) -> TextFormat:
    """The format that settings name: delimiter, encoding and columns, a list or a,b,c; those of another command may be
    absent. Where a second file is read beside a first one, they count for it if it has the same extension.

    Raises ConfigError as TextFormat does.
    """
    columns = settings.get("columns") or None
    names = [name.strip() for name in columns.split(",")] if isinstance(columns, str) else columns
    found = TextFormat(settings.get("delimiter"), settings.get("encoding"), names)
    if beside is not None and path is not None and plain_suffix(Path(beside)) != plain_suffix(Path(path)):
        return PLAIN
    return found


class TextFile:
    """A file as lines of UTF-8. Raises DataError if it is empty, or is no text file, with what it is instead."""

    def __init__(self, path: Path, text_format: TextFormat = PLAIN):
        self.path = path
        with decoded(path), open_binary(path) as file:
            head = file.read(SAMPLE)
        if not head:
            raise DataError(f"{path} is empty. At least one row is needed.")
        if kind := kind_of(path, head):
            raise DataError(f"{path} is {kind}.")
        self.encoding = codecs.lookup(_encoding(path, head, text_format.encoding)).name
        self.wide = self.encoding.startswith(("utf-16", "utf-32"))
        self.errors = "surrogatepass" if self.wide else "surrogateescape"
        self._head, self._full = head, len(head) == SAMPLE

    @cached_property
    def sample(self) -> str:
        """The text that the file begins with, up to the end of a line; characters that cannot be read are replaced."""
        head = self._head[: len(self._head) // 4 * 4] if self.wide and self._full else self._head
        text = head.decode(self.encoding, "replace").removeprefix("\ufeff")
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        return text[:end] if self._full and end else text

    @property
    def newline(self) -> str:
        """What ends a line: "\\r" in files of old Macs. Other ends of Unicode stand inside texts."""
        return "\r" if "\r" in self.sample and "\n" not in self.sample else "\n"

    def lines(self) -> Iterator[bytes]:
        """Each line with its end, in UTF-8. What is no text in the file's encoding is no UTF-8 either.

        Raises DataError if the file is damaged.
        """
        with decoded(self.path), open_binary(self.path) as file:
            if self.encoding == "utf-8" and self.newline == "\n":
                for number, line in enumerate(file):
                    yield line if number else line.removeprefix(codecs.BOM_UTF8)
                return
            with io.TextIOWrapper(file, self.encoding, self.errors, self.newline) as text:
                for number, decoded_line in enumerate(text):
                    yield (decoded_line if number else decoded_line.removeprefix("\ufeff")).encode("utf-8", self.errors)

    @contextmanager
    def opened(self) -> Iterator[io.TextIOWrapper]:
        """The file as text. Raises DataError, also while it is read, if it is damaged or not in its encoding."""
        with decoded(self.path), open_binary(self.path) as file:
            name = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
            with io.TextIOWrapper(file, name, newline="") as text:
                yield text

    def not_text(self, place: str, error: UnicodeError | None = None) -> str:
        """The words for text that is not in the file's encoding."""
        at = f" (byte {error.start + 1})" if isinstance(error, UnicodeDecodeError) and self.encoding == "utf-8" else ""
        return (
            f"{place} is not {self.encoding.upper()}{at}. Save the file as UTF-8, or name its encoding "
            "(encoding, e.g. cp1252)."
        )


def plain_suffix(path: Path) -> str:
    """The extension that says the format, in small letters: .csv of a.csv.gz."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed by its extension."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # type: ignore[arg-type]
    compression: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(suffix)
    return compression.open(path) if compression else path.open("rb")


@contextmanager
def decoded(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises while it is read into a DataError."""
    try:
        yield
    except UnicodeError as error:
        name = getattr(error, "encoding", "text").upper()
        at = f" (byte {error.start + 1})" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(
            f"{path} is not {name}{at}. Save the file as UTF-8, or name its encoding (encoding, e.g. cp1252)."
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        words = str(error).rstrip(".")
        raise DataError(f"{path} cannot be decompressed: {words}. It is damaged or cut off: fetch it again.") from error


def kind_of(path: Path, head: bytes) -> str | None:
    """What a file is that begins with `head`, if it is no text, and what to do with it."""
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError):
            names = []
        found = (words for part, words in OFFICE.items() if any(name.startswith(part) for name in names))
        return next(found, "a zip archive: unpack it")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:32].lower()
    return next(
        (words for begin, words in BEGINNINGS.items() if head.startswith(begin) or start.startswith(begin)), None
    )


def find_delimiter(path: Path, sample: str, usual: str, columns: Sequence[str] | None = None) -> str:
    """The delimiter of a file's first lines: `usual`, if it gives every record as many cells as the header (or
    `columns`) has, or another one that does so. Raises DataError if several others do.
    """
    records = {delimiter: _records(sample, delimiter) for delimiter in (usual, *DELIMITERS)}

    def fits(delimiter: str) -> bool:
        found = records[delimiter]
        width = len(columns) if columns is not None else len(found[0]) if found else 0
        return width > 1 and all(len(cells) == width for cells in found)

    def splits(delimiter: str) -> bool:
        return bool(records[delimiter]) and len(records[delimiter][0]) > 1

    if fits(usual):
        return usual
    others = [delimiter for delimiter in DELIMITERS if delimiter != usual and fits(delimiter)]
    if not others and not splits(usual):
        others = [delimiter for delimiter in DELIMITERS if splits(delimiter)]
    if len(others) > 1:
        raise DataError(
            f"{path}: columns may be separated by {' or '.join(DELIMITERS[other] for other in others)}. "
            "Name the delimiter."
        )
    return others[0] if others else usual


def _records(sample: str, delimiter: str) -> list[list[str]]:
    """The first records that are not blank."""
    found = []
    try:
        for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
            if cells:
                found.append(cells)
            if len(found) == SAMPLE_RECORDS:
                break
    except csv.Error:
        pass
    return found


def _is_encoding(name: str) -> bool:
    try:
        "a".encode(name).decode(name)  # refuses codecs that are not of text, such as hex
    except (LookupError, UnicodeError, ValueError):
        return False
    return True


def _encoding(path: Path, head: bytes, named: str | None) -> str:
    """That of the byte order mark; without one the encoding that is named, else UTF-8. What looks wrong is said."""
    marked = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if named is None:
        return marked or _without_mark(path, head)
    plain = codecs.lookup(named).name
    if marked is not None:
        if not plain.startswith(marked):
            say_once(f"{path} is read as {marked.upper()}, which its byte order mark says, not as {named}")
        return marked
    if not plain.startswith("utf") and not head.isascii() and _decodes(head):
        say_once(f"{path} is read as {named}, as asked for, but it looks like UTF-8")
    return named


def _decodes(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8, up to a character that is cut off at its end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


@cache
def say_once(warning: str) -> None:
    """Log a warning once, however often a file is opened."""
    logger.warning(warning)


def _without_mark(path: Path, head: bytes) -> str:
    """UTF-8. Raises DataError for what looks like UTF-16 without a byte order mark."""
    start = head[:512]
    if start.count(0) * 3 > len(start):
        name = "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
        raise DataError(f"{path} is not UTF-8: it looks like {name.upper()}. If it is, name it (encoding {name}).")
    return "utf-8"
