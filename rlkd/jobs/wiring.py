"""From plain settings of a recipe or a command to rows as both models read them, and the teacher.

Settings that recipes and commands share have the same names, so one function reads either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_choice
from ..choices import OnBadRow
from ..data.answered import Answered, answered
from ..data.examples import Examples, PromptedRows, RowRenderer, check_readable
from ..data.rendering import template_columns
from ..data.row_maps import RowMap, parse_row_map
from ..data.rows import RowStream, check_columns, load_table
from ..data.text import PLAIN, TextFormat, text_format
from ..errors import ConfigError
from ..models.spec import ModelSpec, TeacherSpec, default_device
from ..models.vocabulary import same_vocabulary, unknown_to
from ..templates.template import Template, load_templates

if TYPE_CHECKING:
    import datasets

    from ..models.signals import LocalSource


@dataclass(frozen=True)
class RowSource:
    """Where rows come from; fields as in `load_rows`. Raises ConfigError for another on_bad_row."""

    dataset: str
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    text_format: TextFormat = PLAIN
    on_bad_row: OnBadRow = "fail"

    def __post_init__(self) -> None:
        check_choice("on_bad_row", self.on_bad_row, OnBadRow)

    def table(self, only: Collection[str] | None = None) -> tuple[datasets.Dataset, list[str]]:
        """All rows in memory, with the columns `only`, and the names of all columns. Raises as `load_rows` does."""
        return load_table(
            self.dataset,
            {"split": self.split, "subset": self.subset},
            limit=self.limit,
            text_format=self.text_format,
            only=only,
            on_bad_row=self.on_bad_row,
        )

    def stream(self, only: Collection[str] | None = None) -> RowStream:
        """The rows in flat memory. Raises as `RowStream` does."""
        return RowStream(
            self.dataset,
            split=self.split,
            subset=self.subset,
            limit=self.limit,
            text_format=self.text_format,
            only=only,
            on_bad_row=self.on_bad_row,
        )


@dataclass(frozen=True)
class Reading:
    """How a row is read: changed by `row_map`, then given to the teacher under each template and to the student as a
    column or under a template of its own. Fields as in `RowRenderer`.
    """

    templates: tuple[Template, ...]
    row_map: RowMap
    input_column: str
    student_template: Template | None = None
    reference_column: str | None = None
    id_column: str | None = None
    seed: int = 0
    skip_missing: bool = False
    skip_unknown: bool = False
    tokenizers: tuple[Any, ...] = ()
    teacher_column: str | None = None
    pair_column: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], tokenizer: Any = None) -> Reading:
        """The templates, maps and columns that settings name. Raises DataError or ConfigError; no rows are read.

        tokenizer: of the models, to find characters that it does not know; None: they are not looked for.
        """
        row_map = parse_row_map(settings["column_map"] or [], settings["label_map"] or [])
        templates = [template for spec in settings["templates"] or [] for template in _templates(spec, settings)]
        return cls(
            templates=tuple(templates),
            row_map=row_map,
            input_column=settings["input_column"],
            student_template=_student_template(settings),
            reference_column=settings["reference_column"],
            id_column=settings.get("id_column"),
            seed=settings.get("seed", 0),
            skip_missing=bool(settings.get("skip_missing")),
            skip_unknown=bool(settings.get("skip_unknown")),
            tokenizers=() if tokenizer is None else (tokenizer,),
            pair_column=settings.get("pair_column"),
        )

    def examples(
        self, source: RowSource, prepare: Callable[[datasets.Dataset], datasets.Dataset] | None = None
    ) -> Examples:
        """All rows that every template applies to, in memory; prepare changes them first. Raises DataError for columns,
        rows or ids that do not fit.
        """
        render = self.renderer(on_bad_row=source.on_bad_row)
        rows = self._rows(source, render)
        return Examples.of(rows if prepare is None else prepare(rows), render, source.dataset)

    def answered(self, source: RowSource) -> Answered:
        """All rows that have an answer, under every template that applies to them. Raises DataError as `examples`, and
        for a column that targets read and the rows lack.
        """
        render = self.renderer(on_bad_row=source.on_bad_row)
        rows = self._rows(source, render, targets=self.reference_column is None)
        check_readable(rows, render, source.dataset)
        return answered(rows, render, source.dataset)

    def _rows(self, source: RowSource, render: RowRenderer, *, targets: bool = False) -> datasets.Dataset:
        """The rows with the columns that are read. Raises DataError if some of them do not exist; with `targets`, also
        of those that the templates' targets read.
        """
        rows, names = source.table(self.row_map.reads(render.reads()))
        wanted = render.wanted_columns()
        wanted = {"input_column": wanted.pop("student_column")} | wanted
        wanted |= template_columns(list(self.templates), target=True) if targets else {}
        check_columns(self.row_map.names(names), wanted, source.dataset)
        return self.row_map.dataset(rows)

    def prompted_rows(
        self, source: RowSource, *, with_choices: bool = False, earlier: dict[str, Any] | None = None
    ) -> PromptedRows:
        """All rows in flat memory, whatever their templates give. Raises as `PromptedRows` and `RowRenderer` do.

        with_choices: prompts carry answer choices, to be ranked; earlier: the scan of an earlier run.
        """
        render = self.renderer(with_choices=with_choices)
        stream = source.stream(self.row_map.reads(render.reads()))
        return PromptedRows(stream, render, row_map=self.row_map, earlier=earlier)

    def renderer(self, **options: Any) -> RowRenderer:
        """What turns a row into the models' inputs. Raises ConfigError as RowRenderer does."""
        return RowRenderer(
            self.templates,
            student_column=self.input_column,
            student_template=self.student_template,
            reference_column=self.reference_column,
            id_column=self.id_column,
            seed=self.seed,
            unknown=unknown_to(*self.tokenizers) if self.tokenizers else None,
            skip_missing=self.skip_missing,
            skip_unknown=self.skip_unknown,
            teacher_column=self.teacher_column,
            pair_column=self.pair_column,
            **options,
        )


def row_source(settings: Mapping[str, Any]) -> RowSource:
    """The rows that a command's settings name."""
    return RowSource(
        settings["dataset"],
        settings["split"],
        settings["subset"],
        settings["limit"],
        text_format(settings),
        settings.get("on_bad_row", "fail"),
    )


def teacher_spec(settings: Mapping[str, Any]) -> TeacherSpec:
    """The teacher that a command's settings name, its configuration, tokenizer and positions checked. Raises ModelError
    or ConfigError; no weights are loaded.
    """
    from ..models.loading import quantization_config

    model = ModelSpec(
        settings["teacher"],
        "teacher",
        dtype=settings["teacher_dtype"],
        quantization=quantization_config(settings.get("teacher_quantization", "none")),
        device=default_device(),
        allow_bin=bool(settings.get("allow_bin")),
        served=settings.get("engine") == "openai",
        src_lang=settings.get("src_lang"),
        tgt_lang=settings.get("tgt_lang"),
        chat=settings.get("teacher_chat"),
        system_prompt=settings.get("teacher_system_prompt"),
    )
    model.check()
    ranked = settings.get("strategy") == "rank"
    model.check_lengths(settings["max_input_tokens"], None if ranked else settings.get("max_new_tokens"))
    teacher = TeacherSpec(model, settings["max_input_tokens"], settings["input_eos"])
    _ = teacher.append_eos  # said before weights load
    return teacher


def local_teacher(spec: TeacherSpec, student: ModelSpec, **options: Any) -> LocalSource:
    """The teacher with its weights, as the student sees it; options, further fields of `Teacher`. Raises as
    `TeacherSpec.load` does.
    """
    from ..models.other_tokenizer import OtherTokenizer

    teacher = spec.load(**options)
    shared = same_vocabulary(spec.tokenizer, student.tokenizer)
    return teacher if shared else OtherTokenizer(teacher, student.tokenizer, student.rules)


def _templates(spec: str, settings: Mapping[str, Any]) -> list[Template]:
    folder = Path(settings["templates_dir"]) if settings["templates_dir"] else None
    options = {name: settings[name] for name in ("all_templates", "gold_input", "truncation", "strict_compat")}
    return load_templates(spec, folder=folder, **options)


def _student_template(settings: Mapping[str, Any]) -> Template | None:
    spec = settings.get("student_template")
    if spec is None:
        return None
    found = _templates(spec, settings)
    if len(found) != 1:
        raise ConfigError(f"student_template = {spec!r} names {len(found)} templates: add one's name after a colon")
    return found[0]
