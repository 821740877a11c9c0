"""What `rlkd generate-pseudolabels`, `rlkd predict` and `rlkd data repair` share: running a request, and repeating a
recorded one.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import typer

from ..errors import DataError
from ..io.redaction import REDACTED

COMMAND = "generate-pseudolabels"  # of requests that name none
# These control how the command runs, not its labels.
NOT_IN_REQUEST = ("out", "overwrite", "allow_config_change", "quiet", "as_json")
FINISHED_WITH_FAILED_ROWS = 4


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """The request of a command line: plain values, and the folder that relative paths start from."""
    chosen = {name: value for name, value in options.items() if name not in NOT_IN_REQUEST}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    return plain | {"folder": os.getcwd()}


def run(request: dict[str, Any], out: Path, *, quiet: bool = False, **how: bool) -> None:
    """Label or predict as requested and print a summary. Raises: what the job raises; typer.Exit(4) if rows failed."""
    from ..jobs.predictions import predict
    from ..jobs.pseudolabels import label
    from ..labels.card import summary

    job = predict if request.get("command") == "predict" else label
    totals = job(request, out, quiet=quiet, **how)
    if not quiet:
        typer.echo(f"{summary(totals)}\n{out}")
    if totals["status"]["failed"]:
        raise typer.Exit(FINISHED_WITH_FAILED_ROWS)


def arguments(request: dict[str, Any]) -> list[str]:
    """The arguments of the command that a manifest records, without those of `NOT_IN_REQUEST`; defaults are left out.

    Raises DataError for what is not an option of the command.
    """
    options = {option.name: option for option in _command(request).params}
    words: list[str] = []
    for name, value in request.items():
        if name in ("folder", "command"):
            continue
        if name not in options or name in NOT_IN_REQUEST:
            raise DataError(f"the recorded command has an unknown option '{_printable(name)}': repeat it by hand.")
        option = options[name]
        if value is None or value == option.default:
            continue
        flag = option.opts[0]
        if option.param_type_name == "argument":
            words.insert(0, str(value))
            continue
        if isinstance(value, bool):
            words += [flag] if value else option.secondary_opts[:1]
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def shown(request: dict[str, Any], out: Path) -> str:
    """The recorded command as a line to read, and to paste into a shell."""
    line = shlex.join(["rlkd", *_name(request).split(), *arguments(request), f"--out={out}"])
    return _printable(f"cd {shlex.quote(str(request.get('folder', '.')))} && {line}")


def repeat(request: dict[str, Any], out: Path, *, quiet: bool) -> int:
    """Run the recorded command, its values checked as if they were typed; its exit code. Raises as `run`."""
    words = [*arguments(request), f"--out={out}", *(["--quiet"] if quiet else [])]
    if hidden := [word for word in words if REDACTED in word]:
        raise DataError(
            f"{out}: the recorded command cannot be repeated: {', '.join(hidden)} held a secret, which is not "
            "recorded. Give the command yourself: it makes what is missing."
        )
    # Relative paths in the request start from the folder where it was made.
    if Path(str(request.get("folder", ""))).is_dir():
        os.chdir(str(request["folder"]))
    return _command(request).main(words, prog_name=f"rlkd {_name(request)}", standalone_mode=False) or 0


def _name(request: dict[str, Any]) -> str:
    """The command that a request is of. Raises DataError for another one."""
    name = request.get("command", COMMAND)
    if name not in (COMMAND, "predict", "data filter"):
        raise DataError(f"the recorded command is '{_printable(str(name))}', which makes no labels: repeat it by hand.")
    return str(name)


def _command(request: dict[str, Any]) -> Any:
    from .main import app

    command: Any = typer.main.get_command(app)
    for name in _name(request).split():
        command = command.commands[name]
    return command


def _printable(text: str) -> str:
    """Text from a file, without the control characters that would change what a terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
