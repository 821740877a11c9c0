"""Values that a row can have: what JSON may say beyond what text files and tables can store is refused row by row."""

from __future__ import annotations

import json
from typing import Any

from ..errors import DataError, encodable

DEEPEST = 64
SMALLEST, LARGEST = -(2**63), 2**64 - 1
LARGEST_SIGNED = 2**63 - 1
DIGITS = len(str(LARGEST)) + 1


class BadRowError(DataError):
    """A row that cannot be used, in a source whose other rows can."""


class Repeated(dict):
    """A JSON object with a key given twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(found)


def _integer(digits: str) -> int:
    """The number; one of many digits as another that is too large as well. Python refuses to read more than 4,300."""
    return int(digits) if len(digits) <= DIGITS else (SMALLEST - 1 if digits[0] == "-" else LARGEST + 1)


# NaN is not JSON: Python's writers use it for a missing value, as pandas does.
CONSTANTS = {"NaN": None, "Infinity": float("inf"), "-Infinity": float("-inf")}
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=CONSTANTS.__getitem__)


def check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row. Raises BadRowError for a value that cannot be stored: an integer beyond 64 bits, half a surrogate pair
    (JSON can escape one, UTF-8 cannot encode it), a repeated key, deep nesting.
    """
    if type(row) is Repeated:
        raise BadRowError(f"{where} gives a key twice. Remove or rename one of them.")
    for name, value in row.items():
        if problem := _problem(name, 0) or _problem(value, 0):
            raise BadRowError(f"{where}: column '{encodable(name)}' {problem}")
    return row


def _problem(value: Any, depth: int) -> str | None:
    kind = type(value)
    if kind is str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return f"contains an unpaired surrogate ({value[error.start]!r}). Fix or remove it."
    elif kind is int:
        if not SMALLEST <= value <= (LARGEST_SIGNED if depth else LARGEST):
            return "has a whole number of more than 64 bits. Write it as text."
    elif isinstance(value, (list, tuple, dict)):
        if depth == DEEPEST:
            return f"is nested more than {DEEPEST} levels deep. Flatten or remove it."
        if kind is Repeated:
            return "has an object that gives a key twice. Remove or rename one of them."
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((problem for part in parts if (problem := _problem(part, depth + 1))), None)
    return None
