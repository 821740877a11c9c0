"""`rlkd data`: folders of pseudo-labels after the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..labels.options import By

app = typer.Typer(
    help="Check, merge, filter and repair folders of pseudo-labels.", no_args_is_help=True, rich_markup_mode=None
)
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[Path, typer.Argument(help="Folder written by rlkd generate-pseudolabels.")]


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    parts: Annotated[
        list[Path] | None, typer.Argument(help="Folders of the parts. Default: all parts are in the first folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge the parts written with `--shard i/n` into one folder, identical to that of a single process."""
    from ..labels.card import summary
    from ..labels.maintenance import merge as merge_parts

    totals = merge_parts(out, parts or [])
    if as_json:
        typer.echo(json.dumps({"folder": str(out)} | totals, ensure_ascii=False))
    elif not quiet:
        typer.echo(f"{summary(totals)}\n{out}")


@app.command()
def verify(folder: Folder, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check every shard: checksum, rows, order, gaps. Lists all problems; exit code 3 if there are any."""
    from ..errors import DataError
    from ..labels.card import plural
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
        lines = [f"{folder} has {plural(len(problems), 'problem')}:", *problems, f"Repair: rlkd data repair {folder}"]
        raise DataError("\n".join(lines))
    if not quiet:
        typer.echo(f"{folder}: {plural(len(shards), 'shard')}, {plural(rows, 'row')}, all intact")


@app.command()
def score(
    folder: Folder,
    metric: Annotated[
        list[str] | None, typer.Option(help="exact_match, rouge, bleu, chrf, token_f1 or sari; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score the labels against the references stored with them, for each template."""
    from ..errors import ConfigError, DataError, nearest
    from ..evaluation.task_metrics import TASK_METRICS, score_labels
    from ..labels.store import load_pseudolabels

    chosen = metric or ["exact_match", "rouge"]
    if unknown := [name for name in chosen if name not in TASK_METRICS]:
        raise ConfigError(
            f"--metric '{unknown[0]}': allowed are {', '.join(TASK_METRICS)}.{nearest(unknown[0], list(TASK_METRICS))}"
        )

    rows = load_pseudolabels(folder).to_list()
    if not rows:
        raise DataError(f"{folder}: no row has a label (status ok), so there is nothing to score. README.md says why.")
    scores = score_labels(rows, chosen)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    columns = list(next(iter(scores.values())))
    typer.echo("\t".join(["template", *columns]))
    for template, values in scores.items():
        typer.echo("\t".join([template, *(f"{values[column]:.4g}" for column in columns)]))


@app.command("filter")
def filter_(
    context: typer.Context,
    labels: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    min_logprob: Annotated[
        float | None, typer.Option(help="Least log-probability of the whole answer under the teacher, in nats.")
    ] = None,
    min_logprob_per_token: Annotated[
        float | None, typer.Option(help="Least log-probability divided by the answer's tokens.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Least tokens of an answer, its end included.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer, its end included.", min=1)] = None,
    agree: Annotated[
        int | None, typer.Option(help="Least templates of an input under which the answer is the same.", min=1)
    ] = None,
    best: Annotated[int | None, typer.Option(help="Most answers to an input: the N best of them.", min=1)] = None,
    by: Annotated[
        By | None,
        typer.Option(help="What the best have most of (reward: labels with --top-k-logprobs). Default: logprob."),
    ] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep the first of equal answers to equal inputs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace labels already in the folder.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy a finished folder without the labels that rules leave out. They apply in the order above, each to what those
    before it left; what each left out is counted, and recorded in the new folder.
    """
    from ..labels.card import summary
    from ..labels.filtering import Filter, filter_labels
    from .labels import recorded

    rules = Filter(min_logprob, min_logprob_per_token, min_tokens, max_tokens, agree, best, by, drop_duplicates)
    request = recorded(context.params) | {"command": "data filter"}
    totals = filter_labels(labels, out, rules, overwrite=overwrite, request=request)
    if as_json:
        typer.echo(json.dumps({"folder": str(out)} | totals, ensure_ascii=False))
    elif not quiet:
        typer.echo(f"{summary(totals)}\n{out}")


@app.command()
def repair(
    folder: Folder,
    run: Annotated[bool, typer.Option("--run", help="Run the command that the manifest records.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be regenerated, and how.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Move damaged shards aside and regenerate only those with the command that the manifest records.

    That command names a teacher and data, so it is shown, and runs with --run only; without it nothing changes.
    """
    from ..errors import DataError
    from ..labels.maintenance import repair as drop_damaged
    from . import labels

    out = folder.resolve()
    problems, requests = drop_damaged(out, dry_run=True)
    commands = [labels.shown(request, out) for request in requests if request is not None]
    if as_json:
        found = {"folder": str(folder), "dropped": problems, "commands": commands, "dry_run": dry_run}
        typer.echo(json.dumps(found, ensure_ascii=False))
    elif not quiet:
        typer.echo("\n".join([*problems, *commands]) or f"{folder}: nothing to repair")
    if dry_run or not problems:
        return
    if commands and not run:
        raise DataError(
            "\n  ".join([f"{folder} was not changed. If you trust the recorded command, repeat with --run:", *commands])
        )
    drop_damaged(out)
    if None in requests:
        raise DataError(
            f"{folder} was not written by the command line, so its command is unknown. Repeat the call that wrote "
            "it: only what is missing is computed."
        )
    codes = [labels.repeat(request, out, quiet=quiet or as_json) for request in requests if request is not None]
    if any(codes):
        raise typer.Exit(max(codes))
