"""Rows as the two models see them: the teacher under every template, the student bare."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, overload

import datasets

from ..errors import ConfigError, DataError
from ..records import Example
from .prompts import Template
from .row_files import check_columns, check_template_columns, template_columns
from .rows import check_text_column

logger = logging.getLogger(__name__)
STUDENT = "student input"


class Examples(Sequence[Example]):
    """Rows rendered on access. The teacher reads each input under all templates (bare if there are none).

    Args: student_column, what the student reads, or student_template in its place; reference_column, a text or a list
    of texts, for evaluation only; id_column, unique values (by default the row number); source names the rows in
    errors; seed is that of the templates' `choice` filters.
    A row that some template does not apply to, or without student input, is left out: `skipped` counts such rows per
    template name. Raises: DataError for missing or mistyped columns, repeated ids, or if no row is left.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        templates: list[Template],
        *,
        student_column: str | None = None,
        student_template: Template | None = None,
        reference_column: str | None = None,
        id_column: str | None = None,
        source: str = "the rows",
        seed: int = 0,
    ):
        if student_column is None and student_template is None:
            raise ConfigError(
                "student_column and student_template are both unset: the student reads a column, or its own template."
            )
        self.rows, self.templates, self.seed = rows, templates, seed
        self.student_column, self.student_template = student_column, student_template
        self.reference_column, self.id_column = reference_column, id_column
        self._check(source)
        self.skipped: dict[str, int] = {}
        self._kept = self._applicable(source)

    @property
    def template_names(self) -> list[str]:
        """One name per teacher input of an example; 'none' for the bare input."""
        return [template.name for template in self.templates] or ["none"]

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self._kept[index]
        row = self.rows[number]
        student = self._student_input(row)
        teacher = tuple(template.parts(row, seed=self.seed)[0] for template in self.templates)
        name = str(number if self.id_column is None else row[self.id_column])
        return Example(name, student, teacher or (student,), self._references(row))

    def _check(self, source: str) -> None:
        """The columns named by the caller and those the templates read; a target's columns may be absent."""
        named = {
            "student_column": self.student_column,
            "reference_column": self.reference_column,
            "id_column": self.id_column,
        }
        wanted = {role: column for role, column in named.items() if column is not None}
        used = self.templates + ([self.student_template] if self.student_template else [])
        check_columns(self.rows, wanted | template_columns(used, target=False), source)
        if self.student_column is not None:
            check_text_column(self.rows, self.student_column, source)
        if self.reference_column is not None:
            check_text_column(self.rows, self.reference_column, source, lists=True)
        if self.id_column is not None:
            name, count = Counter(map(str, self.rows[self.id_column])).most_common(1)[0]
            if count > 1:
                raise DataError(
                    f"'{source}': id_column '{self.id_column}' has '{name}' {count} times. Ids must be unique."
                )

    def _applicable(self, source: str) -> list[int]:
        """Row numbers under which every template and the student have an input; counts the others."""
        kept = []
        for number, row in enumerate(self.rows):
            without = [t.name for t in self.templates if not t.parts(row, seed=self.seed)[0]]
            if not self._student_input(row).strip():
                without.append(STUDENT)
            for name in without:
                self.skipped[name] = self.skipped.get(name, 0) + 1
            if not without:
                kept.append(number)
        if self.skipped:
            reasons = ", ".join(f"{name}: {count}" for name, count in self.skipped.items())
            if not kept:
                raise DataError(
                    f"'{source}': none of the {len(self.rows)} rows has an input ({reasons}). "
                    "Choose other templates or columns."
                )
            logger.warning(
                "%s: %d of %d rows skipped, no input (%s)", source, len(self.rows) - len(kept), len(self.rows), reasons
            )
        return kept

    def _student_input(self, row: dict[str, Any]) -> str:
        if self.student_template is not None:
            return self.student_template.parts(row, seed=self.seed)[0]
        return row[self.student_column or ""] or ""

    def _references(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = row[self.reference_column] if self.reference_column else None
        texts = value if isinstance(value, list) else [value]
        return tuple(text for text in texts if text)


def supervised_pairs(
    rows: datasets.Dataset, templates: list[Template], *, source: str = "the rows", seed: int = 0
) -> datasets.Dataset:
    """Every row under every template, with its gold target: columns id, student_input (the prompt) and label.

    For training a teacher. Pairs without input or target are left out, counted by reason in the log; so are rows
    without a gold answer (see Template.lacks_label), which would render as "None" or as the last choice.
    Raises DataError for a column the rows lack, or if no pair is left.
    """
    check_template_columns(rows, templates, source, target=True)
    pairs: list[dict[str, str]] = []
    skipped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        for template in templates:
            rendered = template.render(row, seed=seed)
            if rendered.target is not None:
                pairs.append(
                    {"id": f"{number}:{template.name}", "student_input": rendered.input, "label": rendered.target}
                )
            else:
                skipped[rendered.reason or ""] += 1
    total = len(rows) * len(templates)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    if not pairs:
        raise DataError(
            f"'{source}': none of {total} rendered rows has an input and a target ({reasons}). "
            "Choose templates with a target after '|||'."
        )
    if len(pairs) < total:
        logger.warning("%s: %d of %d pairs left out (%s)", source, skipped.total(), total, reasons)
    return datasets.Dataset.from_list(pairs)
