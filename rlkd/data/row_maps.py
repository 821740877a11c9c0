"""Renaming of columns and relabelling, to what templates expect: `--column-map` and `--label-map`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import datasets

DEFAULT_LABEL_COLUMN = "label"
NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class RowMap:
    """Changes of each row: columns, old name -> new name, then labels, column (new name) -> old value -> new value."""

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A changed copy of a row; the row itself if there is nothing to change.

        Missing labels (None, -1) are kept unless the map has them.

        Raises: DataError for a column the row lacks, two columns of one name, or a label the map does not know.
        """
        if not self.columns and not self.labels:
            return dict(row) if type(row) is not dict else row
        names = self.names(list(row))
        changed = dict(zip(names, row.values(), strict=True))
        for column, values in self.labels.items():
            if column not in changed:
                raise DataError(
                    f"label_map: there is no column '{column}'. Found: {', '.join(names)}.{nearest(column, names)}"
                )
            changed[column] = _relabel(column, changed[column], values)
        return changed

    def names(self, columns: Sequence[str]) -> list[str]:
        """The column names after the change, in order. Raises DataError as the call does."""
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise DataError(
                f"column_map: there is no column '{missing[0]}'. Found: {', '.join(columns)}."
                f"{nearest(missing[0], list(columns))} Write old=new, the old name first."
            )
        names = [self.columns.get(name, name) for name in columns]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"column_map: two columns would have the name '{twice[0]}'. Rename the other one too.")
        return names

    def reads(self, names: Collection[str] | None) -> frozenset[str] | None:
        """The columns to read of a source, so that the changed rows have the columns `names`; None: all."""
        return None if names is None else frozenset(names) | self.columns.keys() | self.labels.keys()

    def to_json(self) -> dict[str, Any]:
        """The JSON form, whose keys are strings."""
        return json.loads(
            json.dumps({"columns": dict(self.columns), "labels": {c: dict(v) for c, v in self.labels.items()}})
        )

    def dataset(self, rows: datasets.Dataset) -> datasets.Dataset:
        """All rows changed, in memory. Raises DataError as the call does."""
        if not self.columns and not self.labels:
            return rows
        self.names(rows.column_names)
        changed = [self(row) for row in rows] if self.labels else None
        return rows.rename_columns(dict(self.columns)) if changed is None else type(rows).from_list(changed)


def parse_row_map(column_map: Sequence[str] = (), label_map: Sequence[str] = ()) -> RowMap:
    """A RowMap from flags.

    column_map  `old=new[,old=new...]`, or JSON {"old": "new"}; repeatable
    label_map   `[column:]old=new[,old=new...]`, or JSON {"column": {"old": new}}; repeatable; by default the column is
                `label`, after column_map. Whole numbers are read as numbers.
    Raises: ConfigError that shows the expected form.
    """
    columns: dict[str, str] = {}
    for text in column_map:
        columns |= _mapping(text) if text.lstrip().startswith("{") else dict(_pairs(text, "--column-map", "old=new"))
    bad = [name for name, new in columns.items() if not isinstance(new, str) or not name or not new]
    if bad:
        raise ConfigError(f"--column-map: '{bad[0]}' maps to {columns[bad[0]]!r}; a column's new name must be text.")
    labels: dict[str, dict[Any, Any]] = {}
    for text in label_map:
        if text.lstrip().startswith("{"):
            found = _mapping(text)
            if not all(isinstance(values, dict) for values in found.values()):
                found = {DEFAULT_LABEL_COLUMN: found}
        else:
            column, colon, pairs = text.partition(":")
            if not colon or "=" in column:  # a ":" inside the first value
                column, pairs = DEFAULT_LABEL_COLUMN, text
            found = {column: dict(_pairs(pairs, "--label-map", "[column:]old=new"))}
        for column, values in found.items():
            labels.setdefault(column, {}).update({_value(old): _value(new) for old, new in values.items()})
    return RowMap(columns, labels)


def _relabel(column: str, value: Any, values: Mapping[Any, Any]) -> Any:
    if isinstance(value, list):
        return [_relabel(column, item, values) for item in value]
    if not isinstance(value, bool) and isinstance(value, (int, str)) and value in values:
        return values[value]
    if value is None or value == -1:
        return value
    raise DataError(
        f"label_map: column '{column}' has {value!r}, which is not mapped. "
        f"Mapped: {', '.join(map(repr, values))}. Add it: {value}=..."
    )


def _pairs(text: str, flag: str, form: str) -> list[tuple[str, str]]:
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not pair[0].strip() for pair in pairs):
        raise ConfigError(f"{flag} '{text}': write {form}[,old=new...], or JSON for names with '=' or ','.")
    names = [old.strip() for old, _ in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(f"{flag} '{text}': a name is given twice on the left. Give each once.")
    return [(old.strip(), new.strip()) for old, new in pairs]


def _mapping(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"'{text}' is not valid JSON: {error}.") from error


def _value(text: Any) -> Any:
    return int(text) if isinstance(text, str) and NUMBER.fullmatch(text) else text
