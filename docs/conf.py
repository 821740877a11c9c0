"""The documentation site (`make docs`): these pages, with the reference written from docstrings, settings and commands.

A line `<!-- commands -->`, `<!-- settings -->` or `<!-- names -->` of a page becomes that part of the reference.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main
from sphinx.application import Sphinx
from sphinx.util import logging
from transformers import TrainingArguments

import rlkd
from rlkd.checks import field_types, in_words
from rlkd.cli.main import app as commands
from rlkd.jobs.training import TRAINING_JOBS
from rlkd.pipeline.arguments import DistillArguments
from rlkd.settings.fields import default_of, own_names

ROOT = Path(__file__).parents[1]
BLOB = "https://github.com/rlkd/rlkd/blob/main"

project, version = "rlkd", rlkd.__version__
copyright = "The rlkd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
highlight_language = "none"
smartquotes = False
html_theme = "furo"
html_title = f"rlkd {version}"
html_copy_source = False
myst_heading_anchors = 4
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures, which are other projects'


def escaped(text: str) -> str:
    """Plain text for a cell of a table in Markdown."""
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


def cli() -> Iterator[str]:
    """Each command with its help and its options."""
    yield from _command(typer.main.get_command(commands), "rlkd")


def _command(command: Any, name: str) -> Iterator[str]:
    for word, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _command(inner, f"{name} {word}")
    if hasattr(command, "commands"):
        return
    yield f"## `{name}`\n\n{inspect.cleandoc(command.help or '')}\n\n| option | default | |\n|---|---|---|"
    for option in command.params:
        flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        default = "required" if option.required else _value(option.default)
        yield f"| {flags} | {default} | {escaped(option.help or '')} |"
    yield ""


def settings() -> Iterator[str]:
    """The settings that rlkd declares, by their dataclass, and the jobs that take them."""
    jobs = {"distill": (DistillArguments,)} | {f"train {name}": job.settings for name, job in TRAINING_JOBS.items()}
    for kind in dict.fromkeys(kind for kinds in jobs.values() for kind in kinds):
        own, types = own_names(kind), field_types(kind)
        taken = ", ".join(f"`rlkd {name}`" for name, kinds in jobs.items() if kind in kinds)
        rows = [item for item in dataclasses.fields(kind) if item.init and item.name in own]
        if not rows:
            continue
        yield f"## {kind.__name__}\n\nOf {taken}.\n\n| setting | default | allowed | |\n|---|---|---|---|"
        for item in rows:
            missing = item.default is item.default_factory is dataclasses.MISSING
            default = "required" if missing else _value(default_of(item))
            about = escaped(item.metadata.get("help", ""))
            yield f"| `{item.name}` | {default} | {escaped(in_words(types[item.name]))} | {about} |"
        yield ""


def _value(value: Any) -> str:
    shown = "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{shown}`" if shown else "–"


def names() -> Iterator[str]:
    """Every public name, by the package it lives in."""
    packages: dict[str, list[str]] = {}
    for name, module in sorted(rlkd._PUBLIC.items(), key=lambda item: item[0].casefold()):
        packages.setdefault(module.partition(".")[0], []).append(name)
    for package, found in sorted(packages.items()):
        about = inspect.cleandoc(importlib.import_module(f"rlkd.{package}").__doc__ or "").partition("\n\n")[0]
        yield f"## rlkd.{package}\n\n{escaped(about)}\n\n```{{eval-rst}}"
        for name in found:
            yield from (*_directive(name), "")
        yield "```\n"


def _directive(name: str) -> tuple[str, ...]:
    item = getattr(rlkd, name)
    if inspect.isclass(item):
        kind = "exception" if issubclass(item, Exception) else "class"
        shown = "(...)" if issubclass(item, TrainingArguments) else ""  # its signature is in settings.md
        return (f".. auto{kind}:: rlkd.{name}{shown}", "   :members:", "   :show-inheritance:")
    if inspect.isfunction(item):
        return (f".. autofunction:: rlkd.{name}",)
    keys = f"Keys: {', '.join(f'``{key}``' for key in item)}." if isinstance(item, dict) else ""
    return (f".. py:data:: rlkd.{name}", "", f"   {keys}")


def prose_or_literal(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: paragraphs stay paragraphs, and what is laid out (lists of fields, formulas) stays."""
    found: list[str] = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        if re.search(r"^ |\S  +\S", paragraph, re.MULTILINE):
            found += ["::", "", *(f"    {line}" for line in paragraph.splitlines())]
        else:
            marked = re.split(r"`+([^`]+)`+", paragraph)
            found += "".join(
                f"``{part}``" if k % 2 else re.sub(r"([*|_\\])", r"\\\1", part) for k, part in enumerate(marked)
            ).splitlines()
        found.append("")
    lines[:] = found


PARTS: dict[str, Callable[[], Iterator[str]]] = {"commands": cli, "settings": settings, "names": names}


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the generated parts, and lead links to files outside this folder to the repository."""

    def outside(link: re.Match[str]) -> str:
        path = link[1].partition("#")[0]
        if not (ROOT / path).exists():
            logging.getLogger(__name__).warning("%s: no file %s", page, path)
        return f"]({BLOB}/{link[1]})"

    text = re.sub(r"\]\(\.\./([^)]+)\)", outside, source[0])
    source[0] = re.sub(r"^<!-- (\w+) -->$", lambda part: "\n".join(PARTS[part[1]]()), text, flags=re.MULTILINE)


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", prose_or_literal)
