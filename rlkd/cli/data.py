"""`rlkd data`: label folders after the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check, join and mend folders of pseudo-labels.", no_args_is_help=True, rich_markup_mode=None)
METRICS = ("exact_match", "rouge", "bleu")
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")]
Folder = Annotated[Path, typer.Argument(help="Folder written by rlkd generate-pseudolabels.")]


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    parts: Annotated[
        list[Path] | None, typer.Argument(help="Folders of the parts. None: all parts are in the first folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Join the parts that `--shard i/n` wrote into one folder, equal to that of one process."""
    from ..labels.card import summary
    from ..labels.maintenance import merge as join

    totals = join(out, parts or [])
    if as_json:
        typer.echo(json.dumps({"folder": str(out)} | totals, ensure_ascii=False))
    elif not quiet:
        typer.echo(f"{summary(totals)}\n{out}")


@app.command()
def verify(folder: Folder, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check every shard: checksum, rows, order, gaps. Exit code 3 if there is a problem; each is listed."""
    from ..errors import DataError
    from ..labels.maintenance import manifests
    from ..labels.maintenance import verify as check

    problems = check(folder)
    shards = [shard for manifest in manifests(folder) for shard in manifest.shards.values()]
    rows = sum(shard["rows"] for shard in shards)
    if as_json:
        found = {"folder": str(folder), "shards": len(shards), "rows": rows, "problems": problems}
        typer.echo(json.dumps(found, ensure_ascii=False))
        raise typer.Exit(DataError.exit_code if problems else 0)
    if problems:
        raise DataError("\n".join([f"{folder} has {len(problems)} problems:", *problems, f"rlkd data repair {folder}"]))
    if not quiet:
        typer.echo(f"{folder}: {len(shards)} shards, {rows} rows, all as written")


@app.command()
def score(
    folder: Folder,
    metric: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METRICS)}; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the labels with the references kept beside them, template by template."""
    from ..errors import ConfigError, nearest

    chosen = metric or ["exact_match", "rouge"]
    if unknown := [name for name in chosen if name not in METRICS]:
        raise ConfigError(
            f"--metric '{unknown[0]}': allowed are {', '.join(METRICS)}.{nearest(unknown[0], list(METRICS))}"
        )
    from ..evaluation.task_metrics import score_labels
    from ..labels.store import load_pseudolabels

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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Move damaged shards aside and make only those again, by the command that the manifest records."""
    from ..errors import DataError
    from ..labels.maintenance import repair as drop

    out = folder.resolve()
    dropped, request = drop(out, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "dropped": dropped, "dry_run": dry_run}, ensure_ascii=False))
    elif not quiet:
        typer.echo("\n".join(dropped) or f"{folder}: nothing to repair")
    if dry_run or not dropped:
        return
    if request is None:
        raise DataError(
            f"{folder} was not made by the command line, so its settings are not known here. Repeat the call that made "
            "it: only what is missing is made again."
        )
    from .labels import run

    # Relative paths of the request start where it was made.
    if Path(request["folder"]).is_dir():
        os.chdir(request["folder"])
    run(request, out, quiet=quiet or as_json)
