"""`rlkd distill`, and the same in Python: from a file and a prompt to a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .train import PASS_ON as PASS_ON

if TYPE_CHECKING:
    from ..pipeline.arguments import DistillArguments


def distill_command(context: typer.Context) -> None:
    """From a file and a prompt to a student: split, labels, warm-up, RL, evaluation, report (docs/distill.md).

    Settings: --config FILE.yaml, then --name value; `rlkd distill --help` lists them. Repeat the command to continue.
    """
    from ..io.redaction import redact_command_line
    from ..pipeline.arguments import DistillArguments
    from ..settings.parsing import parse_config

    (args,) = parse_config((DistillArguments,), context.args)
    redact_command_line()
    distill(args, typer.echo)


def distill(args: DistillArguments, say: Callable[[str], None] = print) -> Path:
    """As `rlkd distill`, whose settings are the fields of `args`: the folder of the student, there unless `dry_run`.
    What is finished in `args.out` is skipped, and what was killed continues. say gets what the command prints.

    Raises ConfigError, DataError or ModelError before weights load; later what the stages raise, InterruptedRunError
    after a signal.
    """
    from ..pipeline.estimate import estimate
    from ..pipeline.run import Plan, run_stages
    from ..pipeline.summary import finish

    plan = Plan.of(args)
    say(plan.rows.note)
    if plan.pair.said:
        say(plan.pair.said)
    if args.dry_run:
        say("\n".join(estimate(plan)))
    else:
        run_stages(plan, command, say)
        say("\n".join(finish(plan)))
    return Path(args.out, "student")


def command(words: list[str]) -> int:
    """`rlkd` with these words, in this process; its exit code. Raises the errors of the command."""
    from .main import app

    group = typer.main.get_command(app)
    return group.main(words, prog_name="rlkd", standalone_mode=False) or 0
