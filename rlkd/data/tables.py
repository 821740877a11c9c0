"""Rows of parquet and Arrow files, which have types: the shards of a source are joined if that loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .text import kind_of
from .values import BadRowError

if TYPE_CHECKING:
    import datasets

BATCH = 1024
SIGNS = {b"PAR1": "parquet", b"ARROW1": "arrow"}


class TableFiles:
    """The rows of parquet or Arrow files, in the order given.

    source: their name in errors. only: the columns to read; None for all. constants: further columns of each file.
    Raises DataError with the file that is damaged, lacks a column that another one has, or has one of another type.
    """

    cells = False

    def __init__(
        self,
        files: Sequence[Path],
        source: Path,
        only: Collection[str] | None = None,
        constants: Sequence[dict[str, Any]] = (),
    ):
        self.files, self.source = list(files), source
        self.constants = list(constants) or [{} for _ in files]
        schemas = [_with_constants(_schema(f), more) for f, more in zip(self.files, self.constants, strict=True)]
        self.names = dict.fromkeys(name for schema in schemas for name in schema.names)
        self.schema = join(self.files, schemas, only)

    def where(self, place: int) -> str:
        return f"{self.source}, row {place}"

    def records(self) -> Iterator[tuple[int, tuple[list[dict[str, Any]], pa.RecordBatch, int]]]:
        number = 0
        for batch in self.batches():
            rows: list[dict[str, Any]] = []  # filled when the first of them is parsed
            for i in range(batch.num_rows):
                number += 1
                yield number, (rows, batch, i)

    def parse(self, place: int, raw: tuple[list[dict[str, Any]], pa.RecordBatch, int]) -> dict[str, Any]:
        rows, batch, i = raw
        try:
            if not rows:
                rows += batch.to_pylist()
            return rows[i]
        # Arrow stores texts that are no UTF-8 and dates that Python does not have, and fails with many kinds of error.
        except Exception:
            try:
                return batch.slice(i, 1).to_pylist()[0]
            except Exception as error:
                raise BadRowError(f"{self.where(place)} cannot be read: {error}. Fix or remove it.") from error

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows with the joined schema. Raises DataError if a file is damaged, or a value does not fit."""
        for file, constants in zip(self.files, self.constants, strict=True):
            wanted = [name for name in self.schema.names if name not in constants]
            try:
                for batch in _batches(file, wanted):
                    yield _converted(batch, self.schema, constants)
            except pa.ArrowInvalid as error:
                raise DataError(f"{file} cannot be joined with the other files without loss: {error}.") from error
            except (pa.ArrowException, OSError) as error:
                raise unreadable(file, error) from error

    def table(self) -> pa.Table:
        """All rows in memory. Raises DataError as `batches` does."""
        return pa.Table.from_batches(self.batches(), schema=self.schema)


def join(files: Sequence[Path], schemas: Sequence[pa.Schema], only: Collection[str] | None = None) -> pa.Schema:
    """The schema of all columns, or of those in `only`, that the rows of all files fit into without loss.

    Raises DataError with the file whose columns differ.
    """
    chosen = [_plain([field for field in schema if only is None or field.name in only]) for schema in schemas]
    joined = chosen[0]
    for file, schema in zip(files, chosen, strict=True):
        if twice := [name for name in schema.names if schema.names.count(name) > 1]:
            raise DataError(f"{file} has {len(twice)} columns named '{twice[0]}'. Rename one of them.")
        if (unified := _unified(joined, schema)) is not None:
            joined = unified
        else:
            raise DataError(
                f"{file} and {files[0].name} have different columns.\n  {file.name}: {_columns(schema)}\n"
                f"  {files[0].name}: {_columns(chosen[0])}\n"
                "The files of one source must have the same columns, of types that can be joined without loss."
            )
    return joined.with_metadata(schemas[0].metadata)


def _unified(one: pa.Schema, other: pa.Schema) -> pa.Schema | None:
    """The schema that holds both without loss, None if there is none."""
    if set(one.names) != set(other.names):
        return None
    try:
        unified = pa.unify_schemas([one, other], promote_options="permissive")
    except pa.ArrowException:
        return None
    # Text would become bytes.
    texts = [field.name for field in unified if pa.types.is_binary(field.type)]
    return None if any(one.field(name).type != other.field(name).type for name in texts) else unified


def as_dataset(table: pa.Table, source: str | Path) -> datasets.Dataset:
    """A data set of a table. Raises DataError for a column of a type that data sets do not have."""
    import datasets

    for field in table.schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([field]))
        except (ValueError, NotImplementedError) as error:
            raise DataError(
                f"{source}: column '{field.name}' has the type {field.type}, which cannot be used. Convert it to text."
            ) from error
    return datasets.Dataset(table)


def unreadable(path: Path, error: Exception) -> DataError:
    """The error of a damaged parquet or Arrow file."""
    kind = "an Arrow" if path.suffix.lower() == ".arrow" else "a parquet"
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as failed:
        return DataError(f"{path} cannot be read: {failed.strerror}.")
    other = None if any(head.startswith(sign) for sign in SIGNS) else kind_of(path, head)
    reason = f"it is {other}" if other else f"{first_line(error)}. Write it again"
    return DataError(f"{path} is not a readable {kind.split()[1]} file: {reason}.")


def first_line(error: Exception) -> str:
    """The first line of a library's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def _schema(path: Path) -> pa.Schema:
    try:
        if path.suffix.lower() == ".arrow":
            with _ipc(path) as reader:
                return reader.schema
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def _ipc(path: Path) -> Any:
    """A reader of Arrow's file format or, as the library datasets writes, of its stream format."""
    file = pa.memory_map(str(path))
    start = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a file, a thousand rows at a time."""
    if path.suffix.lower() != ".arrow":
        yield from pq.ParquetFile(path).iter_batches(BATCH, columns=columns)
        return
    with _ipc(path) as reader:
        whole = isinstance(reader, pa.RecordBatchFileReader)
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader:
            for start in range(0, batch.num_rows, BATCH):
                yield batch.select(columns).slice(start, BATCH)


def _with_constants(schema: pa.Schema, constants: dict[str, Any]) -> pa.Schema:
    for name, value in constants.items():
        if name in schema.names:
            schema = schema.remove(schema.get_field_index(name))
        schema = schema.append(pa.field(name, pa.scalar(value).type))
    return schema


def _converted(batch: pa.RecordBatch, schema: pa.Schema, constants: dict[str, Any]) -> pa.RecordBatch:
    """A batch with the columns of `schema`, in its order and types. Raises ArrowInvalid if a value does not fit."""
    arrays = [
        pa.repeat(pa.scalar(constants[field.name], field.type), batch.num_rows)
        if field.name in constants
        else _converted_array(batch.column(field.name), field.type)
        for field in schema
    ]
    # The number of rows is that of the file even if no column is read.
    return pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else batch


def _converted_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(array, pa.ExtensionArray) and not isinstance(kind, pa.BaseExtensionType):
        array = array.storage
    return array if array.type == kind else array.cast(kind)


def _plain(fields: Sequence[pa.Field]) -> pa.Schema:
    """The fields, nullable, with types that a data set can hold."""
    return pa.schema([pa.field(field.name, _plain_type(field.type), metadata=field.metadata) for field in fields])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Values in place of a dictionary's indices, text in place of a view of text; inside lists and structs too."""
    types: dict[Callable[[pa.DataType], bool], Callable[[Any], pa.DataType]] = {
        pa.types.is_dictionary: lambda k: _plain_type(k.value_type),
        pa.types.is_string_view: lambda k: pa.string(),
        pa.types.is_binary_view: lambda k: pa.binary(),
        pa.types.is_list: lambda k: pa.list_(_plain_type(k.value_type)),
        pa.types.is_list_view: lambda k: pa.list_(_plain_type(k.value_type)),
        pa.types.is_large_list: lambda k: pa.large_list(_plain_type(k.value_type)),
        pa.types.is_struct: lambda k: pa.struct([(f.name, _plain_type(f.type)) for f in k]),
    }
    return next((change(kind) for is_it, change in types.items() if is_it(kind)), kind)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
