"""Problems, and probable problems, of a templates file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import DataError, listed, shown
from .aliases import known_problem
from .leaks import leaks
from .missing import missing_columns
from .parsing import Entry, Problem, parse
from .sources import TemplatesFile
from .template import Template, to_template


def lint(
    file: TemplatesFile,
    columns: Iterable[str] | None = None,
    choice_problem: Callable[[tuple[str, ...]], str | None] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> list[Problem]:
    """The problems of a file by line; with `columns`, those of the rows, also missing and unused columns; with `rows`,
    also the missing values that prompts print.

    choice_problem: why a teacher's tokenizer cannot tell answer choices apart, None if it can.
    """
    parsed = parse(file.content)
    problems = list(parsed.problems)
    templates: dict[str, Template] = {}
    for key, entry in parsed.entries.items():
        template = to_template(key, entry, file)
        try:
            template.compile().columns(target=True)
        except DataError as error:
            bad = "answer_choices" if "its answer_choices" in str(error) else "jinja"
            problems.append(Problem(entry.line_of(bad), "error", str(error)))
            continue
        templates[key] = template
        problems += _one(template, entry)
        problems += _printed(template, entry, rows)
        choices = template.fixed_choices
        if choices and "" not in choices and choice_problem and (problem := choice_problem(choices)):
            problems.append(Problem(entry.line_of("answer_choices"), "error", f"'{template.name}': {problem}."))
    problems += _names(templates, parsed.entries)
    for key, printed in leaks(list(templates.values())).items():
        template, entry = templates[key], parsed.entries[key]
        level = "warning" if template.original_task is False else "error"
        names = listed(sorted(printed))
        problems.append(
            Problem(entry.line_of("jinja"), level, f"'{template.name}': the input shows the gold columns {names}.")
        )
    if columns is not None:
        problems += _columns(templates, parsed.entries, columns)
    return sorted(problems, key=lambda problem: problem.line)


def _one(template: Template, entry: Entry) -> Iterator[Problem]:
    name = f"'{template.name}'"
    if "|||" not in template.source:
        yield Problem(entry.line_of("jinja"), "warning", f"{name}: no target: the jinja has no '|||'.")
    if "answer_choices" in template.reads.input | template.reads.target and not template.answer_choices:
        yield Problem(
            entry.line_of("jinja"),
            "error",
            f"{name}: the jinja reads answer_choices, but there are none.",
        )
    if template.name != template.name.strip():
        yield Problem(entry.line_of("name"), "warning", f"{name}: the name starts or ends with white space.")
    if choices := template.fixed_choices:
        if "" in choices:
            yield Problem(entry.line_of("answer_choices"), "error", f"{name}: an answer choice is empty.")
        if twice := [c for c, count in Counter(choices).items() if count > 1]:
            yield Problem(
                entry.line_of("answer_choices"), "warning", f"{name}: the answer choice {shown(twice[0])} occurs twice."
            )
    if any(line != line.rstrip() for line in template.source.strip().splitlines()):
        yield Problem(entry.line_of("jinja"), "note", f"{name}: white space at the end of a line reaches the model.")
    if problem := known_problem(template.id):
        yield Problem(entry.line, "warning", f"{name}: {problem}.")


def _printed(template: Template, entry: Entry, rows: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Columns whose missing values the input prints as words."""

    def render(row: Mapping[str, Any]) -> str:
        return template.parts(row)[0]

    counts: Counter[str] = Counter()
    for row in rows:
        with suppress(DataError):
            counts.update(missing_columns(template, row, render(row), render))
    for name, count in counts.items():
        yield Problem(
            entry.line_of("jinja"),
            "warning",
            f"'{template.name}': the input prints a missing value of {name} as a word such as None in {count} of "
            f"{len(rows)} rows.",
        )


def _names(templates: dict[str, Template], entries: dict[str, Entry]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for key, template in templates.items():
        line = entries[key].line_of("name")
        if template.name in first:
            yield Problem(line, "error", f"'{template.name}': the name is already used in line {first[template.name]}.")
        first.setdefault(template.name, line)


def _columns(templates: dict[str, Template], entries: dict[str, Entry], found: Iterable[str]) -> Iterator[Problem]:
    columns = set(found)
    for key, template in templates.items():
        if missing := template.columns(target=True) - columns:
            names = listed(sorted(missing))
            yield Problem(entries[key].line_of("jinja"), "error", f"'{template.name}': the rows lack {names}.")
    used = {name for template in templates.values() for name in template.columns(target=True)}
    if unused := columns - used:
        yield Problem(1, "note", f"no template reads the columns {listed(sorted(unused))}.")
