"""`rlkd probe`: what the layers of frozen encoders encode about a label, for several models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import Pool
from ..errors import ConfigError
from . import prompts
from .models import AllowBin

if TYPE_CHECKING:
    from ..data.glue import TableLayout
    from ..data.probe_rows import ProbeRows


def probe(
    models: Annotated[list[str], typer.Argument(help="Encoders or classifiers: local folders or hub ids.")],
    train: Annotated[str | None, typer.Option(help="Table of training rows: .csv, .tsv, .jsonl or .parquet.")] = None,
    test: Annotated[str | None, typer.Option(help="Table of the rows to score.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Validation rows, to choose the penalty. Default: a tenth of the training rows.")
    ] = None,
    task_file: Annotated[
        str | None,
        typer.Option(help="Instead of tables: lines split<TAB>label<TAB>text, split tr, va or te (SentEval)."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the tables with the sentence.")] = "text",
    pair_column: Annotated[str | None, typer.Option(help="Column with the second sentence.")] = None,
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    pool: Annotated[Pool, typer.Option(help="The first token, or the mean over all tokens except padding.")] = "cls",
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,3,6; 0 is the embeddings.")] = "all",
    max_length: Annotated[int, typer.Option(help="Texts are cut to this many tokens.", min=3)] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows per batch; does not change scores.", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows of each split.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing validation rows if none are given.")] = 0,
    allow_bin: AllowBin = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Linear probes of frozen layers: logistic regression, compared with the most frequent label and the embeddings.

    Accuracy on the test rows with its 95 % interval. The models themselves are not trained.
    """
    numbers = _parse_layers(layers)
    layout = _layout((text_column, label_column, pair_column), delimiter, encoding, columns)
    rows = _read(train, test, validation, task_file, layout, limit, seed)
    from ..jobs.probe import ProbeSettings, probe_models  # loads torch: the rows are known to be good by now

    report = probe_models(models, rows, ProbeSettings(pool, numbers, max_length, batch_size, allow_bin))
    typer.echo(json.dumps(report, ensure_ascii=False)) if as_json else _print_table(report)


def _parse_layers(layers: str) -> list[int] | None:
    if layers == "all":
        return None
    parts = [part.strip() for part in layers.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--layers '{layers}': allowed are all, or whole numbers separated by commas, such as 0,3,6")
    return sorted({int(part) for part in parts})


def _layout(
    names: tuple[str, str, str | None], delimiter: str | None, encoding: str | None, columns: str | None
) -> TableLayout:
    from ..data.glue import TableLayout
    from ..data.text import text_format

    found = text_format({"delimiter": delimiter, "encoding": encoding, "columns": columns})
    own = None if found.columns is None else tuple(found.columns)
    return TableLayout(*names, columns=own, delimiter=found.delimiter, encoding=found.encoding)


def _read(
    train: str | None,
    test: str | None,
    validation: str | None,
    task_file: str | None,
    layout: TableLayout,
    limit: int | None,
    seed: int,
) -> ProbeRows:
    from ..data.probe_rows import read_tables, read_task_file

    if task_file is not None and train is test is validation is None:
        return read_task_file(task_file, limit=limit, seed=seed)
    if task_file is not None or train is None or test is None:
        raise ConfigError("give either --train and --test (and --validation), or --task-file")
    return read_tables(train, test, validation, layout=layout, limit=limit, seed=seed)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counts = ", ".join(f"{count:,} {split}" for split, count in report["rows"].items())
    table = Table(title=f"accuracy % of linear probes (95 % interval); {len(report['labels'])} labels; rows: {counts}")
    table.add_column("layer")
    for result in report["models"]:
        table.add_column(escape(result["model"]), overflow="fold")
    width = len(report["models"])
    table.add_row("majority", *[_shown(report["majority"])] * width)
    table.add_row("embeddings, mean", *(_shown(result["embeddings_mean"]) for result in report["models"]))
    by_layer = [{score["layer"]: score for score in result["layers"]} for result in report["models"]]
    for layer in sorted(set().union(*by_layer)):
        cells = [_shown(scores[layer]) if layer in scores else "" for scores in by_layer]
        table.add_row(f"{layer}, {report['pool']}", *cells)
    Console().print(table)


def _shown(score: dict[str, Any]) -> str:
    return "{accuracy:.1f} ({low:.1f}, {high:.1f})".format(**{k: 100 * score[k] for k in ("accuracy", "low", "high")})
