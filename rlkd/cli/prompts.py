"""`rlkd prompts`: find, download and inspect prompt templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import Truncation
from ..errors import DataError

if TYPE_CHECKING:
    from ..data.rows import RowStream, Scan
    from ..data.text import TextFormat
    from ..templates.template import Rendered, Template

app = typer.Typer(
    help="List, show, render, check and download prompt templates.", no_args_is_help=True, rich_markup_mode=None
)

SPEC = "dataset[/subset][:name] or file.yaml[:name]; a template id or a hub id also works"
TEMPLATES_DIR = (
    "Folder, YAML file or archive (.tar.gz, .zip) of templates. Default: ./prompts, those shipped with rlkd, an "
    "installed promptsource, the archive of `rlkd prompts download`."
)
TemplatesDir = Annotated[Path | None, typer.Option("--templates-dir", "--templates", help=TEMPLATES_DIR)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
AllTemplates = Annotated[
    bool,
    typer.Option(
        "--all-templates", help="Without a template name: include templates for tasks other than the original one."
    ),
]
GoldInput = Annotated[bool, typer.Option("--gold-input", help="Allow templates whose input contains gold columns.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")]
Subset = Annotated[str | None, typer.Option(help="Subset of a hub data set.")]
IdColumn = Annotated[str | None, typer.Option(help="Column with unique ids. Default: the row number.")]
InputEos = Annotated[
    bool | None,
    typer.Option(
        "--input-eos/--no-input-eos",
        help="End prompts with end-of-sequence. T0: --no-input-eos. Default: yes for encoder-decoders.",
    ),
]
TeacherChat = Annotated[
    bool | None,
    typer.Option(
        "--teacher-chat/--no-teacher-chat",
        help="Whether prompts stand in the teacher's chat template. Default: only if rlkd trained it so.",
    ),
]
TeacherSystem = Annotated[str | None, typer.Option("--teacher-system-prompt", help="Text of the system turn before.")]
StudentChat = Annotated[
    bool | None,
    typer.Option("--student-chat/--no-student-chat", help="Likewise, for the student's prompts."),
]
StudentSystem = Annotated[str | None, typer.Option("--student-system-prompt", help="Likewise, for the student's.")]
SourceLanguage = Annotated[
    str | None, typer.Option(help="Language of prompts, as the tokenizer of a translation model writes it: en_XX.")
]
TargetLanguage = Annotated[str | None, typer.Option(help="Language of answers, likewise (mBART, M2M100, NLLB).")]


Truncate = Annotated[
    Truncation, typer.Option("--truncate", help="t0 cuts each {{...}} at 2,048 characters, as in T0's training data.")
]
StrictCompat = Annotated[
    bool, typer.Option("--strict-compat", help="Let '|||' of a row split the text where promptsource does.")
]
ColumnMap = Annotated[
    list[str] | None, typer.Option("--column-map", help="Rename columns: old=new[,...] or JSON; repeatable.")
]
LabelMap = Annotated[
    list[str] | None, typer.Option("--label-map", help="Change labels: [column:]old=new[,...] or JSON; repeatable.")
]

LINTED_ROWS = 1000
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="Delimiter of a .csv or .tsv file: one character, or tab, semicolon, ... Default: found in the file."
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(help="Encoding of a text file, e.g. cp1252. Default: UTF-8, or what its byte order mark says."),
]
Columns = Annotated[
    str | None, typer.Option(help="Names of the columns of a .csv or .tsv file without a header: a,b,c.")
]
DATASET = (
    "A .jsonl, .json, .csv, .tsv, .parquet or .arrow file (text also as .gz, .bz2, .xz, .zst), a pattern in quotes "
    "('data/*.jsonl'), a folder of them or saved by datasets, or a hub id."
)
ROWS = ("--dataset", "--data")  # the names that recipes and `rlkd distill` have for it
Dataset = Annotated[str, typer.Option(*ROWS, help=DATASET)]


@app.command("list")
def list_(
    spec: Annotated[str | None, typer.Argument(help=f"{SPEC}. Default: list the data sets.")] = None,
    templates_dir: TemplatesDir = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets that have templates, or the templates of one data set or file."""
    from ..templates.sources import sources
    from ..templates.template import load_templates

    if spec is None:
        rows = [
            {"dataset": dataset, "templates": count, "source": str(source.path)}
            for source in sources(templates_dir)
            for dataset, count in source.counts().items()
        ]
        # If several sources have a name, the first one counts.
        rows = list({str(row["dataset"]): row for row in reversed(rows)}.values())[::-1]
        _table(rows, as_json)
        return
    chosen = load_templates(spec, folder=templates_dir, all_templates=True, gold_input=True)
    _table([_listed(template) for template in chosen], as_json)


@app.command()
def show(
    spec: Annotated[str, typer.Argument(help=SPEC)], templates_dir: TemplatesDir = None, as_json: AsJson = False
) -> None:
    """Show the source of templates, the columns they read and their origin."""
    from ..templates.template import load_templates

    chosen = load_templates(spec, folder=templates_dir, all_templates=True, gold_input=True)
    if as_json:
        typer.echo(
            json.dumps([asdict(t) | _columns(t) | {"fingerprint": t.fingerprint} for t in chosen], ensure_ascii=False)
        )
        return
    for template in chosen:
        _echo(f"# {template.name} ({template.id})")
        _echo(f"columns: {', '.join(_columns(template)['columns'])}")
        facts = _listed(template)
        for name in ("task", "choices in prompt", "metrics", "languages"):
            if facts[name]:
                _echo(f"{name}: {facts[name]}")
        if template.answer_choices:
            _echo(f"answer_choices: {template.answer_choices}")
        _echo(f"origin: {template.origin} (sha256 {template.sha256[:12]})")
        _echo(f"{template.source}\n")


@app.command()
def render(
    spec: Annotated[str, typer.Argument(help=SPEC)],
    dataset: Annotated[str, typer.Option(*ROWS, help=f"Rows to render. {DATASET}")],
    subset: Subset = None,
    split: Split = "train",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    columns: Columns = None,
    row: Annotated[int | None, typer.Option(help="Render only this row, counted from 0.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="Number of rows.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of templates with random choices.")] = 0,
    truncation: Truncate = "none",
    strict_compat: StrictCompat = False,
    column_map: ColumnMap = None,
    label_map: LabelMap = None,
    all_templates: AllTemplates = False,
    gold_input: GoldInput = False,
    templates_dir: TemplatesDir = None,
    as_json: AsJson = False,
) -> None:
    """Render rows of a data set with templates: input, target and answer choices."""
    from ..data.examples import check_template_columns
    from ..data.rendering import columns_read
    from ..data.row_maps import parse_row_map
    from ..templates.template import load_templates

    row_map = parse_row_map(column_map or [], label_map or [])
    templates = load_templates(
        spec,
        folder=templates_dir,
        all_templates=all_templates,
        gold_input=gold_input,
        truncation=truncation,
        strict_compat=strict_compat,
    )
    first, count = (0, limit) if row is None else (row, 1)
    text_format = _format(delimiter, encoding, columns)
    only = row_map.reads(columns_read(templates))
    stream = _stream(dataset, split=split, subset=subset, text_format=text_format, only=only)
    # A local file is read in full because a column has one type: 1 becomes 1.0 if 2.5 follows further down.
    scan = stream.scan()
    check_template_columns(row_map.names(list(scan.columns)), templates, dataset, target=False)
    numbered = [(n, row_map(r)) for n, r in _rows(stream, scan, first, count)]
    rendered = [(n, t, t.render(r, seed=seed)) for n, r in numbered for t in templates]
    if as_json:
        records = [{"row": n, "template": t.name, "id": t.id} | asdict(result) for n, t, result in rendered]
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    for number, template, result in rendered:
        _echo(f"# row {number}, {template.name}\n{_text(result)}\n")


@app.command()
def lint(
    spec: Annotated[str, typer.Argument(help="dataset[/subset] or file.yaml")],
    dataset: Annotated[str | None, typer.Option(help="Data set whose columns the templates must fit.")] = None,
    subset: Subset = None,
    split: Split = "train",
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    columns: Columns = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model (folder or hub id) whose tokenizer must tell the answer choices apart.")
    ] = None,
    templates_dir: TemplatesDir = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing; only set the exit code.")] = False,
) -> None:
    """List all problems of a template file with their lines; exit code 3 if any is an error."""
    from ..templates.lint import lint as check
    from ..templates.template import locate

    file, _ = locate(spec, templates_dir)
    found, rows = None, []
    if dataset is not None:
        stream = _stream(dataset, split=split, subset=subset, text_format=_format(delimiter, encoding, columns))
        scan = stream.scan()
        found = list(scan.columns)
        rows = next((rows for _, _, rows in stream.blocks(scan, LINTED_ROWS, lambda k: k == 0)), [])
    problems = check(file, found, None if tokenizer is None else _choice_problem_for(tokenizer), rows)
    if as_json:
        typer.echo(json.dumps([asdict(p) | {"file": file.place} for p in problems], ensure_ascii=False))
    elif not quiet:
        for problem in problems:
            _echo(f"{file.place}:{problem.line}: {problem.level}: {problem.message}")
        counts = [(level, sum(p.level == level for p in problems)) for level in ("error", "warning", "note")]
        typer.echo(", ".join(f"{count} {level}s" for level, count in counts))
    if any(problem.level == "error" for problem in problems):
        raise typer.Exit(DataError.exit_code)


@app.command()
def download() -> None:
    """Download promptsource's 2,085 templates (0.2 MB, Apache-2.0) with pip to $RLKD_CACHE or ~/.cache/rlkd."""
    from ..templates.download import download as fetch

    path, fetched = fetch()
    typer.echo(f"{path}{'' if fetched else ' (already there)'}")


def _listed(template: Template) -> dict[str, Any]:
    def said(value: bool | None, yes: str, no: str) -> str:
        return "" if value is None else yes if value else no

    return {
        "name": template.name,
        "id": template.id,
        "task": said(template.original_task, "original task", "other task"),
        "choices in prompt": said(template.choices_in_prompt, "choices in prompt", ""),
        "metrics": ", ".join(template.metrics),
        "languages": ", ".join(template.languages),
    }


def _columns(template: Template) -> dict[str, list[str]]:
    both = template.columns(target=True)
    return {"columns": sorted(both), "gold_columns": sorted(template.gold_columns)}


def _table(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        _echo("\t".join(str(value) for value in row.values()).rstrip())


def _format(delimiter: str | None, encoding: str | None, columns: str | None) -> TextFormat:
    from ..data.text import text_format

    return text_format({"delimiter": delimiter, "encoding": encoding, "columns": columns})


def _stream(dataset: str, **options: Any) -> RowStream:
    from ..data.rows import RowStream

    return RowStream(dataset, **options)


def _rows(stream: RowStream, scan: Scan, first: int, count: int) -> list[tuple[int, dict[str, Any]]]:
    """(number, row) of `count` rows from `first` on. Raises DataError if `first` is beyond the last."""
    found = stream.blocks(scan, 1, range(first, first + count).__contains__)
    numbered = [(number, row) for _, number, (row,) in islice(found, count)]
    if not numbered:
        last = "" if scan.rows is None else f" to {scan.rows - 1}"
        raise DataError(f"'{stream.source}' has no row {first}: rows are counted from 0{last}.")
    return numbered


def _choice_problem_for(model: str) -> Callable[[tuple[str, ...]], str | None]:
    from ..models.vocabulary import load_tokenizer
    from ..sampling.ranking import choice_problem

    return partial(choice_problem, load_tokenizer(model, "--tokenizer"))


def _text(rendered: Rendered) -> str:
    from ..templates.template import NOT_APPLICABLE

    if rendered.reason == NOT_APPLICABLE:
        return f"({NOT_APPLICABLE})"
    lines = [rendered.input, f"-> {rendered.target if rendered.target is not None else f'({rendered.reason})'}"]
    if rendered.choices is not None:
        lines.append(f"choices: {' | '.join(rendered.choices)}")
    return "\n".join(lines)


def _echo(text: str) -> None:
    """Print text from outside, without the control characters that a terminal would obey."""
    typer.echo(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text))
