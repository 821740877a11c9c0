"""`rlkd config`: the settings of a run, before it runs."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, nearest
from .train import JOBS

if TYPE_CHECKING:
    from ..settings.parsing import Setting

app = typer.Typer(help="Check and show the settings of a recipe.", no_args_is_help=True, rich_markup_mode=None)
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
File = Annotated[Path, typer.Argument(help="YAML file of settings. Flags after it override the file: --name value ...")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="What reads the file: a job of `rlkd train`, or a script. Default: the script next to it, x.py for x.yaml."
    ),
]


@app.command(context_settings=PASS_ON)
def check(context: typer.Context, file: File, recipe: Recipe = None) -> None:
    """Report every mistake in the settings. Loads no models and no data."""
    found = _settings(file, recipe, context.args)
    given = sum(setting.origin not in ("default", "preset") for setting in found)
    typer.echo(f"{file}: valid: {given} settings given, {len(found) - given} defaults")


@app.command(context_settings=PASS_ON)
def show(
    context: typer.Context,
    file: File,
    recipe: Recipe = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Include the defaults of transformers' and TRL's own settings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list of all settings.")] = False,
) -> None:
    """Show every setting as a run would use it, and its origin. The output is YAML that gives the same run."""
    found = _settings(file, recipe, context.args)
    if as_json:
        typer.echo(json.dumps([asdict(setting) for setting in found], ensure_ascii=False))
        return
    section = ""
    for setting in found:
        if setting.section != section:
            section = setting.section
            typer.echo(f"# {section}")
        if all_ or setting.own or setting.origin != "default":
            value = json.dumps(setting.value, ensure_ascii=False)
            typer.echo(
                f"{setting.name}: {value}  # {setting.origin}; {setting.allowed}; {' '.join(setting.help.split())}"
            )


def _settings(file: Path, recipe: str | None, flags: list[str]) -> list[Setting]:
    from ..settings.parsing import describe_config

    argv = ["--config", str(file), *flags]
    if recipe in JOBS:
        from ..jobs.training import TRAINING_JOBS

        return describe_config(TRAINING_JOBS[recipe].settings, argv, preset=TRAINING_JOBS[recipe].preset)
    return describe_config(_sections(file, recipe), argv)


def _sections(file: Path, recipe: str | None) -> tuple[type, ...]:
    """The dataclasses in a script's `SETTINGS`. Raises ConfigError if there is no such script."""
    if recipe is None:
        script = file.with_name(file.name.split(".")[0] + ".py")
    else:
        script = Path(recipe) if recipe.endswith(".py") else Path("recipes", f"{recipe}.py")
    if not script.is_file():
        scripts = [str(other) for other in sorted(script.parent.glob("*.py"))]
        raise ConfigError(
            f"{script}: no such recipe.{nearest(str(script), scripts)} "
            f"Name what reads {file}: --recipe FILE.py, or --recipe {', '.join(JOBS)}"
        )
    sys.path.insert(0, str(script.parent))  # as when the script runs
    try:
        sections = runpy.run_path(str(script), run_name="recipe").get("SETTINGS")
    except Exception as error:  # whatever a script may raise
        raise ConfigError(f"{script} cannot be read: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(script.parent))
    if not sections:
        raise ConfigError(f"{script} has no SETTINGS: define it as the tuple of dataclasses passed to parse_config.")
    return sections
