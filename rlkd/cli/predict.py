"""`rlkd predict`: a saved model's answers or classes for every row, in a folder as labels are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..choices import OnBadRow
from ..models.spec import Dtype
from ..sampling.engines.registry import engine_names
from . import prompts
from .models import AllowBin

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(name for name in engine_names() if name != "openai")]


def predict(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A saved generating model, adapter or classifier: a local folder or a hub id.")
    ],
    dataset: prompts.Dataset,
    input_column: Annotated[str, typer.Option(help="Column that the model reads.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    pair_column: Annotated[
        str | None, typer.Option(help="Classifiers of pairs: column with the second text. Its first is input-column.")
    ] = None,
    reference_column: Annotated[
        str | None, typer.Option(help="Column with right answers, kept with the predictions for rlkd data score.")
    ] = None,
    student_template: Annotated[str | None, typer.Option(help="One template for what the model reads.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Generating models: maximum length of an answer, in tokens. Default: as in training, or 64.", min=1
        ),
    ] = None,
    max_input_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum length of an input, in tokens. Default: as in training, or 512, or all positions.",
            min=1,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Generating models: precision of the model.")] = "float32",
    engine: Annotated[
        EngineName, typer.Option(help="Generating models: decoding backend; auto picks the fastest exact one.")
    ] = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of inputs and answers in one batch.", min=1)] = 4096,
    shard_rows: Annotated[
        int, typer.Option(help="Rows per file; an interrupted run loses at most one file.", min=1)
    ] = 5000,
    student_chat: Annotated[
        bool | None,
        typer.Option(
            "--student-chat/--no-student-chat",
            help="Generating models: whether inputs stand in the chat template. Default: only if rlkd trained it so.",
        ),
    ] = None,
    student_system_prompt: Annotated[
        str | None, typer.Option(help="Generating models: text of the chat's system turn.")
    ] = None,
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
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    id_column: prompts.IdColumn = None,
    on_bad_row: Annotated[
        OnBadRow,
        typer.Option(help="Input rows that cannot be used: stop, or skip them and list them in bad_rows.jsonl."),
    ] = "fail",
    seed: Annotated[int, typer.Option(help="Seed of a template with random choices.")] = 0,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Continue an unfinished folder with changed settings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace predictions already in the folder.")] = False,
) -> None:
    """Answer every row greedily with a saved student, or classify it: parquet shards, a manifest and a data card.

    Repeat the command to continue an interrupted run; exit codes are those of rlkd generate-pseudolabels.
    """
    from . import labels

    request = labels.recorded(context.params) | {"command": "predict"}
    labels.run(request, out, overwrite=overwrite, allow_config_change=allow_config_change, quiet=quiet)
