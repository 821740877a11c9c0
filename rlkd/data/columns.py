"""Names and types of the columns of rows that come without a schema, found while they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from .files import WHOLE_NUMBER
from .readers import Reader
from .tables import first_line
from .values import LARGEST_SIGNED, BadRowError

KINDS = {bool: "bool", int: "integer", float: "number", str: "str", list: "list", dict: "dict"}
NUMBERS = {"integer", "number", "unsigned"}
UNREAD = "unread"
ARROW = {
    "bool": pa.bool_(), "integer": pa.int64(), "unsigned": pa.uint64(), "number": pa.float64(), "str": pa.string(),
}  # fmt: skip


class Columns:
    """Names and types of the columns, inferred row by row; in CSV, where all values are text, whole numbers too.

    kinds: types to begin with. nested: also the types inside lists and objects, as a table needs them.
    """

    def __init__(self, kinds: dict[str, str] | None = None, *, nested: bool = False):
        self.kinds: dict[str, str] = {name: kind for name, kind in (kinds or {}).items() if kind != UNREAD}
        self.types: dict[str, pa.DataType] = {}
        self._nested, self._first, self._negative = nested, dict[str, int](), set[str]()
        self._taken, self._refused = Counter[str](), Counter[tuple[str, str]]()

    def add(self, place: int, row: dict[str, Any], reader: Reader) -> None:
        """Take a row into account. Raises BadRowError if a value's type differs from that in earlier rows; such a row
        changes nothing.
        """
        kinds = {name: self._joined(name, value, place, reader) for name, value in row.items()}
        types = {
            name: self._type(name, row[name], place, reader)
            for name, kind in kinds.items()
            if self._nested and kind in ("list", "dict") and row[name] is not None
        }
        for name, kind in kinds.items():
            if self.kinds.get(name, "null") == "null" != kind:
                self._first[name] = place
            if kind == "integer" and not reader.cells and (row[name] or 0) < 0:
                self._negative.add(name)
            self._taken[name] += row[name] is not None
        self.kinds |= kinds
        self.types |= types

    def _joined(self, name: str, value: Any, place: int, reader: Reader) -> str:
        """The type of the values so far and of this one."""
        known = self.kinds.get(name, "null")
        if value is None:
            return known
        kind = KINDS.get(type(value)) or type(value).__name__
        if reader.cells:
            whole = kind == "str" and known in ("null", "integer") and WHOLE_NUMBER.fullmatch(value)
            return "integer" if whole else kind
        if kind == "integer" and value > LARGEST_SIGNED:
            kind = "unsigned"
        if known in ("null", kind):
            return kind
        if {known, kind} == {"integer", "unsigned"} and not (name in self._negative or value < 0):
            return "unsigned"
        if {known, kind} <= NUMBERS and "number" in (known, kind):
            return "number"
        self._refused[name, kind] += 1
        raise self._mixed(name, _shown(kind), _shown(known), place, reader)

    def likelier(self) -> dict[str, str]:
        """Column -> type, of columns whose first value misled: more values of this type were refused than taken."""
        return {name: kind for (name, kind), count in self._refused.items() if count > self._taken[name]}

    def _type(self, name: str, value: Any, place: int, reader: Reader) -> pa.DataType:
        try:
            found = pa.array([value]).type
            if (known := self.types.get(name)) is None or known == found:
                return found
            fields = [pa.schema([(name, kind)]) for kind in (known, found)]
            return pa.unify_schemas(fields, promote_options="permissive").field(0).type
        except (pa.ArrowException, OverflowError) as error:
            kinds = f"values that do not fit one type ({first_line(error)})", _shown(self.kinds.get(name, "null"))
            raise self._mixed(name, *kinds, place, reader) from error

    def _mixed(self, name: str, here: str, known: str, place: int, reader: Reader) -> BadRowError:
        first = f" in {reader.where(self._first[name])}" if name in self._first else " in other rows"
        return BadRowError(
            f"{reader.where(place)}: column '{name}' has {here} here but {known}{first}. Give it one type everywhere."
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

    def table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """The completed rows."""
        return pa.table(
            {
                name: pa.array([row[name] for row in rows], ARROW.get(kind) or self.types.get(name))
                for name, kind in self.kinds.items()
            }
        )


def _shown(kind: str) -> str:
    names = {"str": "text", "dict": "an object", "list": "a list", "bool": "true or false"}
    names["unsigned"] = "a number of 64 bits"
    return "a number" if kind in ("integer", "number") else names.get(kind, f"a {kind} value")
