"""`rlkd train-vocabulary` and `rlkd cut-vocabulary`: a vocabulary that fits the texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import prompts
from .models import AllowBin

if TYPE_CHECKING:
    from ..jobs.vocabulary import Corpus

Datasets = Annotated[list[str], typer.Option("--dataset", help=f"Texts; repeatable. {prompts.DATASET}")]
Column = Annotated[
    list[str], typer.Option("--column", help="Column with texts, or lists of them, in each data set; repeatable.")
]
Subset = Annotated[str | None, typer.Option(help="Subset of a hub data set.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")]
Limit = Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)]


def train_vocabulary(
    context: typer.Context,
    dataset: Datasets,
    column: Column,
    size: Annotated[int, typer.Option(help="Tokens of the vocabulary: at least 259, those of all bytes.", min=1)],
    out: Annotated[Path, typer.Option(help="New folder to write the tokenizer to.")],
    subset: Subset = None,
    split: Split = "train",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    limit: Limit = None,
) -> None:
    """Train a small vocabulary on texts, for teachers and students that are trained from scratch (docs/models.md)."""
    from ..jobs.vocabulary import train_vocabulary

    typer.echo(f"{out}: {train_vocabulary(_corpus(context), size, out)}")


def cut_vocabulary(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model with its tokenizer: a local folder or a hub id.")],
    dataset: Datasets,
    column: Column,
    out: Annotated[Path, typer.Option(help="New folder to write the model and its tokenizer to.")],
    subset: Subset = None,
    split: Split = "train",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    limit: Limit = None,
    allow_bin: AllowBin = False,
) -> None:
    """Cut a model's vocabulary to the tokens that texts use; on these texts it does what it did (docs/models.md)."""
    from ..jobs.vocabulary import cut_vocabulary

    typer.echo(f"{out}: {cut_vocabulary(model, _corpus(context), out, allow_bin=allow_bin)}")


def _corpus(context: typer.Context) -> Corpus:
    from ..jobs.vocabulary import Corpus

    return Corpus.of(context.params["dataset"], context.params["column"], context.params)
