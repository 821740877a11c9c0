"""`rlkd probe`: what each layer of frozen encoders says of a label, models side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import Pool
from ..errors import ConfigError, ModelError

if TYPE_CHECKING:
    from ..data.probe_rows import ProbeRows
    from ..evaluation.probing import ProbeScore

logger = logging.getLogger(__name__)


def probe(
    models: Annotated[list[str], typer.Argument(help="Encoders or classifiers: local folders or hub ids.")],
    train: Annotated[str | None, typer.Option(help="Table of training rows: .csv, .tsv, .jsonl or .parquet.")] = None,
    test: Annotated[str | None, typer.Option(help="Table of the rows to score.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Table to choose the penalty on. Default: a tenth of the training rows.")
    ] = None,
    task_file: Annotated[
        str | None,
        typer.Option(help="Instead of tables: lines split<TAB>label<TAB>text, split tr, va or te (SentEval)."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the tables with the sentence.")] = "text",
    pair_column: Annotated[str | None, typer.Option(help="Column with the second sentence.")] = None,
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    pool: Annotated[Pool, typer.Option(help="The first token, or the mean of all but padding.")] = "cls",
    layers: Annotated[str, typer.Option(help="all, or numbers as in 0,3,6; 0 is the embeddings.")] = "all",
    max_length: Annotated[int, typer.Option(help="Texts are cut to this many tokens.", min=3)] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward; changes no score.", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows of each split.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Draws the validation rows where none are given.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Linear probes of frozen layers: logistic regression, beside the most frequent label and the bare embeddings.

    Accuracy on the test rows with its 95 % interval. Nothing of the models is trained.
    """
    numbers = _parse_layers(layers)
    rows = _read(train, test, validation, task_file, (text_column, pair_column, label_column), limit, seed)
    from ..models.vocabulary import load_tokenizer  # the rows are known to be good: torch may load

    checked = []
    for name in models:
        config = _check(name, numbers, max_length)
        tokenizer = load_tokenizer(name, "model")
        _check_tokenizer(tokenizer, config, name)
        checked.append((name, config, tokenizer))
    results = []
    for name, config, tokenizer in checked:
        chosen = range(config.num_hidden_layers + 1) if numbers is None else numbers
        scores = _probe(name, config, tokenizer, rows, pool, chosen, max_length, batch_size)
        results.append({"model": name, **scores})
    report = {
        "labels": list(rows.classes),
        "rows": {split: len(getattr(rows, split)) for split in ("train", "validation", "test")},
        "pool": pool,
        "majority": asdict(_majority(rows)),
        "models": results,
    }
    typer.echo(json.dumps(report, ensure_ascii=False)) if as_json else _print_table(report)


def _parse_layers(layers: str) -> list[int] | None:
    if layers == "all":
        return None
    parts = [part.strip() for part in layers.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--layers '{layers}': allowed are all, or whole numbers with commas between, as in 0,3,6")
    return sorted({int(part) for part in parts})


def _read(
    train: str | None,
    test: str | None,
    validation: str | None,
    task_file: str | None,
    columns: tuple[str, str | None, str],
    limit: int | None,
    seed: int,
) -> ProbeRows:
    from ..data.probe_rows import read_tables, read_task_file

    if task_file is not None and train is test is validation is None:
        return read_task_file(task_file, limit=limit, seed=seed)
    if task_file is not None or train is None or test is None:
        raise ConfigError("give either --train and --test (and --validation), or --task-file")
    text, pair, label = columns
    return read_tables(
        train, test, validation, text_column=text, pair_column=pair, label_column=label, limit=limit, seed=seed
    )


def _check(name: str, numbers: list[int] | None, max_length: int) -> Any:
    """The configuration of a model that has these layers and as many positions."""
    from ..models.encoders.classifiers import check_length
    from ..models.encoders.representations import load_encoder_config

    config = load_encoder_config(name)
    last = config.num_hidden_layers
    if numbers is not None and numbers[-1] > last:
        raise ConfigError(f"--layers {numbers[-1]}: model '{name}' has the layers 0 to {last}")
    check_length(max_length, config, f"model '{name}'")
    return config


def _check_tokenizer(tokenizer: Any, config: Any, name: str) -> None:
    from ..models.vocabulary import check_vocabulary_fits

    check_vocabulary_fits(config, max(tokenizer.get_vocab().values()) + 1, "model", name)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"model '{name}': its tokenizer has no padding token. Set one (pad_token) and save it again.")


def _probe(
    name: str,
    config: Any,
    tokenizer: Any,
    rows: ProbeRows,
    pool: Any,
    layers: Sequence[int],
    max_length: int,
    size: int,
) -> dict[str, Any]:
    """Scores of the embeddings' mean and of each layer."""
    import numpy as np
    import torch

    from ..data.labelled import EncodedTexts
    from ..evaluation.probing import Split, linear_probe
    from ..models.encoders.representations import load_encoder, pooled_layers

    model = load_encoder(name, config).to("cuda" if torch.cuda.is_available() else "cpu")
    wanted = list(dict.fromkeys([(0, "mean"), *((layer, pool) for layer in layers)]))
    splits = []
    for part in (rows.train, rows.validation, rows.test):
        texts = EncodedTexts(part, tokenizer, max_length, len(rows.classes))
        splits.append((pooled_layers(model, texts.batches(size), wanted), np.array(texts.labels)))
        logger.info("%s: %d rows read", name, len(texts))
    scores = {}
    for choice in wanted:
        train, validation, test = (Split(features[choice], labels) for features, labels in splits)
        scores[choice] = linear_probe(train, validation, test)
    return {
        "embeddings_mean": asdict(scores[0, "mean"]),
        "layers": [{"layer": layer, **asdict(scores[layer, pool])} for layer in layers],
    }


def _majority(rows: ProbeRows) -> ProbeScore:
    import numpy as np

    from ..evaluation.probing import majority_baseline

    return majority_baseline(*(np.array([row["label"] for row in part]) for part in (rows.train, rows.test)))


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
