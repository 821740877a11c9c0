"""Missing values that a template prints as words: "context: None"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError
from .template import Template

# How a template prints a missing value, in small letters.
WORDS = ("none", "nan")


def missing_columns(
    template: Template, row: Mapping[str, Any], printed: str, render: Callable[[Mapping[str, Any]], str]
) -> tuple[str, ...]:
    """The columns whose missing values (None or NaN, also inside lists) stand as words in `printed`.

    A column is one of them if the text has fewer such words with an empty text in its place, so that conditions,
    filters and defaults of the template count. render: a changed row as text.
    """
    gold = template.gold_columns
    found = []
    for name in sorted(template.names - gold):
        if name not in row or not _has_missing(row[name]):
            continue
        try:
            filled = render({**row, name: _filled(row[name])})
        except DataError:
            filled = ""
        if any(printed.lower().count(word) > filled.lower().count(word) for word in WORDS):
            found.append(name)
    return tuple(found)


def _has_missing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_missing, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(item) for item in value]
    return "" if _has_missing(value) else value
