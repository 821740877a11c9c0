"""`rlkd estimate`: what a training takes, before it is paid."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .train import JOBS

if TYPE_CHECKING:
    from ..jobs.estimate import Estimate, Measured

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
GB = 10**9


def estimate(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="YAML file of settings. Flags after it override the file: --name value ...")
    ],
    job: Annotated[
        str | None, typer.Option(help="Job of `rlkd train` that the file is for. Default: the first word of its name.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that train together, one device each.", min=1)] = 1,
    rows: Annotated[
        int | None, typer.Option(help="Rows (labels) to learn from, where they are not on this machine.", min=1)
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GB of a device: exit code 2 if the training needs more.", min=0)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="10^12 operations a second that a device reaches, for the hours.", min=0)
    ] = None,
    measure: Annotated[
        int | None, typer.Option(help="Train so many updates now, in a temporary folder, for the hours.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate parameters, memory of a device by phase, disk, updates, tokens and hours of a training.

    From configuration files alone: no weights are loaded, unless --measure trains. 1 GB is 10^9 bytes.
    """
    from ..jobs.estimate import estimate as estimated
    from ..jobs.estimate import measure as measured
    from ..jobs.training import TRAINING_JOBS
    from ..settings.parsing import parse_config

    if tflops is not None and measure is not None:
        raise ConfigError("--tflops and --measure both give a speed: leave one out")
    name = _job(file, job)
    chosen = TRAINING_JOBS[name]
    built = parse_config(chosen.settings, ["--config", str(file), *context.args], preset=chosen.preset)
    found = estimated(name, built, rows=rows, processes=processes)
    timed = None if measure is None else measured(name, built, measure)
    seconds = None
    if timed is not None:
        seconds = timed.seconds
    elif tflops is not None:
        seconds = found.operations / (tflops * 1e12)
    if as_json:
        speed = {"seconds_per_update": seconds, "hours": found.hours(seconds)}
        speed |= {"measured_peak": timed.peak} if timed else {}
        typer.echo(json.dumps({**found.to_json(), **speed}, ensure_ascii=False))
    else:
        typer.echo("\n".join(_lines(found, seconds, timed)))
    if device_memory is not None and found.peak.total > device_memory * GB:
        raise ConfigError(
            f"the training needs {found.peak.total / GB:,.1f} GB in the phase '{found.peak.name}', and --device-memory "
            f"is {device_memory:g}: lower per_device_train_batch_size, or set gradient_checkpointing, use_peft or bf16"
        )


def _job(file: Path, job: str | None) -> str:
    """The job that a file is for. Raises ConfigError if its name does not say it."""
    name = job or file.name.replace("-", "_").split("_")[0].split(".")[0]
    if name not in JOBS:
        raise ConfigError(f"{file}: which job of `rlkd train` is it for? Name it: --job {', '.join(JOBS)}")
    return name


def _lines(found: Estimate, seconds: float | None, timed: Measured | None) -> list[str]:
    """The estimate in words."""
    lines = [f"{name}: {count:,} parameters" for name, count in found.parameters.items()]
    lines += ["", *_table(found), ""]
    disk = [
        f"{name} {size / GB:,.3g} GB" if size is not None else f"{name} not known" for name, size in found.disk.items()
    ]
    prompt, answer = found.tokens
    most = f"{prompt} tokens" if not answer else f"prompts of {prompt} and answers of {answer} tokens"
    rows = found.answers * found.processes
    total = "updates: how many is not known (--rows)" if found.updates is None else f"{found.updates:,} updates"
    lines += [f"disk: {', '.join(disk)}", f"{total}, each on {rows} rows of at most {most}"]
    lines.append(f"an update: {found.operations / 1e12:,.3g} T operations of a device, its share of rollouts included")
    if seconds is None:
        lines.append("hours: not known (--measure or --tflops)")
    else:
        hours = found.hours(seconds)
        lines.append(
            f"an update takes {seconds:,.3g} s" + ("" if hours is None else f", the training {hours:,.3g} hours")
        )
    if timed is not None:
        lines.append(f"measured peak {timed.peak / GB:,.3g} GB, estimate {found.peak.total / GB:,.3g} GB")
    return [*lines, *found.notes]


def _table(found: Estimate) -> list[str]:
    """Memory by part and phase."""
    unit, head = (GB, "GB of a device") if found.peak.total >= GB else (GB // 1000, "MB of a device")
    names = list(dict.fromkeys(name for phase in found.phases for name, size in phase.parts.items() if size))
    width = max(map(len, (*names, head)))

    def line(name: str, numbers: Iterable[int]) -> str:
        return f"{name:<{width}}" + "".join(f"{number / unit:>12,.2f}" for number in numbers)

    return [
        f"{head:<{width}}" + "".join(f"{phase.name:>12}" for phase in found.phases),
        *(line(name, (phase.parts.get(name, 0) for phase in found.phases)) for name in names),
        line("together", (phase.total for phase in found.phases)),
        f"peak: {found.peak.total / unit:,.2f} {head[:2]} in the phase '{found.peak.name}'",
    ]
