"""`rlkd data`: label folders after the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check, join and mend folders of pseudo-labels.", no_args_is_help=True, rich_markup_mode=None)
METRICS = ("exact_match", "rouge", "bleu")
Folder = Annotated[Path, typer.Argument(help="Folder written by rlkd generate-pseudolabels.")]


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    parts: Annotated[
        list[Path] | None, typer.Argument(help="Folders of the parts. None: all parts are in the first folder.")
    ] = None,
) -> None:
    """Join the parts that `--shard i/n` wrote into one folder, equal to that of one process."""
    from ..generation.card import summary
    from ..generation.upkeep import merge as join

    typer.echo(f"{summary(join(out, parts or []))}\n{out}")


@app.command()
def verify(folder: Folder) -> None:
    """Check every shard: checksum, rows, order, gaps. Exit code 3 if there is a problem; each is listed."""
    from ..errors import DataError
    from ..generation.upkeep import manifests
    from ..generation.upkeep import verify as check

    if problems := check(folder):
        raise DataError("\n".join([f"{folder} has {len(problems)} problems:", *problems, f"rlkd data repair {folder}"]))
    shards = [shard for manifest in manifests(folder) for shard in manifest.shards.values()]
    typer.echo(f"{folder}: {len(shards)} shards, {sum(shard['rows'] for shard in shards)} rows, all as written")


@app.command()
def score(
    folder: Folder,
    metric: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METRICS)}; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Compare the labels with the references kept beside them, template by template."""
    from ..errors import ConfigError, nearest

    chosen = metric or ["exact_match", "rouge"]
    if unknown := [name for name in chosen if name not in METRICS]:
        raise ConfigError(
            f"--metric '{unknown[0]}': allowed are {', '.join(METRICS)}.{nearest(unknown[0], list(METRICS))}"
        )
    from ..generation.label_store import load_pseudolabels
    from ..metrics import score_labels

    scores = score_labels(load_pseudolabels(folder).to_list(), chosen)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    columns = list(next(iter(scores.values())))
    typer.echo("\t".join(["template", *columns]))
    for template, values in scores.items():
        typer.echo("\t".join([template, *(f"{values[column]:.4g}" for column in columns)]))


@app.command()
def repair(
    folder: Folder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made again, and stop.")] = False,
) -> None:
    """Move damaged shards aside and make only those again, by the command that the manifest records."""
    from ..errors import DataError
    from ..generation.upkeep import repair as drop

    out = folder.resolve()
    dropped, request = drop(out, dry_run=dry_run)
    typer.echo("\n".join(dropped) or f"{folder}: nothing to repair")
    if dry_run or not dropped:
        return
    if request is None:
        raise DataError(
            f"{folder} was not made by the command line, so its settings are not known here. Repeat the call that made "
            "it: only what is missing is made again."
        )
    from .labels import label

    # Relative paths of the request start where it was made.
    if Path(request["folder"]).is_dir():
        os.chdir(request["folder"])
    label(request, out)
