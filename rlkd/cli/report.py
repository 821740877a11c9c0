"""`rlkd report` and `rlkd compare`: finished and unfinished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing.")]


def report(
    run: Annotated[Path, typer.Argument(help="Folder of one run, or of several (ARM/, seed-N/ARM/).")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write. Default: report.html in the folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Report on a run as one HTML page: did it help, at what cost, where does it fail; curves, tables, worst rows."""
    from ..io.folders import write_page
    from ..report.page import report as page
    from ..report.reading import read_arms
    from ..report.summary import lines, summary

    arms = read_arms(run)
    path = out or run / "report.html"
    write_page(path, page(arms, run.resolve().name))
    if as_json:
        typer.echo(json.dumps(summary(arms) | {"page": str(path)}, ensure_ascii=False))
    elif not quiet:
        typer.echo("\n".join([*lines(arms), f"page: {path}"]))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; each is compared with the first.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write, with the curves overlaid.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs: settings that differ, scores, and paired differences on the held-out rows they share."""
    from ..io.folders import write_page
    from ..report.page import comparison as page
    from ..report.reading import read_side_by_side
    from ..report.summary import comparison_tables, differences

    arms = read_side_by_side(runs)
    if out is not None:
        write_page(out, page(arms))
    if as_json:
        typer.echo(json.dumps(differences(arms) | ({"page": str(out)} if out else {}), ensure_ascii=False))
    elif not quiet:
        comparison_tables(arms)
        if out:
            typer.echo(f"page: {out}")
