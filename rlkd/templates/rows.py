"""What a template renders: the values of a row, its random draws, and the separator that no row can write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cached_property
from random import Random, SystemRandom
from typing import Any
from uuid import UUID

import jinja2

from .meter import MAX_HASHED_BITS, SCALARS, Limits, SandboxError

SEPARATOR = "|||"
# promptsource's replacement for a separator inside a text of the row, which templates of multi_news look for.
PIPE_PROTECTOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"
# Sutton SignWriting: printable symbols without case, which texts hardly ever contain.
_RARE = tuple(map(chr, range(0x1D800, 0x1DA00)))
_DRAW = SystemRandom()


class RowRandom:
    """A generator per (seed, template, row), created only if a filter draws from it."""

    def __init__(self, seed: int, template: str, row: Mapping[str, Any]):
        self._key = (seed, template, row)

    @cached_property
    def generator(self) -> Random:
        seed, template, row = self._key
        return Random(json.dumps([seed, template, dict(row)], sort_keys=True, default=str))


def plain_row(row: Mapping[str, Any], names: Iterable[str], limits: Limits, *, protect: bool = False) -> dict[str, Any]:
    """The columns `names` of a row as plain JSON values, copied, so that a template may change them.

    protect: replace "|||" by PIPE_PROTECTOR in the columns that are strings themselves, as promptsource does.
    Dates, decimals and UUIDs become strings; a column of any other type is an error if the template reads it.
    Raises SandboxError for strings or nesting beyond the limits.
    """
    found = {name: row[name] for name in names if name in row}
    copy = _Copy(limits)
    return {
        name: copy(value.replace(SEPARATOR, PIPE_PROTECTOR) if protect and isinstance(value, str) else value)
        for name, value in found.items()
    }


class _Copy:
    """Copies values to plain ones, as many items as a list may have in total: a value may hold another repeatedly."""

    def __init__(self, limits: Limits):
        self.limits, self.left = limits, limits.value

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            if len(value) > self.limits.value:
                raise self.limits.exceeded("value")
            return str.__str__(value)
        if type(value) in SCALARS:
            return value
        if depth > self.limits.nesting:
            raise self.limits.exceeded("nesting")
        if isinstance(value, (Mapping, list, tuple)):
            self.left -= len(value)
            if self.left < 0:
                raise self.limits.exceeded("value")
        if isinstance(value, Mapping):
            return {self._key(key): self(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item, depth + 1) for item in value]
        for kind in (bool, int, float):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, (date, time, timedelta, Decimal, UUID)):
            return self(str(value), depth)
        if hasattr(value, "tolist"):  # arrays and tensors
            return self(value.tolist(), depth + 1)
        return jinja2.StrictUndefined(
            f"the row holds a {type(value).__name__}; templates read text, numbers, lists and dicts. Convert it."
        )

    def _key(self, key: Any) -> Any:
        large = type(key) is int and key.bit_length() > MAX_HASHED_BITS
        return key if type(key) in SCALARS - {str} and not large else self(str(key))


def own_separator(values: Mapping[str, Any]) -> str:
    """Three random characters, none of which is in the values, to stand for a template's own "|||" in a rendering.

    So a row cannot split the text, from whatever pieces it builds a separator. Raises SandboxError for a row that
    holds all the characters that there are to draw from.
    """
    drawn = _DRAW.sample(_RARE, 3)
    if any(character in text for text in _texts(values) for character in drawn):
        held = set().union(*_texts(values))
        free = [character for character in _RARE if character not in held]
        if len(free) < 3:
            raise SandboxError("cannot tell its '|||' from the row, which holds all of Sutton SignWriting.")
        drawn = _DRAW.sample(free, 3)
    return "".join(drawn)


def shown_bars(text: str, separator: str, protect: bool) -> str:
    """The text with "|" for the characters of an own separator that a template has cut.

    protect: as in `plain_row`; the row's "|||" are put back.
    """
    for character in separator:
        text = text.replace(character, "|")
    return text.replace(PIPE_PROTECTOR, SEPARATOR) if protect else text


def _texts(value: Any) -> Iterator[str]:
    """All strings of plain values, those of keys included."""
    if type(value) is str:
        yield value
    elif type(value) is dict:
        for pair in value.items():
            yield from _texts(pair)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _texts(item)
