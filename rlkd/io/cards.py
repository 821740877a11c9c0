"""Markdown of data cards and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

CARD = "README.md"


def front_matter(metadata: dict[str, Any]) -> str:
    """The YAML block that a card begins with."""
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n---"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; no cell can break out of it."""
    lines = [header, ["---"] * len(header), *([cell(str(value)) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that cannot end a table cell or a line, or open a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
