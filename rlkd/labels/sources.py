"""Sources of prompted rows to label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from ..errors import DataError
from ..records import Example, Prompt, PromptedRow


class Source(Protocol):
    """Rows to label.

    total      number of input rows, None if unknown
    templates  (name, id, source) of each prompt of a row
    scan       what a first pass over the rows found, JSON-able
    bad_rows   the rows that it could not use; both are stored with the labels
    """

    @property
    def total(self) -> int | None: ...
    @property
    def templates(self) -> list[tuple[str, str, str]]: ...
    @property
    def scan(self) -> dict[str, Any]: ...
    @property
    def bad_rows(self) -> list[dict[str, Any]]: ...

    def identity(self) -> dict[str, Any]:
        """Everything about the input that decides labels, JSON-able."""
        ...

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[PromptedRow]]]:
        """(k, rows) of every wanted block k of `size` input rows."""
        ...


class ListedExamples:
    """Examples in memory as a source of rows."""

    def __init__(self, examples: Sequence[Example], template_names: list[str]):
        if len(examples) == 0:
            raise DataError("there are no examples to label.")
        self.examples, self.total = examples, len(examples)
        self.templates = [(name, "", "") for name in template_names]
        self.scan: dict[str, Any] = {}
        self.bad_rows: list[dict[str, Any]] = []

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for i in range(len(self.examples)):
            digest.update(json.dumps(asdict(self.examples[i])).encode())
        return {"sha256": digest.hexdigest()}

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[PromptedRow]]]:
        for k in filter(wanted, range(-(-self.total // size))):
            yield k, [self._row(i) for i in range(k * size, min((k + 1) * size, self.total))]

    def _row(self, i: int) -> PromptedRow:
        example = self.examples[i]
        prompts = tuple(Prompt(text) for text in example.teacher_inputs)
        return PromptedRow(i, example.id, example.student_input, example.references, prompts)
