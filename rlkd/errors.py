"""Errors a user can meet, each with the exit code the command line ends with."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from reprlib import Repr


class RlkdError(Exception):
    """An error the user can fix: the message gives the problem, its place, the allowed values and the remedy."""

    exit_code = 1


class ConfigError(RlkdError):
    """A setting, a YAML file or a combination of settings that cannot work."""

    exit_code = 2


class DataError(RlkdError):
    """Rows, columns, templates or labels that cannot be used."""

    exit_code = 3


class ModelError(RlkdError):
    """A model, tokenizer or precision that cannot take its role."""

    exit_code = 2


class DivergenceError(RlkdError):
    """A number that must be finite is not; raised before it can reach the weights.

    batch: the rows it came with, JSON-able, for the caller to save.
    """

    exit_code = 5
    batch: tuple[dict[str, object], ...] = ()


class CheckpointError(RlkdError):
    """A checkpoint that is damaged, or of another run: resuming from it would not continue this run."""


class LockedError(RlkdError):
    """Another process is writing to the folder; trying again later may work (sysexits' EX_TEMPFAIL)."""

    exit_code = 75


class ServerError(RlkdError):
    """A server that is down, too slow or failing; finished work is kept, and trying again later may work."""

    exit_code = 75


class InterruptedRunError(RlkdError):
    """A signal stopped the run; finished work is saved. Exit code as the shell gives it: 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(name: str, allowed: list[str]) -> str:
    """A hint naming the closest allowed spelling of `name`, or an empty string."""
    from difflib import get_close_matches

    if len(name) > 100:  # no misspelling
        return ""
    close = get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


class _Shown(Repr):
    """`reprlib` with room for a setting, which cuts before it prints."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel, self.maxdict = 3, 8

    def repr_int(self, value: int, level: int) -> str:
        return super().repr_int(value, level) if value.bit_length() < 10_000 else "a number of thousands of digits"


def shown(value: object) -> str:
    """`repr` of a value from outside, for an error message: on one line, and short, however large the value is."""
    return cut(_Shown().repr(value), 300)


def cut(text: str, length: int = 100) -> str:
    """A text from outside, for an error message: its beginning, if it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def listed(names: Collection[str], most: int = 20) -> str:
    """Names from outside, for an error message: `a, b and 3 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(cut(name) for name in islice(names, most)) + more


def encodable(value: object) -> str:
    """A value as text that UTF-8 can encode: half a surrogate pair is shown escaped."""
    return str(value).encode("utf-8", "backslashreplace").decode()
