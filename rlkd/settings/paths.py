"""Paths that do not exist, named from the command line and its YAML file before torch and transformers are imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, DataError, ModelError, nearest
from ..io.urls import refuse_remote

DATA = {"data", "test_data", "dataset", "eval_dataset", "train_file", "dev_file", "test_files"}
FOLDERS = {"pseudo_labels", "content_free_labels", "templates_dir"}
MODELS = {"teacher", "student", "model_name_or_path", "student_pretrained"}
NAMES = DATA | FOLDERS | MODELS
READ = DATA | {"pseudo_labels", "content_free_labels"}  # from object storage, too
FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|gz|zst)$", re.IGNORECASE)
LINE = re.compile(r"^(\w+):[ \t]+['\"]?([^'\"#\n]+?)['\"]?[ \t]*(?:#.*)?$", re.MULTILINE)
LARGEST_FILE = 2**20
# Next to the package in a checkout, inside it in an installation (see pyproject.toml).
_BESIDE, _INSIDE = (Path(__file__).resolve().parents[i] / "recipes" for i in (2, 1))
RECIPES = _BESIDE if _BESIDE.is_dir() else _INSIDE


def refuse_remote_paths(argv: list[str] | None = None) -> None:
    """Raise ConfigError for the first word or setting that names object storage and is no input that is read from it.
    argv: by default the command line.
    """
    words = sys.argv[1:] if argv is None else argv
    found = [(name, value) for name, value in _flags(words) if name != "config"]
    files = [config_file(value) for name, value in _flags(words) if name == "config"]
    found += [setting for file in files if file.is_file() for setting in _lines(file).items()]
    after_flag = {i + 1 for i, word in enumerate(words) if word.startswith("--") and "=" not in word}
    found += [("path", word) for i, word in enumerate(words) if i not in after_flag and not word.startswith("-")]
    for name, value in found:
        if name not in READ and not value.lower().startswith(("http://", "https://")):
            refuse_remote(value, name)


def refuse_missing_paths(argv: list[str] | None = None) -> None:
    """Raise the error of the first setting that names a file or folder that is not there. What may be a name on the hub
    is left to the loaders. argv: by default the command line. Raises as `refuse_remote_paths`, too.
    """
    refuse_remote_paths(argv)
    given: dict[str, str] = {}
    for name, value in _flags(sys.argv[1:] if argv is None else argv):
        if name == "config":
            given = {**_lines(config_file(value)), **given}
        else:
            given[name] = value
    if given.get("teacher_signal") in ("recorded", "base"):  # no teacher is read
        given.pop("teacher", None)
    for name, value in given.items():
        path = Path(value).expanduser()
        if name not in NAMES or not _is_local(name, value) or path.exists():
            continue
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        where = "" if path.parent.is_dir() else f" Folder {path.parent} does not exist."
        message = f"{name} = '{value}': there is no such file or folder.{near}{where}"
        raise ModelError(message) if name in MODELS else DataError(message)


def config_file(name: str) -> Path:
    """The file that --config names: where it says, or else the one of this name that comes with rlkd (recipes/)."""
    path = Path(name)
    shipped = RECIPES / path.name
    return shipped if not path.exists() and path.parent.name in ("", "recipes") and shipped.is_file() else path


def _flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    for i, word in enumerate(argv):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and (equals or i + 1 < len(argv)):
            yield name.replace("-", "_"), value if equals else argv[i + 1]


def _lines(path: Path) -> dict[str, str]:
    """The plain `name: value` lines of a YAML file; what else is in it is the parser's."""
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file.")
    if path.stat().st_size > LARGEST_FILE:
        return {}
    found = LINE.findall(path.read_text(encoding="utf-8", errors="replace"))
    return {name: value for name, value in found if value not in ("null", "~")}


def _is_local(name: str, value: str) -> bool:
    """Whether it can only be a path: not a hub id (`name`, `owner/name`), a pattern or a URL."""
    if "://" in value or any(sign in value for sign in "*?["):
        return False
    paths = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1
    return paths or name in FOLDERS or (name in DATA and FILE.search(value) is not None)
