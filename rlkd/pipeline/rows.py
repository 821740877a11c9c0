"""The rows of `rlkd distill`: read and checked once, split by input, and written as files that every stage reads."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..data.examples import Examples
from ..data.row_maps import parse_row_map
from ..data.splits import held_out_inputs, plain
from ..data.text import text_format
from ..errors import ConfigError, DataError, nearest
from ..evaluation.task_metrics import references_of
from ..io.files import write_text
from ..jobs.wiring import Reading, RowSource
from ..models.saving import new_folder
from ..templates.template import Template, load_templates
from .arguments import DistillArguments
from .models import Pair

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

PROMPT_FILE = "prompt.yaml"
PARTS = ("train", "validation", "test")
Inputs = set[tuple[str, ...]]


@dataclass(frozen=True)
class Rows:
    """The examples of each part; an input is in one of them only.

    note              how they were split, in words
    reference_column  of the training and validation rows; None if only the test rows have one
    """

    train: Examples
    validation: Examples
    test: Examples
    note: str
    reference_column: str | None = None

    def counts(self) -> dict[str, int]:
        return {part: len(getattr(self, part)) for part in PARTS}

    def write(self, out: Path, args: DistillArguments) -> None:
        """PART.parquet of every part and, for a prompt on the command line, its template, in the new folder `out`.
        Raises ConfigError if `out` holds something.
        """
        with new_folder(out) as folder:
            for part in PARTS:
                rows: datasets.Dataset = getattr(self, part).kept
                rows.to_parquet(folder / f"{part}.parquet")
            if args.prompt is not None:
                write_text(folder / PROMPT_FILE, prompt_file(args))


def read_rows(args: DistillArguments, pair: Pair) -> Rows:
    """All rows of `data`, under all templates, in three parts. Raises DataError or ConfigError for what cannot be used:
    files, columns, templates, too few inputs.
    """
    templates = templates_of(args)
    _check_prompts(templates, args)
    reading = Reading(
        templates=tuple(templates),
        row_map=parse_row_map(args.column_map, []),
        input_column=args.input_column,
        student_template=_student_template(args),
        reference_column=args.reference_column,
        seed=args.seed,
        tokenizers=(pair.teacher.tokenizer,) if pair.encoder else (pair.teacher.tokenizer, pair.tokenizer),
    )
    choices = choices_of(templates) if pair.encoder else []

    def prepare(rows: datasets.Dataset) -> datasets.Dataset:
        return merged(rows, args.reference_column)

    references = None if _only_test_has_references(args, reading) else args.reference_column
    whole = replace(reading, reference_column=references).examples(source_of(args, args.data), prepare)
    if choices and references is not None:
        _check_references(whole, choices, references)
    if args.test_data is None:
        chosen = _held_out(whole, args, references)
        rest, test = whole.split(chosen, references=True)
        said = f"{len(test)} test rows split off {args.data}"
    else:
        test = reading.examples(source_of(args, args.test_data), prepare)
        if args.reference_column is not None:
            references_of(test)
            if choices:
                _check_references(test, choices, args.reference_column)
        rest, shared = whole.split(set(test.inputs()), references=True)
        said = f"{len(test)} test rows of {args.test_data}"
        if len(shared):
            logger.warning(
                "%d of %d rows of %s have inputs of %s: they are left out of training", len(shared), len(whole),
                args.data, args.test_data,
            )  # fmt: skip
            said += f", whose inputs {len(shared)} other rows had"
    train, validation = rest.split(_held_out(rest, args, references))
    note = f"{len(train)} rows to train on, {len(validation)} validation rows, {said}; equal inputs are in one part"
    return Rows(train, validation, test, note, references)


def _only_test_has_references(args: DistillArguments, reading: Reading) -> bool:
    """Whether `data` has no column for the references that `test_data` brings."""
    if args.test_data is None or args.reference_column is None:
        return False
    _, names = replace(source_of(args, args.data), limit=1).table(())
    return args.reference_column not in reading.row_map.names(names)


def merged(rows: datasets.Dataset, reference_column: str | None) -> datasets.Dataset:
    """Rows that differ in nothing but their reference become one with all of them: files with several right answers to
    an input have a row for each. Others are as they are.
    """
    import datasets

    reference_column = reference_column if reference_column in rows.column_names else None
    names = [name for name in rows.column_names if name != reference_column]
    found: dict[bytes, dict[str, Any]] = {}
    references: dict[bytes, list[str]] = {}
    for row in rows:
        key = sha256(json.dumps([row[name] for name in names], default=str).encode()).digest()
        found.setdefault(key, row)
        if reference_column is not None:
            value = row[reference_column]
            references.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    if len(found) == len(rows):
        return rows
    logger.info(
        "%d of %d rows repeat another one: they count once, with all their references",
        len(rows) - len(found),
        len(rows),
    )
    if reference_column is None:
        return datasets.Dataset.from_list(list(found.values()), features=rows.features)
    kept = [{**row, reference_column: list(dict.fromkeys(filter(None, references[key])))} for key, row in found.items()]
    features = {**rows.features, reference_column: datasets.List(datasets.Value("string"))}
    return datasets.Dataset.from_list(kept, features=datasets.Features(features))


def source_of(args: DistillArguments, name: str) -> RowSource:
    """Where the rows of a file come from."""
    found = text_format(vars(args), beside=args.data, path=name)
    return RowSource(name, limit=args.limit, text_format=found, on_bad_row=args.on_bad_row)


def templates_of(args: DistillArguments) -> list[Template]:
    """What the teacher reads. Raises DataError for templates that cannot be found, or are not valid."""
    if args.prompt is not None:
        return [Template("prompt", args.prompt, args.answer_choices, id="prompt").compile()]
    return [template for spec in args.templates for template in load_templates(spec)]


def prompt_file(args: DistillArguments) -> str:
    """A templates file with the prompt of the command line."""
    fields = {"id": "prompt", "name": "prompt", "jinja": args.prompt, "answer_choices": args.answer_choices}
    return yaml.safe_dump({"templates": {"prompt": {**fields, "metadata": {}}}}, allow_unicode=True, sort_keys=False)


def first_template(args: DistillArguments, folder: Path) -> Path | str:
    """The name of the first template alone. folder: where the prompt's file is."""
    if args.prompt is not None:
        return folder / PROMPT_FILE
    spec = args.templates[0]
    found = load_templates(spec)
    return spec if len(found) == 1 else f"{spec}:{found[0].id or found[0].name}"


def _student_template(args: DistillArguments) -> Template | None:
    if args.student_template is None:
        return None
    found = load_templates(args.student_template)
    if len(found) != 1:
        raise ConfigError(
            f"student_template = {args.student_template!r} names {len(found)} templates: add one's name after a colon"
        )
    return found[0]


def _check_prompts(templates: list[Template], args: DistillArguments) -> None:
    """Raise ConfigError for prompts that are the same for all rows, or show the right answer."""
    for template in templates:
        columns = template.columns(target=False)
        if not columns and not template.draws:
            raise ConfigError(
                f"prompt = {template.source!r}: has no column, so the teacher would read the same for every row. Put "
                f"the input in: {{{{ {args.input_column} }}}}"
            )
        if args.reference_column is not None and args.reference_column in columns:
            raise ConfigError(
                f"{template} shows reference_column '{args.reference_column}', the right answer, to the teacher. Leave "
                "one of the two out."
            )


def choices_of(templates: list[Template]) -> list[str]:
    """The answers that an encoder chooses from. Raises ConfigError unless every template has the same ones for all
    rows, at least two.
    """
    for template in templates:
        choices = template.fixed_choices
        if choices is None or len(set(choices)) < 2:
            raise ConfigError(
                f"{template}: an encoder learns which of at least two answer choices is right, the same for all rows, "
                "and this template has none such. Write them with ||| between (answer_choices)."
            )
        if {*map(plain, choices)} != {*map(plain, templates[0].fixed_choices or ())}:
            raise ConfigError(
                f"{template} has the choices {', '.join(choices)}, and {templates[0]} others: they are the labels of "
                "one encoder. Name templates with the same choices."
            )
    return list(templates[0].fixed_choices or ())


def _check_references(rows: Examples, choices: list[str], column: str) -> None:
    """Raise DataError for a reference that is no answer choice: it could not be a label."""
    known = {*map(plain, choices)}
    for value in rows.column(column):
        texts = value if isinstance(value, list) else [value]
        if wrong := [text for text in texts if text and plain(text) not in known]:
            raise DataError(
                f"{rows.source}: reference_column '{column}' has {wrong[0]!r:.60}, which is not one of the answer "
                f"choices: {', '.join(choices)}.{nearest(wrong[0], choices)} Write the choices into the column."
            )


def _held_out(rows: Examples, args: DistillArguments, references: str | None) -> Inputs:
    """The inputs of one part: a share of those whose rows have references, if any are to have some. Raises DataError if
    there are too few.
    """
    inputs = list(rows.inputs())
    able = set(inputs)
    if references is not None:
        able -= {texts for texts, value in zip(inputs, rows.column(references), strict=True) if not _any(value)}
        if not able:
            raise DataError(
                f"'{args.data}': no row has a text in reference_column '{references}'. Name another one, or "
                "leave it out."
            )
    if len(able) < 2:
        raise DataError(
            f"'{args.data}' has too few different inputs: rows to train on, validation and test rows need one each at "
            "least. Give more rows."
        )
    fraction = min(args.eval_fraction, args.eval_rows / len(able))
    return held_out_inputs(iter(able), fraction, args.data)


def _any(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return any(text and not text.isspace() for text in texts)
