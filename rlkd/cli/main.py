"""The command `rlkd`. Commands import what they run when they run, so that `--help` stays fast and needs no torch."""

from __future__ import annotations

import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..choices import OnBadRow
from ..io.redaction import redacted
from ..labels.options import OnLong
from ..models.spec import Dtype, Quantization
from ..sampling.engines.protocol import Strategy
from ..sampling.engines.registry import engine_names
from ..settings.parsing import run_main
from ..settings.paths import refuse_missing_paths, refuse_remote_paths
from . import (
    config,
    data,
    distill,
    estimate,
    evaluate,
    models,
    predict,
    probe,
    prompts,
    report,
    rewards,
    train,
    vocabulary,
)
from .models import AllowBin

app = typer.Typer(
    name="rlkd",
    help="Distil a prompted teacher into a small student by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "dataset[/subset]" is not markup
)
app.add_typer(prompts.app, name="prompts")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(train.app, name="train")
app.command()(probe.probe)
app.command("report")(report.report)
app.command("compare")(report.compare)
app.command("distill", context_settings=distill.PASS_ON)(distill.distill)
app.command("estimate", context_settings=estimate.PASS_ON)(estimate.estimate)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("merge-adapter")(models.merge_adapter)
app.command("export")(models.export)
app.command("train-vocabulary")(vocabulary.train_vocabulary)
app.command("cut-vocabulary")(vocabulary.cut_vocabulary)
app.command("inspect-rewards")(rewards.inspect_rewards)


UsageError: Any = typer.BadParameter.__base__  # of the click that this version of typer uses
LabelStrategy = Literal[Strategy, "rank"]
if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[engine_names()]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlkd {version('rlkd')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("generate-pseudolabels")
def generate_pseudolabels(
    context: typer.Context,
    teacher: Annotated[str, typer.Option(help="Teacher: a local folder or a hub id.")],
    dataset: prompts.Dataset,
    input_column: Annotated[str, typer.Option(help="Column with the raw input that the student reads.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    templates: Annotated[
        list[str] | None,
        typer.Option(
            help="dataset[/subset][:name] or file.yaml[:name]; repeatable. Default: the teacher reads the raw input."
        ),
    ] = None,
    templates_dir: Annotated[Path | None, typer.Option(help=prompts.TEMPLATES_DIR)] = None,
    all_templates: prompts.AllTemplates = False,
    gold_input: prompts.GoldInput = False,
    truncation: prompts.Truncate = "none",
    strict_compat: prompts.StrictCompat = False,
    column_map: prompts.ColumnMap = None,
    label_map: prompts.LabelMap = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")] = "train",
    delimiter: prompts.Delimiter = None,
    encoding: prompts.Encoding = None,
    columns: prompts.Columns = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    reference_column: Annotated[
        str | None, typer.Option(help="Column with human answers, kept for evaluation.")
    ] = None,
    id_column: prompts.IdColumn = None,
    strategy: Annotated[
        LabelStrategy, typer.Option(help="Decoding; rank: the most probable of a template's answer choices.")
    ] = "greedy",
    labels_per_input: Annotated[int, typer.Option(help="Labels per input and template (sample, beam).")] = 1,
    num_beams: Annotated[int, typer.Option(help="Beams (beam only).")] = 4,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (sample only).")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.", min=1)] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Maximum length of a prompt, in tokens.", min=1)] = 512,
    top_k_logprobs: Annotated[
        int,
        typer.Option(
            help="Record the teacher's K most probable tokens, with log-probabilities, at each position.", min=0
        ),
    ] = 0,
    engine: Annotated[
        EngineName, typer.Option(help="Decoding backend; auto picks the fastest exact one and logs why.")
    ] = "auto",
    compute_type: Annotated[
        str | None, typer.Option(help="Precision of ctranslate2: float32, bfloat16, float16 or int8 (approximate).")
    ] = None,
    server_url: Annotated[
        str | None,
        typer.Option(
            help="openai: a server of vLLM or SGLang, http://localhost:8000/v1. Its key, if any, is in RLKD_SERVER_KEY."
        ),
    ] = None,
    server_api: Annotated[
        Literal["vllm", "sglang"] | None, typer.Option(help="openai: whose API it is. Default: vllm.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(help="openai: the teacher's name on the server. Default: the only model there.")
    ] = None,
    server_concurrency: Annotated[
        int | None, typer.Option(help="openai: requests at a time. Default: 8.", min=1)
    ] = None,
    server_timeout: Annotated[
        float | None, typer.Option(help="openai: seconds that one request may take. Default: 60.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens of prompts and answers in one batch; does not change labels.", min=1)
    ] = 4096,
    shard_rows: Annotated[
        int, typer.Option(help="Label rows per file; an interrupted run loses at most one file.", min=1)
    ] = 5000,
    src_lang: prompts.SourceLanguage = None,
    tgt_lang: prompts.TargetLanguage = None,
    teacher_dtype: Annotated[Dtype, typer.Option(help="Precision of the teacher.")] = "float32",
    teacher_quantization: Annotated[
        Quantization,
        typer.Option(help="Quantize the teacher's linear layers (bitsandbytes): approximate; the error is measured."),
    ] = "none",
    allow_bin: AllowBin = False,
    input_eos: prompts.InputEos = None,
    teacher_chat: prompts.TeacherChat = None,
    teacher_system_prompt: prompts.TeacherSystem = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of templates with random choices.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="i/n: make only every n-th shard, from shard i; combine with rlkd data merge.")
    ] = None,
    on_bad_row: Annotated[
        OnBadRow,
        typer.Option(help="Input rows that cannot be used: stop, or skip them and list them in bad_rows.jsonl."),
    ] = "fail",
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Skip prompts that print a missing value (None), not only count them."),
    ] = False,
    skip_unknown: Annotated[
        bool,
        typer.Option(
            "--skip-unknown", help="Skip prompts with characters that the tokenizer does not know, not only count them."
        ),
    ] = False,
    on_long: Annotated[
        OnLong, typer.Option(help="Prompts longer than max-input-tokens: cut them, stop, or skip them.")
    ] = "truncate",
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Continue an unfinished folder with changed settings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace labels already in the folder.")] = False,
) -> None:
    """Label inputs with a prompted teacher: parquet shards, a manifest and a data card.

    Repeat the command to continue an interrupted run. Exit codes: 4 finished, but some rows failed; 75 another process
    is writing to the folder, or the server does not answer; 130 and 143 stopped by a signal.
    """
    from . import labels

    request = labels.recorded(context.params)
    labels.run(request, out, overwrite=overwrite, allow_config_change=allow_config_change, quiet=quiet)


@app.command("export-onnx")
def export_onnx(
    model: Annotated[str, typer.Argument(help="A saved sequence classifier: a local folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write model.onnx, configuration and tokenizer to.")],
    tolerance: Annotated[
        float,
        typer.Option(
            help="Largest allowed difference between ONNX and PyTorch logits; if exceeded, nothing is written."
        ),
    ] = 1e-4,
    allow_bin: AllowBin = False,
) -> None:
    """Export a classifier to ONNX (any batch size and length) and check it against PyTorch."""
    from ..models.encoders.onnx_export import export_onnx

    agreement = export_onnx(model, out, tolerance=tolerance, allow_bin=allow_bin)
    typer.echo(f"{out / 'model.onnx'}: {agreement}")


def main(argv: list[str] | None = None) -> None:
    """Run `rlkd`; an error that the user can fix is one message on stderr and its exit code, without a traceback."""
    run_main(lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    """The command. Its usage errors repeat what was typed, and are redacted."""
    given = sys.argv[1:] if argv is None else argv
    # `config` checks settings alone.
    (refuse_remote_paths if given[:1] == ["config"] else refuse_missing_paths)(given)
    try:
        code = app(args=argv, prog_name="rlkd", standalone_mode=False)
    except UsageError as error:
        shown = StringIO()
        error.show(shown)
        print(redacted(shown.getvalue()), end="", file=sys.stderr)
        code = error.exit_code
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        code = 1
    raise SystemExit(code or 0)
