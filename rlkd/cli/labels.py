"""What `rlkd generate-pseudolabels` and `rlkd data repair` share: running a recorded request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

# These control how the command runs, not its labels.
NOT_IN_REQUEST = ("out", "overwrite", "allow_config_change", "quiet")
FINISHED_WITH_FAILED_ROWS = 4


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """The request of a command line: plain values, and the folder that relative paths start from."""
    chosen = {name: value for name, value in options.items() if name not in NOT_IN_REQUEST}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    return plain | {"folder": os.getcwd()}


def run(request: dict[str, Any], out: Path, *, quiet: bool = False, **how: bool) -> None:
    """Label as requested and print a summary. Raises: what `jobs.pseudolabels.label` raises; typer.Exit(4) if rows
    failed.
    """
    from ..jobs.pseudolabels import label
    from ..labels.card import summary

    totals = label(request, out, quiet=quiet, **how)
    if not quiet:
        typer.echo(f"{summary(totals)}\n{out}")
    if totals["status"]["failed"]:
        raise typer.Exit(FINISHED_WITH_FAILED_ROWS)
