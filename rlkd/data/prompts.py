"""Prompt templates in promptsource's format: the same text, on today's Python, from data files alone.

A template is jinja source whose output is split on "|||" into the input and the target. It runs in a sandbox that
bounds what it may do (see `rlkd.data.sandbox`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import meta, nodes

from ..errors import DataError, nearest
from .meter import DEFAULT_LIMITS, Limits, Meter, SandboxError
from .sandbox import ENVIRONMENT, PIPE_PROTECTOR, SEPARATOR, RowRandom, SafeTemplate, plain_row

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "templates.yaml"
# Beside the package in a checkout, inside it once installed (see pyproject.toml).
PACKAGE_PROMPTS = next(
    (p for p in (Path(__file__).resolve().parents[i] / "prompts" for i in (2, 1)) if p.is_dir()),
    Path("prompts").resolve(),
)


@dataclass(frozen=True)
class Template:
    """One prompt over the columns of a row.

    name, id        what users call it, and its unique id
    source          jinja, input and target separated by "|||"
    answer_choices  jinja, its output split on "|||"; None without fixed answers
    original_task   True if the prompt asks for the task the data set was made for
    origin          the file it was read from, for errors
    trusted         False if strangers wrote it: it is rendered in another process (see `rlkd.data.worker`)
    limits          what it may cost
    strict_compat   hide "|||" only in the texts in which promptsource does
    """

    name: str
    source: str
    answer_choices: str | None = None
    id: str = ""
    original_task: bool | None = None
    origin: str = ""
    trusted: bool = True
    limits: Limits = DEFAULT_LIMITS
    strict_compat: bool = False

    def parts(self, row: Mapping[str, Any], *, seed: int = 0) -> list[str]:
        """The rendered text split on "|||", each part stripped: what promptsource's `apply(truncate=False)` returns.

        `choice` and `random` draw from a generator seeded by (seed, template id, row), so a row always renders alike.
        Raises DataError if a filter or an expression fails on this row, SandboxError if it exceeds a limit.
        """
        if "answer_choices" in row:
            raise DataError(
                f"{self}: a column is named 'answer_choices', the name of the template's own. Rename the column."
            )
        if not self.trusted:
            from .worker import untrusted_parts

            return untrusted_parts(self, row, seed)
        meter, random = Meter(self.limits), RowRandom(seed, self.id or self.name, row)
        try:
            names = self._compiled.names | (self._choices.names if self._choices else frozenset())
            values = plain_row(row, names, self.limits, strict_compat=self.strict_compat)
            values["answer_choices"] = None
            if self._choices is not None:
                choices = self._choices.render(values, meter, random).split(SEPARATOR)
                values["answer_choices"] = [choice.strip() for choice in choices]
            rendered = self._compiled.render(values, meter, random)
        except SandboxError as error:
            raise self._refused(error) from error
        except MemoryError as error:
            raise self._refused(self.limits.exceeded("memory_mb")) from error
        # Expressions run arbitrary operations on the row's values, so any exception can come out of them.
        except Exception as error:
            raise DataError(
                f"{self} cannot be rendered: {type(error).__name__}: {error}.\n  row: {str(dict(row))[:300]}\n"
                "Check that the row's values have the types the template expects."
            ) from error
        return [part.replace(PIPE_PROTECTOR, SEPARATOR).strip() for part in rendered.split(SEPARATOR)]

    def render(self, row: Mapping[str, Any], *, seed: int = 0) -> tuple[str, str | None] | None:
        """(input, target) of a row; None if the template does not apply to it (its input is empty).

        The target is None if the template gives none or, as T0's training had it, if there are more than two parts.
        """
        first, *rest = self.parts(row, seed=seed)
        return (first, rest[0] or None if len(rest) == 1 else None) if first else None

    def columns(self, *, target: bool) -> set[str]:
        """The columns the input reads, with `target` also those of the target; `x is defined` makes x optional."""
        names = _columns(self.source, whole=target)
        if "answer_choices" in names and self.answer_choices:
            names |= _columns(self.answer_choices, whole=True)
        return names - {"answer_choices"}

    def __str__(self) -> str:
        return f"template '{self.name}'" + (f" of {self.origin}" if self.origin else "")

    @cached_property
    def _compiled(self) -> SafeTemplate:
        return self._compile(self.source, "jinja")

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
            raise DataError(f"{self}: its {field}{line} is not valid jinja: {error}. Mend the template.") from error

    def _refused(self, error: SandboxError, field: str = "") -> SandboxError:
        """The same error, naming the template; once."""
        return error if str(error).startswith(str(self)) else SandboxError(f"{self}{field} {error}")

    def compile(self) -> Template:
        """Compile now rather than at the first row. Raises DataError naming the template; returns itself."""
        _ = self._compiled, self._choices
        return self


def _columns(source: str, *, whole: bool) -> set[str]:
    """Names read before the first "|||" (or anywhere, if `whole`) that only a row can supply."""
    tree = ENVIRONMENT.parse(source)
    read: set[str] = set()
    for node in _in_order(tree):
        if isinstance(node, nodes.TemplateData) and SEPARATOR in node.data and not whole:
            break
        if isinstance(node, nodes.Name) and node.ctx == "load":
            read.add(node.name)
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    tested = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return (read & meta.find_undeclared_variables(tree)) - assigned - tested


def _in_order(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _in_order(child)


class _Loader(yaml.SafeLoader):
    """YAML without Python objects; promptsource's two tags become plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))  # type: ignore[arg-type]


def load_templates(spec: str, *, folder: Path | None = None) -> list[Template]:
    """Templates named by `spec`, compiled.

    spec    `file.yaml`, `file.yaml:Name`, `dataset[/subset]` or `dataset[/subset]:Name`; an id serves as a name
    folder  where data sets are looked up, as `<dataset>[/<subset>]/templates.yaml`; by default ./prompts, then the
            prompts shipped beside the package
    Raises: DataError listing the files or names there are and the nearest one.
    """
    file, name = _locate(spec, template_folders(folder))
    templates = read_templates(file)
    if name is not None:
        chosen = [template for template in templates if name in (template.name, template.id)]
        if len(chosen) != 1:
            names = [template.name for template in templates]
            problem = "is not there" if not chosen else "names several templates: use one of their ids"
            ids = "" if not chosen else f" ({', '.join(template.id for template in chosen)})"
            raise DataError(
                f"{file}: template '{name}' {problem}{ids}. Available: {', '.join(names)}.{nearest(name, names)}"
            )
        templates = chosen
    return [template.compile() for template in templates]


def template_folders(folder: Path | None = None) -> list[Path]:
    """The folders templates are looked up in, first one first."""
    if folder is not None:
        return [folder]
    local = Path("prompts")
    return [local] if local.resolve() == PACKAGE_PROMPTS else [local, PACKAGE_PROMPTS]


def list_datasets(folders: list[Path]) -> dict[str, Path]:
    """`dataset` or `dataset/subset` -> its file; a name found in several folders belongs to the first."""
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.rglob(TEMPLATE_FILE)):
            found.setdefault(file.parent.relative_to(folder).as_posix(), file)
    return found


def _locate(spec: str, folders: list[Path]) -> tuple[Path, str | None]:
    """The file and the template name of a spec."""
    for suffix in (".yaml", ".yml"):
        stem, found, rest = spec.partition(suffix)
        if found and (not rest or rest.startswith(":")):
            return Path(stem + suffix).expanduser(), rest[1:] or None
    dataset, _, name = spec.partition(":")
    known = list_datasets(folders)
    if dataset not in known:
        raise DataError(
            f"no templates for '{dataset}' in {' or '.join(str(f) for f in folders)}. Available: "
            f"{', '.join(known) or 'none'}.{nearest(dataset, list(known))} "
            f"A file is named by its path: path/to/{TEMPLATE_FILE}[:Template name]."
        )
    return known[dataset], name or None


def read_templates(file: Path) -> list[Template]:
    """All templates of a promptsource YAML file, in file order. Raises DataError naming the file and the field."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}. A templates file is UTF-8 YAML."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise DataError(f"{place} is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{file} has no 'templates' mapping (id: !Template ...). See prompts/README.md for the format.")
    return [_template(entry, str(key), file) for key, entry in entries.items()]


def _template(entry: Any, key: str, file: Path) -> Template:
    place = f"{file}, template {key}"
    if not isinstance(entry, dict):
        raise DataError(f"{place}: a template is a mapping with name and jinja, found {type(entry).__name__}.")
    metadata = entry.get("metadata") or {}
    fields = {"name": (entry.get("name"), str), "jinja": (entry.get("jinja"), str)}
    optional = {
        "answer_choices": (entry.get("answer_choices"), str),
        "metadata": (metadata, dict),
        "original_task": (metadata.get("original_task") if isinstance(metadata, dict) else None, bool),
    }
    for field, (value, kind) in (fields | optional).items():
        if not (isinstance(value, kind) or (field in optional and value is None)):
            raise DataError(f"{place}: field '{field}' is {value!r}; allowed is {kind.__name__}. Mend the file.")
    known = {"name", "jinja", "answer_choices", "metadata", "id", "reference"}
    if unknown := sorted(map(str, set(entry) - known)):
        logger.info("%s: ignored unknown fields %s", place, ", ".join(unknown))
    return Template(
        name=entry["name"],
        source=entry["jinja"],
        answer_choices=entry.get("answer_choices"),
        id=key,
        original_task=metadata.get("original_task"),
        origin=str(file),
    )
