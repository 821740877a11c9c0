"""Errors that users can meet, each with the exit code of the command line."""

from __future__ import annotations


class RlkdError(Exception):
    """An error that the user can fix: the message says what is wrong, where, what is allowed and how to fix it."""

    exit_code = 1


class ConfigError(RlkdError):
    """A setting, a YAML file or a combination of settings that is not valid."""

    exit_code = 2


class DataError(RlkdError):
    """Rows, columns, templates or labels that cannot be used."""

    exit_code = 3


class ModelError(RlkdError):
    """A model, tokenizer or precision that does not fit its role."""

    exit_code = 2


class DivergenceError(RlkdError):
    """A number that must be finite is not; raised before it can reach the weights.

    batch: the rows it was computed from, JSON-serialisable, for the caller to save.
    """

    exit_code = 5
    batch: tuple[dict[str, object], ...] = ()


class CheckpointError(RlkdError):
    """A checkpoint that is damaged or belongs to another run."""


class LockedError(RlkdError):
    """Another process is writing the same output; trying again later may work (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class InterruptedRunError(RlkdError):
    """A signal stopped the run; finished work is saved. The exit code is the shell's: 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(name: str, allowed: list[str]) -> str:
    """A hint with the most similar allowed name, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
