"""Templates files in promptsource's YAML format, checked field by field; every problem has a line number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import DataError, cut, listed, shown
from ..io import bounded_yaml

# Field -> its type; all but the first two may be None. `reference` and `task_template` are known but not used.
FIELDS: dict[str, type] = {"name": str, "jinja": str, "answer_choices": str, "metadata": dict, "id": str}
METADATA: dict[str, type] = {"original_task": bool, "choices_in_prompt": bool, "metrics": list, "languages": list}
REQUIRED = ("name", "jinja")
MAX_NAME = 200
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # which a terminal obeys
UNUSED = ("reference", "task_template")


@dataclass(frozen=True)
class Problem:
    """A problem of a file and its line. Only errors prevent the file from being read."""

    line: int
    level: str  # error, warning or note
    message: str


class Entry(dict[str, Any]):
    """One template's fields and the line of each."""

    line = 0
    lines: dict[str, int] = {}  # noqa: RUF012 - set per instance

    def line_of(self, name: str) -> int:
        return self.lines.get(name, self.line)


@dataclass
class Parsed:
    """A templates file: its entries without errors by id, in file order, and all problems."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dataset: str | None = None  # dataset[/subset] as given in the file

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]


class _Loader(bounded_yaml.Loader):
    """YAML within limits; promptsource's two tags become mappings with line numbers."""


def _entry(loader: Any, node: yaml.Node) -> Entry:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, f"{node.tag} must be a mapping", node.start_mark)
    entry = Entry(loader.construct_mapping(node, deep=True))
    entry.line = node.start_mark.line + 1
    entry.lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return entry


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _entry)


def parse(content: bytes) -> Parsed:
    """The entries of a file and its problems. Does not raise: an unreadable file is one problem."""
    parsed = Parsed()

    def error(line: int, message: str) -> Parsed:
        parsed.problems.append(Problem(line, "error", message))
        return parsed

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = content[: bad.start].count(b"\n") + 1
        return error(line, "is not UTF-8. A templates file is UTF-8 YAML: save it as UTF-8.")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        repeated = list(bounded_yaml.repeated_keys(root))
        tree = loader.construct_document(root) if root is not None else None
    except yaml.YAMLError as bad:
        line, _, said = bounded_yaml.problem(bad, text)
        return error(line, f"is not valid YAML: {said}.")
    entries = tree.get("templates") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not isinstance(entries, dict) or not entries:
        return error(1, "has no 'templates' mapping (id: !Template ...). See prompts/README.md for the format.")
    parsed.dataset = _dataset(tree)
    keys = dict(_template_keys(root))
    for name, first in repeated:
        error(
            name.start_mark.line + 1,
            f"key {shown(name.value)} is already used in line {first}. Remove one, or rename it.",
        )
    for key, entry in entries.items():
        if str(key) in parsed.entries:
            error(keys.get(str(key), 1), f"id {shown(str(key))} is also given as a {type(key).__name__}. Rename one.")
        found = list(_check(str(key), entry, keys.get(str(key), 1)))
        parsed.problems += found
        if not any(problem.level == "error" for problem in found):
            parsed.entries[str(key)] = _with_lines(entry, keys.get(str(key), 1))
    return parsed


def parse_or_raise(content: bytes, place: str) -> Parsed:
    """As `parse`. Raises: DataError with file and line of the first error."""
    parsed = parse(content)
    if parsed.errors:
        first = parsed.errors[0]
        more = f" ({len(parsed.errors) - 1} more: rlkd prompts lint)" if len(parsed.errors) > 1 else ""
        joiner = " " if first.message.startswith(("is ", "has ")) else ": "
        raise DataError(f"{place}:{first.line}{joiner}{first.message}{more}")
    return parsed


def _with_lines(entry: dict[str, Any], line: int) -> Entry:
    if isinstance(entry, Entry):
        return entry
    plain = Entry(entry)  # a template without a tag
    plain.line, plain.lines = line, {}
    return plain


def _dataset(tree: dict[str, Any]) -> str | None:
    dataset, subset = tree.get("dataset"), tree.get("subset")
    if not isinstance(dataset, str) or len(dataset) > MAX_NAME or CONTROL.search(dataset):
        return None
    # snli and multi_nli have `subset: None`, which is a string.
    return f"{dataset}/{subset}" if isinstance(subset, str) and subset != "None" else dataset


def _template_keys(root: yaml.MappingNode) -> Iterator[tuple[str, int]]:
    for key, value in root.value:
        if key.value == "templates" and isinstance(value, yaml.MappingNode):
            yield from ((str(k.value), k.start_mark.line + 1) for k, _ in value.value)


def _check(key: str, entry: Any, line: int) -> Iterator[Problem]:
    place = f"template {cut(key)}"
    if not isinstance(entry, dict):
        kind = type(entry).__name__
        yield Problem(line, "error", f"{place}: a template is a mapping with name and jinja, found {kind}.")
        return
    entry = _with_lines(entry, line)
    yield from _fields(entry, FIELDS, place, UNUSED)
    for what, text in (("id", key), ("name", entry.get("name"))):
        if isinstance(text, str) and (len(text) > MAX_NAME or CONTROL.search(text)):
            yield Problem(line, "error", f"{place}: its {what} must be one line of at most {MAX_NAME} characters.")
    metadata = entry.get("metadata")
    if isinstance(metadata, dict):
        yield from _fields(_with_lines(metadata, entry.line_of("metadata")), METADATA, place, ())
    if isinstance(entry.get("id"), str) and entry["id"] != key:
        yield Problem(
            entry.line_of("id"),
            "warning",
            f"{place}: field 'id' is {shown(entry['id'])}; the key is used, not the field.",
        )


def _fields(entry: Entry, types: dict[str, type], place: str, unused: tuple[str, ...]) -> Iterator[Problem]:
    for name, kind in types.items():
        value = entry.get(name)
        if not (isinstance(value, kind) or (value is None and name not in REQUIRED)):
            yield Problem(
                entry.line_of(name),
                "error",
                f"{place}: field '{name}' is {shown(value)}; allowed is {kind.__name__}. Fix the file.",
            )
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            yield Problem(
                entry.line_of(name),
                "error",
                f"{place}: field '{name}' must be a list of strings, found {shown(value)}.",
            )
    if unknown := sorted(str(name) for name in entry if name not in types and name not in unused):
        yield Problem(entry.line_of(unknown[0]), "note", f"{place}: ignored unknown fields {listed(unknown)}")
