"""`rlkd distill`: from a file and a prompt to a student."""

from __future__ import annotations

import typer

from .train import PASS_ON as PASS_ON


def distill(context: typer.Context) -> None:
    """From a file and a prompt to a student: split, labels, warm-up, RL, evaluation, report (docs/distill.md).

    Settings: --config FILE.yaml, then --name value; `rlkd distill --help` lists them. Repeat the command to continue.
    """
    from ..io.redaction import redact_command_line
    from ..pipeline.arguments import DistillArguments
    from ..pipeline.estimate import estimate
    from ..pipeline.run import Plan, run_stages
    from ..pipeline.summary import finish
    from ..settings.parsing import parse_config

    (args,) = parse_config((DistillArguments,), context.args)
    redact_command_line()
    plan = Plan.of(args)
    typer.echo(plan.rows.note)
    if plan.pair.said:
        typer.echo(plan.pair.said)
    if args.dry_run:
        typer.echo("\n".join(estimate(plan)))
        return
    run_stages(plan, command, typer.echo)
    typer.echo("\n".join(finish(plan)))


def command(words: list[str]) -> int:
    """`rlkd` with these words, in this process; its exit code. Raises the errors of the command."""
    from .main import app

    group = typer.main.get_command(app)
    return group.main(words, prog_name="rlkd", standalone_mode=False) or 0
