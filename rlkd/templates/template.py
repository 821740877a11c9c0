"""Prompt templates in promptsource's format: they give the same text, on today's Python, from data files alone.

A template is jinja source whose output is split at "|||" into the input and the target. It runs in a sandbox that
limits what it may do (see `rlkd.templates.sandbox`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ..checks import check_choice, check_settings
from ..choices import Truncation
from ..errors import DataError, cut, encodable, listed, nearest, shown
from . import columns as template_columns
from .aliases import known_problem
from .columns import Reads
from .leaks import leaks
from .meter import DEFAULT_LIMITS, Limits, Meter, SandboxError
from .parsing import parse_or_raise
from .rows import PIPE_PROTECTOR, SEPARATOR, RowRandom, own_separator, plain_row, shown_bars
from .sandbox import ENVIRONMENT, SafeTemplate
from .sources import YAML_SUFFIXES, TemplatesFile, find, read_file, sources

logger = logging.getLogger(__name__)

# T0's data were made with every {{...}} cut to 2,048 characters. As in promptsource, this changes the jinja source.
T0_TRUNCATE = " | string | truncate(2048) }}"
NOT_APPLICABLE = "not applicable"
NO_TARGET = "no target"
SEVERAL_TARGETS = "several targets"
LABEL_MISSING = "label missing"


@dataclass(frozen=True)
class Rendered:
    """A row under a template.

    input    what the model reads; empty if the template does not apply to the row
    target   the gold answer, or None
    choices  the answers to choose from, or None for free-form answers
    reason   why there is no input or no target: not applicable, no target, several targets, label missing; else None
    """

    input: str
    target: str | None = None
    choices: tuple[str, ...] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Template:
    """A prompt over the columns of a row.

    name, id           the name that users give, and the unique id
    source             jinja, input and target separated by "|||"
    answer_choices     jinja, whose output is split at "|||"; None without fixed answers
    original_task      True if the prompt asks for the task that the data set was made for
    origin             the file it was read from, or archive!member
    sha256             of that file or archive
    choices_in_prompt, metrics, languages  as given in the file
    truncation         none, or t0: each {{...}} of the source is cut to 2,048 characters, as in T0's training data
    strict_compat      split the text wherever promptsource does: also at a "|||" in a list or an answer choice of the
                       row, or built from its pieces, so that a row can inject its own target
    trusted            render in this process, as for templates that come with rlkd or from promptsource's archive; all
                       others are rendered in a process of their own (see `rlkd.templates.worker`)
    limits             of the sandbox
    """

    name: str
    source: str
    answer_choices: str | None = None
    id: str = ""
    original_task: bool | None = None
    origin: str = ""
    sha256: str = ""
    choices_in_prompt: bool | None = None
    metrics: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    truncation: Truncation = "none"
    strict_compat: bool = False
    trusted: bool = False
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        check_settings(self)

    def parts(self, row: Mapping[str, Any], *, seed: int = 0) -> list[str]:
        """The rendered text, split at "|||", each part stripped: what promptsource's `apply` returns.

        `choice` and `random` draw from a generator seeded with (seed, template id, row), so a row always gives the same
        text. Raises DataError if a filter or an expression fails on this row, SandboxError if it exceeds a limit.
        """
        if "answer_choices" in row:
            raise DataError(
                f"{self}: a column is named 'answer_choices', a name reserved for templates. Rename the column."
            )
        if not self.trusted:
            from .worker import untrusted_parts

            return untrusted_parts(self, row, seed)
        meter, random = Meter(self.limits), RowRandom(seed, self.id or self.name, row)
        separator, protect = SEPARATOR, self.strict_compat or PIPE_PROTECTOR in self.source
        try:
            values = plain_row(row, self.names, self.limits, protect=protect)
            if not self.strict_compat:
                separator = own_separator(values)
            values["answer_choices"] = None
            if self._choices is not None:
                choices = self._choices.render(values, meter, random, separator).split(separator)
                if self.strict_compat:
                    choices = [shown_bars(choice, separator, protect) for choice in choices]
                values["answer_choices"] = [choice.strip() for choice in choices]
            rendered = self._compiled.render(values, meter, random, separator)
        except SandboxError as error:
            raise self._refused(error) from error
        except MemoryError as error:
            raise self._refused(self.limits.exceeded("memory_mb")) from error
        # Expressions run arbitrary operations on the row's values and can raise any exception.
        except Exception as error:
            said = cut(shown_bars(str(error), separator, protect), 300)
            raise DataError(
                f"{self} cannot be rendered: {type(error).__name__}: {encodable(said)}.\n  row: {shown(dict(row))}\n"
                "Check that the row's values have the types the template expects."
            ) from error
        if encodable(rendered) != rendered:
            raise DataError(
                f"{self} prints half a surrogate pair, which is no text.\n  row: {shown(dict(row))}\n"
                "Fix the template or the row."
            )
        return [shown_bars(part, separator, protect).strip() for part in rendered.split(separator)]

    def render(self, row: Mapping[str, Any], *, seed: int = 0) -> Rendered:
        """Input, target and answer choices of a row. Raises DataError as `parts` does.

        The target is None if the template gives none, if it gives more than one part after the input (T0's training
        data excluded these), or if the row has no gold label (see `lacks_label`).
        """
        first, *rest = self.parts(row, seed=seed)
        choices = self.choices(row, seed=seed)
        if not first:
            return Rendered("", None, choices, NOT_APPLICABLE)
        if len(rest) > 1:
            return Rendered(first, None, choices, SEVERAL_TARGETS)
        if not rest or not rest[0]:
            # An unlabeled row often renders to an empty target: the reason is the missing label.
            lacking = bool(rest) and self.lacks_label(row)
            return Rendered(first, None, choices, LABEL_MISSING if lacking else NO_TARGET)
        if self.lacks_label(row):
            return Rendered(first, None, choices, LABEL_MISSING)
        return Rendered(first, rest[0], choices)

    def choices(self, row: Mapping[str, Any], *, seed: int = 0) -> tuple[str, ...] | None:
        """The answers to choose from for a row, or None. Raises DataError as `parts` does."""
        return None if self._choice_template is None else tuple(self._choice_template.parts(row, seed=seed))

    @property
    def fixed_choices(self) -> tuple[str, ...] | None:
        """The answers to choose from if they are written without jinja, the same for every row; else None."""
        if not self.answer_choices or any(mark in self.answer_choices for mark in ("{{", "{%", "{#")):
            return None
        return tuple(choice.strip() for choice in self.answer_choices.split(SEPARATOR))

    def lacks_label(self, row: Mapping[str, Any]) -> bool:
        """Whether a column that only the target reads is absent, None, or -1 where it is an index of the answers.

        Such a row would render as "None" or, since -1 indexes from the end, with the last answer as its target.
        """
        for name in self.gold_columns:
            value = row.get(name)
            counts = self.answer_choices is not None or name in self.reads.index
            if value is None or (counts and isinstance(value, int) and value == -1):
                return True
        return False

    def columns(self, *, target: bool) -> set[str]:
        """The columns that the input reads, with `target` also those of the target; `x is defined` makes x optional."""
        return set(self._with_choices(self.reads.input | (self.reads.target if target else frozenset())))

    @cached_property
    def gold_columns(self) -> frozenset[str]:
        """The columns that the target reads and the input does not."""
        return frozenset(self.columns(target=True) - self.columns(target=False))

    @property
    def names(self) -> frozenset[str]:
        """All names that it may read from a row, in the input, in the target and in its choices."""
        return self._compiled.names | (self._choices.names if self._choices else frozenset())

    @property
    def draws(self) -> bool:
        """Whether it may draw at random, which depends on all columns of a row."""
        return bool(re.search(r"\b(choice|random)\b", f"{self.source} {self.answer_choices}"))

    @property
    def shown_columns(self) -> frozenset[str]:
        """The columns printed in the input; printing the list of answer choices does not count."""
        return self.reads.shown - {"answer_choices"}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the text of a row: id, jinja, answer_choices and the two options."""
        key = [self.id, self.source, self.answer_choices, self.truncation, self.strict_compat]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    @cached_property
    def _choice_template(self) -> Template | None:
        source = self.answer_choices
        return replace(self, source=source, answer_choices=None, truncation="none") if source else None

    @cached_property
    def reads(self) -> Reads:
        """The names that it reads, by place, `answer_choices` included."""
        return self._reads_of(self.source, "jinja")

    @cached_property
    def choice_columns(self) -> frozenset[str]:
        """The columns from which the answer choices are made."""
        if not self.answer_choices:
            return frozenset()
        found = self._reads_of(self.answer_choices, "answer_choices")
        return found.input | found.target

    def _reads_of(self, source: str, field: str) -> Reads:
        try:
            return template_columns.reads(ENVIRONMENT.parse(source))
        except jinja2.TemplateError:
            self._compile(source, field)  # raises a better error
            raise

    def _with_choices(self, names: frozenset[str]) -> frozenset[str]:
        own = self.choice_columns if "answer_choices" in names else frozenset()
        return (names | own) - {"answer_choices"}

    def __str__(self) -> str:
        return f"template '{self.name}'" + (f" of {self.origin}" if self.origin else "")

    @cached_property
    def _compiled(self) -> SafeTemplate:
        cut = self.truncation == "t0"
        return self._compile(self.source.replace("}}", T0_TRUNCATE) if cut else self.source, "jinja")

    @cached_property
    def _choices(self) -> SafeTemplate | None:
        return self._compile(self.answer_choices, "answer_choices") if self.answer_choices else None

    def _compile(self, source: str, field: str) -> SafeTemplate:
        try:
            return SafeTemplate(source, self.limits)
        except SandboxError as error:
            raise self._refused(error, f": its {field}") from error
        except jinja2.TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            said = cut(str(error), 300)
            raise DataError(f"{self}: its {field}{line} is not valid jinja: {said}. Fix the template.") from error

    def _refused(self, error: SandboxError, field: str = "") -> SandboxError:
        """The same error with the template's name at its start, unless it is there already."""
        return error if str(error).startswith(str(self)) else SandboxError(f"{self}{field} {error}")

    def compile(self) -> Template:
        """Compile now instead of at the first row. Raises DataError with the template's name; returns self."""
        _ = self._compiled, self._choices
        return self


def load_templates(
    spec: str,
    *,
    folder: Path | None = None,
    all_templates: bool = False,
    gold_input: bool = False,
    truncation: Truncation = "none",
    strict_compat: bool = False,
) -> list[Template]:
    """Templates named by `spec`, compiled.

    spec           `file.yaml`, `file.yaml:Name`, `dataset[/subset]` or `dataset[/subset]:Name`; a template's id can be
                   given for its name, a hub id (nyu-mll/glue/mrpc) for promptsource's name of a data set (glue/mrpc)
    folder         a folder, YAML file or archive to look data sets up in, instead of the default places
    all_templates  for a data set or file without a name: also templates that are not of the original task
    gold_input     allow templates whose input prints gold columns (see `leaks`); otherwise such a template is refused
                   if it is named, and skipped with a warning if it is one of a data set
    truncation, strict_compat  see Template
    Raises: DataError with the available files or names and the nearest one; ConfigError for an unknown truncation.
    """
    check_choice("truncation", truncation, Truncation)
    file, name = locate(spec, folder)
    templates = _templates(file)
    chosen = [_by_name(templates, name, file)] if name is not None else _whole(templates, spec, all_templates)
    for template in chosen:
        template.compile()
    if not gold_input:
        chosen = _without_leaks(chosen, leaks(templates), named=name is not None)
    for template in chosen:
        if problem := known_problem(template.id):
            logger.warning("%s: %s", template, problem)
    return [replace(t, truncation=truncation, strict_compat=strict_compat).compile() for t in chosen]


def _whole(templates: list[Template], spec: str, all_templates: bool) -> list[Template]:
    """All templates, or those of the original task and those that do not say which task they are of."""
    kept = [t for t in templates if all_templates or t.original_task is not False]
    if not kept:
        raise DataError(
            f"'{spec}': none of its {len(templates)} templates is for the original task. Name one "
            f"({listed([t.name for t in templates])}), or allow all with --all-templates."
        )
    if len(kept) < len(templates):
        logger.info("%s: using %d of %d templates, those of the original task", spec, len(kept), len(templates))
    return kept


def _without_leaks(chosen: list[Template], leaking: dict[str, frozenset[str]], *, named: bool) -> list[Template]:
    kept = [t for t in chosen if t.id not in leaking]
    shows = [f"{t.name}: {listed(sorted(leaking[t.id]))}" for t in chosen if t.id in leaking]
    leaky = "; ".join(shows[:20]) + (f" and {len(shows) - 20} more" if len(shows) > 20 else "")
    if not kept:
        raise DataError(
            f"{chosen[0] if named else chosen[0].origin}: the input shows gold columns ({leaky}), so the model "
            "would read the answer. Choose another template, or allow it with --gold-input."
        )
    if shows:
        logger.warning("%s: skipped templates whose input shows gold columns (%s)", kept[0].origin, leaky)
    return kept


def _by_name(templates: list[Template], name: str, file: TemplatesFile) -> Template:
    """The one template of this name or id; leading and trailing white space, as in some official names, is optional."""
    for match in ((lambda t: name in (t.name, t.id)), (lambda t: name.strip() == t.name.strip())):
        chosen = [template for template in templates if match(template)]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            break
    names = [template.name for template in templates]
    problem = "does not exist" if not chosen else "names several templates: use one of their ids"
    ids = "" if not chosen else f" ({listed([template.id for template in chosen])})"
    raise DataError(
        f"{file.place}: template '{name}' {problem}{ids}. Available: {listed(names)}.{nearest(name, names)}"
    )


def locate(spec: str, folder: Path | None = None) -> tuple[TemplatesFile, str | None]:
    """The file and the template name, if any, of a spec. Raises DataError as `load_templates` does."""
    for suffix in YAML_SUFFIXES:
        stem, found, rest = spec.partition(suffix)
        if found and (not rest or rest.startswith(":")):
            return read_file(Path(stem + suffix).expanduser()), rest[1:] or None
    dataset, _, name = spec.partition(":")
    return find(dataset, sources(folder)), name or None


def _templates(file: TemplatesFile) -> list[Template]:
    parsed = parse_or_raise(file.content, file.place)
    for problem in parsed.problems:
        logger.info("%s:%d: %s", file.place, problem.line, problem.message)
    return [to_template(key, entry, file) for key, entry in parsed.entries.items()]


def to_template(key: str, entry: Mapping[str, Any], file: TemplatesFile) -> Template:
    """A template of checked fields (see `parsing`)."""
    metadata = entry.get("metadata") or {}
    return Template(
        name=entry["name"],
        source=entry["jinja"],
        answer_choices=entry.get("answer_choices"),
        id=key,
        original_task=metadata.get("original_task"),
        origin=file.place,
        sha256=file.sha256,
        trusted=file.trusted,
        choices_in_prompt=metadata.get("choices_in_prompt"),
        metrics=tuple(metadata.get("metrics") or ()),
        languages=tuple(metadata.get("languages") or ()),
    )
