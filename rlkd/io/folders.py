"""Not writing over, or in between, what is not ours."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ConfigError
from .files import check_folder
from .urls import refuse_remote

# What people keep next to results: logs and settings.
BESIDE = ("*.log", "*.out", "*.err", "*.txt", "*.yaml", "*.yml", "*.sh", ".*")
SHOWN = 4
GENERATOR = '<meta name="generator" content="rlkd">'  # in the head of every page
HEAD_BYTES = 4096


def refuse_other_contents(folder: Path, setting: str, *, signs: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raise ConfigError if `folder` cannot be written, or holds something else than what is to be written there.

    setting: names the folder in the error. signs: names (glob patterns) of which one is enough to know the folder as
    ours. own: names that may be there before a sign is. Logs, settings, hidden files and folders are no obstacle.
    """
    check_folder(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if any(_is_one_of(path.name, signs) for path in entries):
        return
    names = [path.name for path in entries if not path.is_dir()]
    if other := [name for name in names if not _is_one_of(name, (*own, *BESIDE))]:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise ConfigError(
            f"{setting} {folder} holds something else: {', '.join(other[:SHOWN])}{more}. Name a new or an empty folder."
        )


def write_page(path: Path, text: str) -> None:
    """Write an HTML page; the folder is created if missing. Raises ConfigError if it cannot be written, and as
    `check_page` does.
    """
    check_page(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error.strerror}. Name another file.") from None


def check_page(path: Path) -> None:
    """Raise ConfigError if a page at `path` would replace a file that is none of ours, or is a URL."""
    refuse_remote(path, "--out")
    if path.is_file() and GENERATOR.encode() not in _head(path):
        raise ConfigError(f"--out {path} exists and is not a page of rlkd. Name another file.")


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
