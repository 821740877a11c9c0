"""`rlkd evaluate`: how good, how fast and how large a saved model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..choices import OnBadRow
from ..models.spec import Dtype
from . import prompts
from .models import AllowBin

LENGTHS = {"max_input_tokens": "tokens of an input", "max_new_tokens": "of an answer"}


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A saved generating model, adapter or classifier: a folder or a hub id.")
    ],
    dataset: prompts.Dataset,
    input_column: Annotated[str, typer.Option(help="Column that the model reads.")],
    out: Annotated[Path, typer.Option(help="Folder for the numbers and the answers; `rlkd compare` reads it.")],
    metric: Annotated[
        str,
        typer.Option(
            help="rouge, bleu, chrf, exact_match, token_f1, sari, several with commas between; module:function; none."
        ),
    ] = "none",
    reference_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the right answers: a text, or a list of texts, in each row. Classifiers: with the label, "
            "list of labels or of tags, or number."
        ),
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="Classifiers of pairs: column with the second text. Its first is input-column.")
    ] = None,
    label_separator: Annotated[
        str | None, typer.Option(help="Classifiers of several labels: what separates their names, written as text.")
    ] = None,
    student_template: Annotated[str | None, typer.Option(help="One template for what the model reads.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Also regret and log-probability under this teacher, and the match with it.")
    ] = None,
    templates: Annotated[list[str] | None, typer.Option(help="What the teacher reads; repeatable.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Generating models: maximum length of an answer, in tokens. Default: as in training, or 64.", min=1
        ),
    ] = None,
    max_input_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum length of an input, in tokens. Default: as in training, or 512, or all positions.", min=1
        ),
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Inputs that are answered together.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the model.")] = "float32",
    teacher_dtype: Annotated[Dtype, typer.Option(help="Precision of the teacher.")] = "float32",
    input_eos: prompts.InputEos = None,
    teacher_chat: prompts.TeacherChat = None,
    teacher_system_prompt: prompts.TeacherSystem = None,
    student_chat: prompts.StudentChat = None,
    student_system_prompt: prompts.StudentSystem = None,
    src_lang: prompts.SourceLanguage = None,
    tgt_lang: prompts.TargetLanguage = None,
    allow_bin: AllowBin = False,
    templates_dir: Annotated[Path | None, typer.Option(help=prompts.TEMPLATES_DIR)] = None,
    all_templates: prompts.AllTemplates = False,
    gold_input: prompts.GoldInput = False,
    truncation: prompts.Truncate = "none",
    strict_compat: prompts.StrictCompat = False,
    column_map: prompts.ColumnMap = None,
    label_map: prompts.LabelMap = None,
    subset: prompts.Subset = None,
    split: prompts.Split = "train",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    id_column: prompts.IdColumn = None,
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="Rows that cannot be used: fail, or skip and count them.")
    ] = "fail",
    seed: Annotated[int, typer.Option(help="Seed of sampled answers and of templates with random choices.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no table.")] = False,
) -> None:
    """Evaluate a saved model on rows: task metrics with 95 % intervals, regret under a teacher, speed and size.

    Every row is answered greedily and once by sampling. A classifier gets accuracy, F1, Matthews correlation and the
    scores of each class; one of several labels, of numbers or of words, the scores of its kind.
    """
    from ..io.files import write_text
    from ..jobs.evaluation import evaluate as run

    request = {name: value for name, value in context.params.items() if name not in ("as_json", "quiet", "out")}
    found = run(request, out, quiet=quiet or as_json)
    intervals = _intervals(found.numbers, found.per_row)
    record = {
        "rows": found.rows,
        "limits": found.limits,
        "numbers": found.numbers,
        "intervals": intervals,
        "speed": found.speed,
    }
    record |= found.classes
    write_text(out / "evaluation.json", json.dumps(record, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps({**record, "folder": str(out)}))
    elif not quiet:
        _show({**found.numbers, **found.speed}, intervals, _title(found.rows, found.limits), found.classes)
        typer.echo(out)


def _intervals(numbers: dict[str, float], per_row: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the scores that are means over rows."""
    import numpy as np

    from ..report.intervals import mean_interval

    found = {}
    for name, values in per_row.items():
        interval = mean_interval(np.array([values]))
        # The rows' own BLEU and chrF do not average to that of the corpus.
        if interval.low is not None and interval.high is not None and np.isclose(interval.value, numbers[name]):
            found[name] = (interval.low, interval.high)
    return found


def _title(rows: int, limits: dict[str, int]) -> str:
    """As '500 rows; at most 512 tokens of an input, 64 of an answer'."""
    cuts = [f"{limits[name]} {of}" for name, of in LENGTHS.items() if name in limits]
    return f"{rows} rows; at most {', '.join(cuts)}"


def _show(
    numbers: dict[str, float], intervals: dict[str, tuple[float, float]], title: str, classes: dict[str, Any]
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def cell(name: str) -> str:
        if name not in numbers:
            return ""
        low_high = intervals.get(name)
        return f"{numbers[name]:.4g}" + (f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else "")

    table = Table("", *(("all rows",) if classes else ("greedy", "sampled")), title=title)
    for name in (name for name in numbers if not name.startswith("sample_")):
        table.add_row(name, cell(name), *(() if classes else (cell(f"sample_{name}"),)))
    console = Console(width=100, highlight=False)
    console.print(table)
    if classes.get("classes"):
        columns = ("label", "rows", "predicted", "precision", "recall", "f1")
        words = classes["problem_type"] == "token_classification"
        table = Table(*columns, title="each type of entity; rows are entities" if words else "each class")
        for one in classes["classes"]:
            table.add_row(escape(one["label"]), *(f"{one[name]:.4g}" for name in columns[1:]))
        console.print(table)
    for line in classes.get("warnings", ()):
        console.print(f"WARNING: {line}", soft_wrap=True, markup=False)
