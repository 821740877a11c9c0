"""Prompts that say less than their row should: a missing value printed as "None", characters without a token.

Such a prompt is used all the same, as promptsource and the tokenizer make it, but it is counted by template and column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..records import Prompt, PromptedRow
from ..templates.template import Template

STUDENT = "student input"
TEMPLATE_TEXT = "(the template's own text)"
MOST_CHARACTERS = 20


def columns_of(template: Template | None, row: Mapping[str, Any], pieces: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(column, piece) of each piece of a prompt, by the column that it comes from."""
    names = sorted(row) if template is None else sorted(template.names & row.keys())
    found = []
    for piece in pieces:
        holders = [name for name in names if piece in str(row[name])]
        found += [(name, piece) for name in holders or [TEMPLATE_TEXT]]
    return tuple(found)


class FlawCounts:
    """Numbers of flawed prompts: missing and unknown by template and column, characters by piece of text."""

    def __init__(self, counts: Mapping[str, Any] | None = None):
        self.missing: dict[str, dict[str, int]] = {}
        self.unknown: dict[str, dict[str, int]] = {}
        self.characters: dict[str, int] = {}
        if counts:
            self.merge(counts)

    def add(self, template: str, prompt: Prompt) -> None:
        """Count a prompt."""
        _count(self.missing.setdefault(template, {}), prompt.missing)
        _count(self.unknown.setdefault(template, {}), {column for column, _ in prompt.unknown})
        _count(self.characters, {piece[:MOST_CHARACTERS] for _, piece in prompt.unknown})

    def add_rows(self, rows: Iterable[PromptedRow], templates: Iterable[str]) -> None:
        """Count the prompts of rows, and the student's inputs. templates: the name of each prompt of a row."""
        names = list(templates)
        for row in rows:
            alone = len(names) == 1 and row.prompts[0] is row.student  # there are no templates
            if row.student is not None and not alone:
                self.add(STUDENT, row.student)
            for name, prompt in zip(names, row.prompts, strict=True):
                if alone or prompt is not row.student:
                    self.add(name, prompt)

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Add what `to_json` returned for other prompts."""
        for mine, theirs in ((self.missing, counts.get("missing", {})), (self.unknown, counts.get("unknown", {}))):
            for template, columns in theirs.items():
                for column, number in columns.items():
                    own = mine.setdefault(template, {})
                    own[column] = own.get(column, 0) + number
        for piece, number in counts.get("characters", {}).items():
            self.characters[piece] = self.characters.get(piece, 0) + number

    def to_json(self) -> dict[str, Any]:
        """The counts that are not empty; of the characters the most frequent."""
        frequent = sorted(self.characters.items(), key=lambda item: (-item[1], item[0]))[:MOST_CHARACTERS]
        counts = {
            "missing": {name: columns for name, columns in self.missing.items() if columns},
            "unknown": {name: columns for name, columns in self.unknown.items() if columns},
            "characters": dict(frequent),
        }
        return {name: value for name, value in counts.items() if value}

    def lines(self) -> list[str]:
        """The counts in words, a line for each template."""
        texts = (
            (self.missing, "print a missing value as a word such as None, by column"),
            (self.unknown, "have characters that the tokenizer does not know, by column"),
        )
        lines = [
            f"{name}: prompts {text}: {_shown(columns)}"
            for counts, text in texts
            for name, columns in counts.items()
            if columns
        ]
        if characters := self.to_json().get("characters"):
            lines.append(f"unknown characters: {_shown({repr(piece): n for piece, n in characters.items()})}")
        return lines


def _count(counts: dict[str, int], names: Iterable[str]) -> None:
    for name in names:
        counts[name] = counts.get(name, 0) + 1


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
