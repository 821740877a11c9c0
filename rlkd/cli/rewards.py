"""`rlkd inspect-rewards`: the teacher's reward for every token of some answers, as a page or in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, DataError
from ..inspection.reward_view import RANKINGS, RewardView
from ..io.folders import check_page
from ..models.spec import Dtype
from . import prompts
from .models import AllowBin

if TYPE_CHECKING:
    By = str
else:
    By = Literal[tuple(RANKINGS)]

FROM_MODELS = (
    "teacher", "student", "student_before", "dataset", "templates", "input_column", "reward_value", "teacher_chat",
    "teacher_system_prompt", "student_chat", "student_system_prompt",
)  # fmt: skip
# Which options each kind of input needs, and which others it takes.
INPUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dataset": (("teacher", "input_column"), FROM_MODELS),
    "run": ((), ("step",)),
    "labels": ((), ("teacher", "reward_value")),
}


def inspect_rewards(
    context: typer.Context,
    teacher: Annotated[str | None, typer.Option(help="Teacher: a local folder or a hub id.")] = None,
    student: Annotated[str | None, typer.Option(help="Student whose greedy answers are shown.")] = None,
    student_before: Annotated[
        str | None, typer.Option(help="The student before training, shown for comparison.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(*prompts.ROWS, help="Inputs, as for generate-pseudolabels.")] = None,
    input_column: Annotated[str | None, typer.Option(help="Column with the raw input that the student reads.")] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(help="dataset[/subset][:name] or file.yaml[:name]; repeatable: answers are scored under each."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of a training run, instead of models.")] = None,
    step: Annotated[int | None, typer.Option(help="Step of the evaluation to show. Default: the last.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of pseudo-labels; with --teacher, they are scored.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Read the first N inputs (or labels).", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="Write a self-contained page: FILE.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all numbers.")] = False,
    worst: Annotated[int | None, typer.Option(help="Only the N worst inputs.", min=1)] = None,
    by: Annotated[
        By,
        typer.Option(
            help="Criterion of --worst: regret, the gap between templates or between student and teacher, or length."
        ),
    ] = "regret",
    min_length: Annotated[int, typer.Option(help="Only answers of at least this many tokens.", min=0)] = 0,
    max_length: Annotated[int | None, typer.Option(help="Only answers of at most this many tokens.", min=0)] = None,
    search: Annotated[
        str | None, typer.Option(help="Only inputs that contain this text themselves or in an answer.")
    ] = None,
    reward_value: Annotated[
        str | None,
        typer.Option(help="Reward: max, lse or softmax. Default: max, or the run's own.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.", min=1)] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Maximum length of a prompt, in tokens.", min=1)] = 512,
    input_eos: prompts.InputEos = None,
    teacher_chat: prompts.TeacherChat = None,
    teacher_system_prompt: prompts.TeacherSystem = None,
    student_chat: prompts.StudentChat = None,
    student_system_prompt: prompts.StudentSystem = None,
    src_lang: prompts.SourceLanguage = None,
    tgt_lang: prompts.TargetLanguage = None,
    teacher_dtype: Annotated[Dtype, typer.Option(help="Precision of the teacher.")] = "float32",
    allow_bin: AllowBin = False,
    templates_dir: Annotated[Path | None, typer.Option(help=prompts.TEMPLATES_DIR)] = None,
    all_templates: prompts.AllTemplates = False,
    gold_input: prompts.GoldInput = False,
    truncation: prompts.Truncate = "none",
    strict_compat: prompts.StrictCompat = False,
    column_map: prompts.ColumnMap = None,
    label_map: prompts.LabelMap = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    split: prompts.Split = "train",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    reference_column: Annotated[str | None, typer.Option(help="Column with human answers, to show as well.")] = None,
    id_column: prompts.IdColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of templates with random choices.")] = 0,
) -> None:
    """Show the reward of every token: of models on a data set, of a training run, or of pseudo-labels.

    Give exactly one of --dataset (with --teacher), --run and --labels. Numbers are in nats.
    """
    request = dict(context.params)
    kind = _check(request)
    if kind == "run":
        from ..inspection.saved import from_run

        view = from_run(request["run"], step=step)
    else:
        from ..jobs.rewards import view_of_labels, view_of_models

        request["reward_value"] = reward_value or "max"
        view = view_of_labels(request) if kind == "labels" else view_of_models(request)
    view = view.with_length(min_length, max_length)
    view = view if search is None else view.search(search)
    view = view if worst is None else view.worst(worst, by)
    if not len(view):
        raise DataError("no input is left after --search, --min-length, --max-length and --worst; relax them.")
    _show(view, out, as_json)


def _show(view: RewardView, out: Path | None, as_json: bool) -> None:
    if out is not None:
        view.to_html(out)
    if as_json:
        typer.echo(view.to_json())
    elif out is not None:
        typer.echo(out)
    else:
        view.show()


def _check(request: dict[str, Any]) -> str:
    """The kind of input. Raises ConfigError unless the options fit together and the page can be written."""
    kinds = [kind for kind in INPUTS if request[kind] is not None]
    if len(kinds) != 1:
        found = " and ".join(f"--{kind}" for kind in kinds) or "none of them"
        raise ConfigError(f"give exactly one of --dataset, --run and --labels; {found} is given.")
    (kind,) = kinds
    needed, taken = INPUTS[kind]
    if missing := [_flag(name) for name in needed if request[name] is None]:
        raise ConfigError(f"--{kind} needs {' and '.join(missing)} as well.")
    given = [name for name in (*FROM_MODELS, "step") if request[name] not in (None, [], ())]
    foreign = [_flag(name) for name in given if name not in (kind, *taken)]
    if foreign:
        raise ConfigError(f"--{kind} does not take {foreign[0]}: leave it out.")
    if kind == "dataset" and not (request["student"] or request["student_before"]):
        for name in ("student_chat", "student_system_prompt"):
            if request[name] is not None:
                raise ConfigError(f"{_flag(name)} is of the prompts of --student: name it.")
    out = request["out"]
    if out is not None and out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: name a file that ends in .html; numbers come with --json.")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist.")
    if out is not None:
        check_page(out)
    return kind


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
