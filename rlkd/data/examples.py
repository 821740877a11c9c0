"""Rows as the two models read them: the teacher under every template, the student without."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, overload

from ..errors import DataError
from ..records import Example, Prompt, PromptedRow
from ..templates.template import Template
from .flaws import STUDENT, FlawCounts
from .rendering import RowRenderer, template_columns
from .row_maps import RowMap
from .rows import RowStream, Scan, check_columns, check_text_column, not_text
from .splits import plain
from .values import BadRowError, check_row

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class PromptedRows:
    """A source under templates, in constant memory: the input of `rlkd generate-pseudolabels`.

    row_map: renaming and relabelling, done first. earlier: the `scan` of an earlier run, which is not repeated if the
    source has not changed.
    Raises: DataError for rows, columns and ids that cannot be used, before anything is rendered.
    """

    def __init__(
        self,
        stream: RowStream,
        render: RowRenderer,
        *,
        row_map: RowMap | None = None,
        earlier: dict[str, Any] | None = None,
    ):
        self.stream, self.render, self.row_map = stream, render, row_map or RowMap()
        self.bad_rows: list[dict[str, Any]] = []
        reads = render.reads()
        self._roles = {
            "columns": render.wanted_columns(),
            "row_map": self.row_map.to_json(),
            "reads": None if reads is None else sorted(reads),
        }
        if earlier and earlier["roles"] == self._roles and earlier["identity"] == stream.identity():
            self.found = Scan(**{name: value for name, value in earlier.items() if name != "roles"})
        else:
            self.found = stream.scan(self._check, self.bad_rows.append)
        names = self.row_map.names(list(self.found.columns))
        source, kinds = stream.source, dict(zip(names, self.found.columns.values(), strict=True))
        check_columns(list(kinds), render.wanted_columns(), source)
        if render.templates and "answer_choices" in kinds:
            raise DataError(
                f"'{source}': a column is named 'answer_choices', a name reserved for templates. Rename the column."
            )
        column = render.student_column
        if column is not None and kinds[column] not in ("str", "null", "string", "large_string"):
            raise not_text(source, column, kinds[column], lists=False)

    @property
    def scan(self) -> dict[str, Any]:
        """The result of the pass over the source, JSON-serialisable."""
        return {**self.found.to_json(), "roles": self._roles}

    @property
    def total(self) -> int | None:
        """Number of input rows, None if unknown."""
        return self.found.rows

    @property
    def templates(self) -> list[tuple[str, str, str]]:
        """(name, id, fingerprint) of each template."""
        return [(t.name, t.id, t.fingerprint) for t in self.render.templates] or [("none", "", "")]

    def identity(self) -> dict[str, Any]:
        """All parts of the input that labels depend on, except the templates."""
        render = self.render
        student = f"{render.student_template.source}" if render.student_template else None
        columns = {"input": render.student_column, "reference": render.reference_column, "id": render.id_column}
        columns |= {} if render.pair_column is None else {"pair": render.pair_column}
        return {
            **self.found.identity,
            "columns": columns,
            "row_map": self.row_map.to_json(),
            "student_template": student,
            "template_seed": render.seed,
            **{name: True for name in ("skip_missing", "skip_unknown") if getattr(render, name)},
            "template_files": sorted({template.sha256 for template in render.templates}),
        }

    def blocks(self, size: int, wanted: Any) -> Iterator[tuple[int, list[PromptedRow]]]:
        """(k, rows) of every wanted block k of `size` input rows."""
        for k, first, rows in self.stream.blocks(self.found, size, wanted):
            yield k, [self._prompted(first + i, row) for i, row in enumerate(rows)]

    def _prompted(self, number: int, row: dict[str, Any]) -> PromptedRow:
        """A row under every template; one of the hub, which no scan has checked, may be bad: it fails under each."""
        try:
            row = self.row_map(check_row(row, f"row {number}"))
            if self.stream.path is None:
                self.render.check(f"row {number}", row)
            return self.render(number, row)
        except DataError as error:
            prompts = tuple(Prompt(None, "failed", str(error)) for _ in self.render.template_names)
            return PromptedRow(number, str(number), "", (), prompts)

    def _check(self, where: str, row: dict[str, Any]) -> str | None:
        try:
            return self.render.check(where, self.row_map(row))
        except BadRowError:
            raise
        except DataError as error:
            raise BadRowError(f"{where}: {error}") from error


class Examples(Sequence[Example]):
    """Rows rendered on access. The teacher reads each input under all templates (as it is if there are none).

    Args: student_column, what the student reads, or student_template instead; reference_column, a text or a list of
    texts, for evaluation only; id_column, unique values (by default the row number); source, the name of the rows in
    errors; seed, of the templates' `choice` filters.
    Rows without student input, or to which some template does not apply, are skipped; `skipped` counts them per
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
        render = RowRenderer(tuple(templates), student_column, student_template, reference_column, id_column, seed)
        self._open(rows, render, source)

    @classmethod
    def of(cls, rows: datasets.Dataset, render: RowRenderer, source: str = "the rows") -> Examples:
        """The rows under a renderer, which may skip some. Raises as the constructor does."""
        self = cls.__new__(cls)
        self._open(rows, render, source)
        return self

    def _open(self, rows: datasets.Dataset, render: RowRenderer, source: str) -> None:
        self.rows, self.templates, self.source = rows, list(render.templates), source
        self.render = render
        check_readable(rows, render, source)
        self._part = False  # whether `split` made it
        self.skipped: dict[str, int] = {}
        self.flaws = FlawCounts()
        self._kept = self._applicable(source)
        for line in self.flaws.lines():
            logger.warning("%s: %s", source, line)

    @property
    def template_names(self) -> list[str]:
        """One name per teacher input of an example; 'none' without templates."""
        return self.render.template_names

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the templates and of all columns that are read."""
        render = self.render
        student = render.student_template.fingerprint if render.student_template else None
        read = [t.fingerprint for t in self.templates], student, render.student_column, render.id_column, render.seed
        digest = sha256(json.dumps(read).encode())
        columns = sorted(set(render.wanted_columns().values()))
        rows = self.rows.select(self._kept) if self._part else self.rows
        if self._part:
            digest.update(json.dumps(self._kept).encode())
        for batch in rows.select_columns(columns).iter(1000):
            digest.update(json.dumps([batch[name] for name in columns], default=str).encode())
        return digest.hexdigest()[:16]

    @property
    def kept(self) -> datasets.Dataset:
        """The row of each example."""
        return self.rows.select(self._kept)

    def column(self, name: str) -> list[Any]:
        """The values of a column, one per example."""
        return list(self.kept[name])

    def inputs(self) -> Iterator[tuple[str, ...]]:
        """What the student reads of each row, up to case and spaces."""
        rows = self.kept
        if self.render.student_template is None:
            yield from (plain(text) for text in rows[self.render.student_column])
        else:
            yield from (plain(self.render.student_template.parts(row, seed=self.render.seed)[0]) for row in rows)

    def split(self, held_out: set[tuple[str, ...]], *, references: bool = False) -> tuple[Examples, Examples]:
        """(The rows of all other inputs, with their references or without; those of the inputs `held_out`); ids are
        kept.
        """
        mine = [texts in held_out for texts in self.inputs()]
        parts = []
        for wanted in (False, True):
            part = copy.copy(self)
            part._kept, part._part = [n for n, out in zip(self._kept, mine, strict=True) if out is wanted], True
            part.__dict__.pop("fingerprint", None)
            parts.append(part)
        if not references:
            parts[0].render = replace(self.render, reference_column=None)
        return parts[0], parts[1]

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
        row = self.render(number, self.rows[number])
        texts = tuple(prompt.text for prompt in row.prompts if prompt.text is not None)
        return Example(row.id, row.student_input, texts, row.references)

    def _applicable(self, source: str) -> list[int]:
        """Numbers of the rows for which every template and the student have an input; the others are counted."""
        kept = []
        for number, row in enumerate(self.rows):
            prompted = self.render(number, row)
            self.flaws.add_rows([prompted], self.template_names)
            failed = [prompt.error for prompt in prompted.prompts if prompt.status == "failed"]
            if failed and self.render.on_bad_row == "fail":
                raise DataError(str(failed[0]))
            without = [
                STUDENT if prompt is prompted.student else name
                for name, prompt in zip(self.template_names, prompted.prompts, strict=True)
                if prompt.text is None
            ]
            for name in dict.fromkeys(without):
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
                "%s: skipped %d of %d rows without input (%s)",
                source,
                len(self.rows) - len(kept),
                len(self.rows),
                reasons,
            )
        return kept


def check_readable(rows: datasets.Dataset, render: RowRenderer, source: str) -> None:
    """Raise DataError unless the named columns and those of the templates exist, and ids are unique."""
    check_columns(rows, render.wanted_columns(), source)
    if render.student_column is not None:
        check_text_column(rows, render.student_column, source)
    if render.reference_column is not None:
        check_text_column(rows, render.reference_column, source, lists=True)
    if render.id_column is not None:
        name, count = Counter(map(str, rows[render.id_column])).most_common(1)[0]
        if count > 1:
            raise DataError(
                f"'{source}': id_column '{render.id_column}' contains '{name}' {count} times. Ids must be unique."
            )


def check_template_columns(
    rows: datasets.Dataset | list[str], templates: list[Template], source: str, *, target: bool
) -> None:
    """Raise DataError unless the rows have every column that the inputs (with `target`, also the targets) read."""
    check_columns(rows, template_columns(templates, target=target), source)
