"""Local sources: a file, several files named by a pattern or a folder, or a data set saved to disk.

They are not read by `datasets.load_dataset`, whose errors name neither file nor line, and which takes the columns of
JSON lines from the first row only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from ..errors import DataError, nearest
from .readers import Cells, JsonArray, JsonLines, Reader, Several
from .tables import TableFiles, first_line
from .text import (
    COMPRESSED,
    DELIMITERS,
    PLAIN,
    TextFile,
    TextFormat,
    decoded,
    find_delimiter,
    kind_of,
    plain_suffix,
    say_once,
)

# Extension -> format. Files of one source have one format.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "cells",
    ".tsv": "cells",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = tuple(FORMATS)
SPLITS = ("train", "validation", "valid", "dev", "test")
# Files of a data set's folder that hold no rows.
ABOUT = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "manifest.jsonl",
    "metadata.json",
}
WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")
ARRAY = re.compile(r"\s*\[\s*[{\]]")


def open_local(
    path: Path, split: str, *, text_format: TextFormat = PLAIN, only: Collection[str] | None = None
) -> Reader:
    """The reader of the rows of `split`; a single file has one split, whatever this says.

    path: a file, a pattern with *, ? or [...], a folder of files, of folders named by split or column=value, or saved
    by `datasets.Dataset.save_to_disk`. only: the columns to read; None for all.
    Raises DataError for files that are unknown, empty or something else, and for a format that does not fit them.
    """
    files = find_files(path, split)
    formats = {format_of(file) for file in files}
    if len(formats) > 1:
        raise DataError(
            f"{path} has files of several formats: {', '.join(sorted({plain_suffix(f) for f in files}))}. "
            "Name those that are meant by a pattern, such as *.jsonl."
        )
    if text_format.of_cells and formats != {"cells"}:
        raise DataError(f"{path}: only a .csv or .tsv file takes columns, delimiter or quoted. Leave them out.")
    constants = _folder_columns(path, files)
    if formats <= {"parquet", "arrow"}:
        if text_format.encoding is not None:
            raise DataError(f"{path}: only text files have an encoding. Leave it out.")
        if packed := [file for file in files if file.suffix.lower() in COMPRESSED]:
            raise DataError(f"{packed[0]}: a {packed[0].suffix} file around a {formats.pop()} file: unpack it.")
        return TableFiles(files, path, only, constants)
    readers = [_open_text(file, text_format, only) for file in files]
    if len(readers) == 1 and not any(constants):
        return readers[0]
    return _joined(readers, constants, only)


def format_of(path: Path) -> str:
    """The format of a file. Raises DataError for an unknown extension."""
    suffix = plain_suffix(path)
    if suffix not in FORMATS:
        hint = "" if suffix != ".txt" else " If it is a table, rename it to .csv or .tsv."
        with decoded(path), path.open("rb") as file:
            kind = kind_of(path, file.read(64))
        if kind:
            hint = f" It is {kind}."
        raise DataError(
            f"{path} has the unknown extension '{''.join(path.suffixes[-2:])}'.{hint} Allowed: {allowed_sources()}."
        )
    return FORMATS[suffix]


def is_pattern(source: str | Path) -> bool:
    """Whether a source that does not exist names files by a pattern."""
    return has_magic(str(source))


def allowed_sources() -> str:
    """The sources that a data set can come from, in words."""
    return (
        f"a {', '.join(SUFFIXES)} file (also {', '.join(COMPRESSED)}), a pattern such as data/*.jsonl, "
        "a folder of such files or one saved by datasets, or a hub data set (owner/name)"
    )


def find_files(path: Path, split: str) -> list[Path]:
    """The files of a source, in order of their names; of a folder only those of `split`, if they are named by split.

    Raises DataError if there are none.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return _saved(path, split) or _in_folder(path, split)
    found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"no file matches '{path}'. Allowed: {allowed_sources()}.")
    return found


def splits_of(path: Path) -> set[str]:
    """The splits of a local folder: saved ones, or those that its files or folders are named by; none of a file."""
    if not path.is_dir():
        return set()
    if (path / "dataset_dict.json").is_file():
        return {child.name for child in path.iterdir() if (child / "state.json").is_file()}
    files = _data_files(path.iterdir())
    names = map(_split_name, files) if files else (child.name for child in path.iterdir() if child.is_dir())
    return set(names) & set(SPLITS)


def _split_name(file: Path) -> str:
    return re.split(r"[-_.]", file.name)[0]


def _saved(folder: Path, split: str) -> list[Path] | None:
    """The files of a folder that `save_to_disk` wrote, None for another folder."""
    if (folder / "dataset_dict.json").is_file():
        if split not in splits_of(folder):
            raise _no_split(folder, split)
        folder = folder / split
    elif not (folder / "state.json").is_file():
        return None
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    # The library raises errors of many kinds for a folder that is incomplete.
    except Exception as error:
        raise DataError(f"{folder} cannot be read as saved by datasets: {first_line(error)}. Save it again.") from error
    assert isinstance(saved, datasets.Dataset)
    return [Path(file["filename"]) for file in saved.cache_files]


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files of a folder: those in it, or those in its folders named by split or column=value."""
    files = _data_files(folder.iterdir())
    if not files:
        folders = sorted(child for child in folder.iterdir() if child.is_dir())
        if folder / split in folders:
            return _in_folder(folder / split, split)
        if splits_of(folder):
            raise _no_split(folder, split)
        hive = (file for child in folders if "=" in child.name for file in child.rglob("*"))
        files = _data_files(file for file in hive if not file.parent.name.startswith((".", "_")))
    if not files:
        inside = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"folder {folder} has no data files; it has {inside}. Allowed: {allowed_sources()}.")
    if mine := [file for file in files if _split_name(file) == split]:
        return mine
    if splits_of(folder):
        raise _no_split(folder, split)
    return files


def _no_split(folder: Path, split: str) -> DataError:
    present = sorted(splits_of(folder))
    return DataError(
        f"folder {folder} has no shards of split '{split}'. "
        f"Splits found: {', '.join(present)}.{nearest(split, present)}"
    )


def _data_files(paths: Any) -> list[Path]:
    """Files of known formats. Where there are parquet or Arrow files, text beside them is about them."""
    files = sorted(
        path
        for path in paths
        if plain_suffix(path) in FORMATS
        and path.name not in ABOUT
        and not path.name.startswith((".", "_"))
        and path.is_file()
    )
    tables = [file for file in files if format_of(file) in ("parquet", "arrow")]
    return tables or files


def _folder_columns(path: Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    """For each file the columns that its folders below `path` name, column=value; whole numbers are read as such."""
    below = [file.parent.relative_to(path) if path.is_dir() and file.is_relative_to(path) else Path() for file in files]
    names = dict.fromkeys(part.split("=")[0] for folder in below for part in folder.parts if "=" in part)
    kinds = pa.schema([(name, pa.string()) for name in names])
    named = pa.dataset.partitioning(kinds, flavor="hive")
    found = [pa.dataset.get_partition_keys(named.parse(f"{folder.as_posix()}/-")) for folder in below]
    for name in names:
        values = [row.get(name) for row in found]
        numbers = all(value is None or WHOLE_NUMBER.fullmatch(value) for value in values)
        for row, value in zip(found, values, strict=True):
            row[name] = int(value) if numbers and value is not None else value
    return found


def _open_text(path: Path, text_format: TextFormat, only: Collection[str] | None) -> Any:
    file = TextFile(path, text_format)
    if format_of(path) == "json":
        return (JsonArray if ARRAY.match(file.sample) else JsonLines)(file, only)
    return Cells(file, _with_delimiter(file, text_format), only)


def _with_delimiter(file: TextFile, text_format: TextFormat) -> TextFormat:
    """The format with the delimiter of a file: that which is given or, as Excel writes it, named by the file; else the
    one that its extension says, or another one that fits its lines, which is then said.
    """
    usual = "\t" if plain_suffix(file.path) == ".tsv" else ","
    named = re.match(r"sep=(.)\r?\n", file.sample)
    found = text_format.delimiter or (named[1] if named else usual if not text_format.quoted else None)
    if found is None:
        found = find_delimiter(file.path, file.sample, usual, text_format.columns)
        if found != usual:
            say_once(f"{file.path}: its columns are separated by {DELIMITERS[found]}, not {DELIMITERS[usual]}")
    return TextFormat(found, text_format.encoding, text_format.columns, text_format.quoted)


def _joined(readers: Sequence[Any], constants: list[dict[str, Any]], only: Collection[str] | None) -> Several:
    """One reader for several files. Raises DataError if one with a header lacks a column that another one has."""
    if isinstance(readers[0], Cells):
        for reader in readers:
            ours, theirs = (
                [name for name in names if only is None or name in only] for names in (reader.names, readers[0].names)
            )
            if set(ours) != set(theirs):
                raise DataError(
                    f"{reader.path} and {readers[0].path.name} have different columns.\n"
                    f"  {reader.path.name}: {', '.join(ours)}\n  {readers[0].path.name}: {', '.join(theirs)}\n"
                    "The files of one source must have the same columns."
                )
    return Several(readers, constants, only)
