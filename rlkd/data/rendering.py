"""A row as the inputs of teacher and student, and what is wrong with these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checks import check_choice
from ..choices import OnBadRow
from ..errors import ConfigError, DataError
from ..records import Prompt, PromptedRow
from ..templates.missing import missing_columns
from ..templates.template import Template
from .flaws import columns_of
from .rows import not_text
from .values import BadRowError

NO_STUDENT_INPUT = "no student input"
NOT_APPLICABLE = "template does not apply"


@dataclass(frozen=True)
class RowRenderer:
    """Turns a row into the inputs of teacher and student. Fields as in `Examples`.

    with_choices: prompts have the templates' answer choices, for ranking. unknown: gives the pieces of a text that the
    tokenizer does not know; None: they are not looked for. skip_missing, skip_unknown: prompts that print a missing
    value, or have such pieces, are skipped; otherwise they are only noted. on_bad_row: of rows on which a template
    fails. teacher_column: must exist; nothing is rendered of it. pair_column: the second text of a pair, as it is.
    Raises ConfigError if a template has no choices, or if the student's input is not given.
    """

    templates: tuple[Template, ...]
    student_column: str | None = None
    student_template: Template | None = None
    reference_column: str | None = None
    id_column: str | None = None
    seed: int = 0
    with_choices: bool = False
    unknown: Callable[[str], tuple[str, ...]] | None = None
    skip_missing: bool = False
    skip_unknown: bool = False
    on_bad_row: OnBadRow = "fail"
    teacher_column: str | None = None
    pair_column: str | None = None

    def __post_init__(self) -> None:
        check_choice("on_bad_row", self.on_bad_row, OnBadRow)
        without = [str(template) for template in self.templates if not template.answer_choices]
        if self.with_choices and (without or not self.templates):
            raise ConfigError(
                f"strategy = 'rank': {', '.join(without) or 'the raw input'} has no answer choices to rank. "
                "Name templates with answer_choices, or use another strategy."
            )
        if self.student_column is None and self.student_template is None:
            raise ConfigError(
                "student_column and student_template are both unset: the student reads a column, or its own template."
            )

    def __call__(self, number: int, row: dict[str, Any]) -> PromptedRow:
        """The row under every template. Where a template fails, the prompt has status `failed`."""
        name = str(number if self.id_column is None else row[self.id_column])
        own = self._student_prompt(row)
        student = own.text or ""
        if own.status == "ok" and self.templates:
            prompts = tuple(self._prompt(template, row) for template in self.templates)
        else:
            prompts = tuple(own for _ in self.template_names)
        second = None if self.pair_column is None else row[self.pair_column]
        return PromptedRow(number, name, student, self._references(row), prompts, own, second)

    @property
    def template_names(self) -> list[str]:
        """One name per prompt of a row; 'none' without templates."""
        return [template.name for template in self.templates] or ["none"]

    def wanted_columns(self) -> dict[str, str]:
        """Role -> column, of the named columns and those that template inputs read; those of targets may be absent."""
        named = {
            "student_column": self.student_column,
            "reference_column": self.reference_column,
            "id_column": self.id_column,
            "teacher_column": self.teacher_column,
            "pair_column": self.pair_column,
        }
        used = [*self.templates, *([self.student_template] if self.student_template else [])]
        return {role: column for role, column in named.items() if column is not None} | template_columns(
            used, target=False
        )

    def reads(self) -> frozenset[str] | None:
        """All columns that may be read, whether or not they must exist; None: all that there are."""
        used = [*self.templates, *([self.student_template] if self.student_template else [])]
        names = columns_read(used)
        return None if names is None else names | set(self.wanted_columns().values())

    def check(self, where: str, row: dict[str, Any]) -> str | None:
        """The row's id (None: its number). Raises BadRowError if a value is not text, or the id is missing."""
        for column in (self.student_column, self.pair_column):
            value = None if column is None else row.get(column)
            if column is not None and value is not None and type(value) is not str:
                raise not_text(where, column, value, lists=False)
        if self.reference_column is not None:
            value = row.get(self.reference_column)
            texts = value if isinstance(value, list) else [value]
            if not all(text is None or type(text) is str for text in texts):
                raise not_text(where, self.reference_column, value, lists=True)
        if self.id_column is None:
            return None
        if row.get(self.id_column) is None:
            raise BadRowError(f"{where}: id_column '{self.id_column}' has no value. Every row needs a unique id.")
        return str(row[self.id_column])

    def _prompt(self, template: Template, row: dict[str, Any]) -> Prompt:
        choices: tuple[str, ...] | None = None
        try:
            text = template.parts(row, seed=self.seed)[0]
            if self.with_choices and text:
                choices = template.choices(row, seed=self.seed)
        except DataError as error:
            return Prompt(None, "failed", str(error))
        if not text:
            return Prompt(None, "skipped", NOT_APPLICABLE)
        return self._with_flaws(Prompt(text, choices=choices), template, row)

    def _student_prompt(self, row: dict[str, Any]) -> Prompt:
        """The student's input, and what is wrong with it."""
        template = self.student_template
        if template is None:
            text = row[self.student_column or ""] or ""
        else:
            try:
                text = template.parts(row, seed=self.seed)[0]
            except DataError as error:
                return Prompt(None, "failed", str(error))
        if not text or text.isspace():
            return Prompt(None, "skipped", NO_STUDENT_INPUT)
        own = {str(self.student_column): text} if template is None else row
        return self._with_flaws(Prompt(text), template, own)

    def _with_flaws(self, prompt: Prompt, template: Template | None, row: dict[str, Any]) -> Prompt:
        """The prompt with what it lacks noted; without its text if it is skipped for that."""

        def printed(row: Mapping[str, Any]) -> str:
            assert template is not None
            choices = template.choices(row, seed=self.seed) if prompt.choices else None
            return "\n".join([template.parts(row, seed=self.seed)[0], *(choices or ())])

        whole = "\n".join([prompt.text or "", *(prompt.choices or ())])
        missing = () if template is None else missing_columns(template, row, whole, printed)
        unknown = columns_of(template, row, self.unknown(whole)) if self.unknown else ()
        reason = None
        if self.skip_missing and missing:
            reason = f"the prompt prints a missing value: column '{missing[0]}'"
        elif self.skip_unknown and unknown:
            reason = f"the prompt has {unknown[0][1]!r}, which the tokenizer does not know: {unknown[0][0]}"
        prompt = replace(prompt, missing=missing, unknown=unknown)
        return prompt if reason is None else replace(prompt, text=None, status="skipped", error=reason)

    def _references(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = row[self.reference_column] if self.reference_column else None
        texts = value if isinstance(value, list) else [value]
        return tuple(text for text in texts if text and not text.isspace())


def columns_read(templates: Iterable[Template]) -> frozenset[str] | None:
    """All columns that templates may read, whether or not they must exist; None: all that there are."""
    used = list(templates)
    if any(template.draws for template in used):
        return None
    # A column with the name of the template's choices is refused.
    return frozenset({"answer_choices"}).union(*(template.names for template in used))


def template_columns(templates: list[Template], *, target: bool) -> dict[str, str]:
    """Role -> column, of what the inputs (with `target`, also the targets) of templates read."""
    return {f"{name} in {t}": name for t in templates for name in sorted(t.columns(target=target))}
