"""`rlkd merge-adapter` and `rlkd export`, and the option that commands which load models share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..models.spec import Dtype
from . import prompts

AllowBin = Annotated[
    bool,
    typer.Option(
        "--allow-bin", help="Load pickled weights (.bin, with weights_only) where a model has no safetensors."
    ),
]


def merge_adapter(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter, as a run with use_peft saves it: folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model and its tokenizer to.")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of the merged weights.")] = "float32",
    allow_bin: AllowBin = False,
) -> None:
    """Merge an adapter into its base model: a plain model that any program reads."""
    from ..models.saving import merge_adapter

    merge_adapter(adapter, out, dtype=dtype, allow_bin=allow_bin)
    typer.echo(out)


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A saved student, generating or classifying, or an adapter.")],
    to: Annotated[
        Literal["ctranslate2", "onnx"], typer.Option(help="ctranslate2: models that generate. onnx: classifiers.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model, its tokenizer and its card.")],
    quantization: Annotated[
        Literal["int8", "float32"], typer.Option(help="ctranslate2: int8 is smaller, faster and approximate.")
    ] = "int8",
    dataset: Annotated[
        str | None,
        typer.Option(
            *prompts.ROWS, help="Rows to compare with PyTorch on. Default: the held-out ones of the student's run."
        ),
    ] = None,
    input_column: Annotated[str | None, typer.Option(help="Their column that the student reads.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")] = "train",
    limit: Annotated[int, typer.Option(help="Compare on the first N rows.", min=1)] = 200,
    student_template: Annotated[
        str | None, typer.Option(help="One template for what the student reads. Default: that of its run.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure the size and speed of this teacher.")] = None,
    teacher_dtype: Annotated[Dtype, typer.Option(help="Precision of the teacher.")] = "float32",
    templates: Annotated[list[str] | None, typer.Option(help="What the teacher reads; repeatable.")] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of a prompt, in tokens. Default: that of the run, or 512.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of an answer, in tokens. Default: that of the run, or 64.", min=1)
    ] = None,
    allow_bin: AllowBin = False,
) -> None:
    """Export a student to a format that serves fast, and measure how far its answers, size and speed differ.

    An adapter is merged first. What CTranslate2 cannot express is refused by name.
    """
    if to == "onnx":
        _export_classifier(context, model, out, allow_bin)
        return
    from ..jobs.export import export as run
    from ..jobs.export_card import numbers

    forms = run(context.params, out)
    from rich.console import Console
    from rich.table import Table

    shown = Table("", "MB", "tokens / s", "equal answers", "equal tokens")
    for form in forms:
        shown.add_row(form.name, *numbers(form))
    console = Console(width=100, highlight=False)
    console.print(shown)
    console.print(f"{out}: README.md has a program that serves it", soft_wrap=True, markup=False)


def _export_classifier(context: typer.Context, model: str, out: Path, allow_bin: bool) -> None:
    """As `rlkd export-onnx`. Raises ConfigError for options of generating models."""
    from ..errors import ConfigError
    from ..models.encoders.onnx_export import export_onnx

    given = [name for name in context.params if name not in ("model", "to", "out", "allow_bin")]
    given = [name for name in given if context.get_parameter_source(name).name != "DEFAULT"]  # type: ignore[union-attr]
    if given:
        flag = given[0].replace("_", "-")
        raise ConfigError(f"--{flag} has no effect with --to onnx: leave it out.")
    typer.echo(f"{out / 'model.onnx'}: {export_onnx(model, out, allow_bin=allow_bin)}")
