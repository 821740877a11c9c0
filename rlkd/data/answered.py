"""Prompts with right answers, to train a model on one's own references and to evaluate it on held-out ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..records import Example, PromptedRow
from ..templates.template import NO_TARGET, Template
from .examples import check_template_columns
from .flaws import FlawCounts
from .rendering import RowRenderer
from .splits import plain

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
NO_REFERENCE = "no reference"
UNKNOWN_ANSWER = "the answer has characters that the tokenizer does not know"


class Answered(list[Any]):
    """Rows in memory that know where they come from: `Example`s, whose student_input is a prompt and whose references
    are its right answers, or pairs {id, student_input, label}.

    inputs     of each row, the raw input that its prompt was made of, up to case and spaces
    all_inputs of all rows of the source, whether or not they have an answer
    """

    def __init__(
        self,
        rows: Iterable[Any],
        inputs: Iterable[tuple[str, ...]],
        source: str,
        templates: tuple[Template, ...],
        all_inputs: Iterable[tuple[str, ...]] = (),
    ):
        super().__init__(rows)
        self._inputs, self.source, self.templates = list(inputs), source, list(templates)
        self.all_inputs = list(all_inputs)

    def inputs(self) -> Iterator[tuple[str, ...]]:
        """The raw input of each row, up to case and spaces: rows of one input belong on the same side of a split."""
        return iter(self._inputs)

    def split(self, held_out: set[tuple[str, ...]]) -> tuple[Answered, Answered]:
        """(Rows of all other inputs, rows of the inputs `held_out`)."""
        return self._where(lambda text: text not in held_out), self._where(lambda text: text in held_out)

    def pairs(self) -> Answered:
        """One pair to learn for each answer of each example."""
        made = [
            ({"id": example.id, "student_input": example.student_input, "label": answer}, text)
            for example, text in zip(self, self._inputs, strict=True)
            for answer in example.references
        ]
        return Answered((pair for pair, _ in made), (text for _, text in made), self.source, tuple(self.templates))

    def _where(self, wanted: Any) -> Answered:
        kept = [(row, text) for row, text in zip(self, self._inputs, strict=True) if wanted(text)]
        return Answered((row for row, _ in kept), (text for _, text in kept), self.source, tuple(self.templates))


def answered(rows: datasets.Dataset, render: RowRenderer, source: str) -> Answered:
    """Every row under every template, as an `Example` with the answers of `reference_column` or, if there is none, with
    what the template has after `|||`; without templates the model reads `student_column`.

    What has no prompt or no answer is left out, and counted by reason in a warning. Raises DataError if a template
    fails on a row (unless on_bad_row is skip), or nothing is left.
    """
    found: list[tuple[Example, tuple[str, ...]]] = []
    skipped: Counter[str] = Counter()
    flaws, unknown, texts = FlawCounts(), 0, []
    for number, row in enumerate(rows):
        prompted = render(number, row)
        flaws.add_rows([prompted], render.template_names)
        if prompted.student_input:
            texts.append(plain(prompted.student_input))
        for k, prompt in enumerate(prompted.prompts):
            if prompt.status == "failed" and render.on_bad_row == "fail":
                raise DataError(str(prompt.error))
            answers, reason = ((), prompt.error) if prompt.text is None else _answers(render, prompted, row, k)
            known = answers if render.unknown is None else tuple(a for a in answers if not render.unknown(a))
            unknown += len(answers) - len(known)
            if render.skip_unknown and answers != known:
                answers, reason = known, UNKNOWN_ANSWER
            if not answers or prompt.text is None:
                skipped[str(reason)] += 1
                continue
            name = f"{prompted.id}:{render.templates[k].name}" if render.templates else prompted.id
            found.append((Example(name, prompt.text, (prompt.text,), answers), plain(prompted.student_input)))
    total = len(rows) * len(render.template_names)
    so = "they are left out" if render.skip_unknown else "the model learns to write them as its unknown token"
    if unknown:
        logger.warning("%s: %d answers have characters that the tokenizer does not know: %s", source, unknown, so)
    _say(source, total, skipped, flaws)
    if not found:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise DataError(
            f"'{source}': none of {total} prompts has an answer to learn ({reasons}). Name a reference_column with "
            "answers, or templates with a target after '|||'."
        )
    return Answered((e for e, _ in found), (text for _, text in found), source, render.templates, texts)


def supervised_pairs(
    rows: datasets.Dataset,
    templates: Sequence[Template],
    *,
    student_column: str,
    source: str = "the rows",
    seed: int = 0,
) -> datasets.Dataset:
    """Every row under every template, with the template's target: columns id, student_input (the prompt) and label.

    For training a teacher. student_column: the raw input; rows without one, and pairs without prompt or target, are
    left out and counted by reason in the log. Raises DataError for a column that the rows lack, or if no pair is left.
    """
    import datasets

    check_template_columns(rows, list(templates), source, target=True)
    render = RowRenderer(tuple(templates), student_column=student_column, seed=seed)
    return datasets.Dataset.from_list(list(answered(rows, render, source).pairs()))


def _answers(render: RowRenderer, prompted: PromptedRow, row: dict[str, Any], k: int) -> tuple[tuple[str, ...], str]:
    """The answers to prompt k of a row, and why there are none."""
    if render.reference_column is not None or not render.templates:
        return prompted.references, NO_REFERENCE
    rendered = render.templates[k].render(row, seed=render.seed)
    return (() if rendered.target is None else (rendered.target,)), rendered.reason or NO_TARGET


def _say(source: str, total: int, skipped: Counter[str], flaws: FlawCounts) -> None:
    """Warn of what prompts lack, and of those that are left out."""
    for line in flaws.lines():
        logger.warning("%s: %s", source, line)
    if skipped.total() and skipped.total() < total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        logger.warning("%s: left out %d of %d prompts (%s)", source, skipped.total(), total, reasons)
