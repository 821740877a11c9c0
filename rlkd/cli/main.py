"""The command `rlkd`. Commands import what they run when they run, so that `--help` stays fast and needs no torch."""

from __future__ import annotations

import logging
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import run_main
from . import prompts

if TYPE_CHECKING:
    from ..models.teacher import Teacher

app = typer.Typer(
    name="rlkd",
    help="Distil a prompted teacher into a small student by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "dataset[/subset]" is no markup
)
app.add_typer(prompts.app, name="prompts")


class Strategy(StrEnum):
    greedy = "greedy"
    beam = "beam"
    sample = "sample"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rlkd").setLevel(logging.INFO)


@app.command("generate-pseudolabels")
def generate_pseudolabels(
    teacher: Annotated[str, typer.Option(help="Teacher: a local folder or a hub id.")],
    dataset: Annotated[
        str, typer.Option(help="A .jsonl/.json/.csv/.tsv/.parquet file, a folder of parquet, or a hub id.")
    ],
    input_column: Annotated[str, typer.Option(help="Column with the raw input, which the student reads.")],
    out: Annotated[Path, typer.Option(help="Folder to write shards and manifest.json to.")],
    templates: Annotated[
        list[str] | None,
        typer.Option(
            help="dataset[/subset][:name] or file.yaml[:name]; repeatable. None: the teacher reads the raw input."
        ),
    ] = None,
    templates_dir: Annotated[
        Path | None, typer.Option(help="Folder of templates. Default: ./prompts, then those shipped with rlkd.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use the first N rows.", min=1)] = None,
    reference_column: Annotated[
        str | None, typer.Option(help="Column with human answers, kept for evaluation.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column with unique ids. Default: the row number.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="How answers are decoded.")] = Strategy.greedy,
    labels_per_input: Annotated[int, typer.Option(help="Labels per input and template (sample, beam).")] = 1,
    num_beams: Annotated[int, typer.Option(help="Beams (beam only).")] = 4,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (sample only).")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Prompts are cut to this.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Answers decoded together; changes no label.", min=1)] = 16,
    shard_rows: Annotated[
        int, typer.Option(help="Rows per file; an interrupted run loses one file at most.", min=1)
    ] = 5000,
    teacher_dtype: Annotated[Dtype, typer.Option(help="Precision of the teacher.")] = Dtype.float32,
    input_eos: Annotated[bool, typer.Option(help="End inputs with end-of-sequence. T0: --no-input-eos.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of templates that draw at random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace labels already in the folder.")] = False,
) -> None:
    """Label inputs with a prompted teacher; writes parquet shards and, last, manifest.json."""
    # Checks in order of cost: settings and folder, the teacher's configuration and tokenizer, rows, templates; weights.
    from ..generation import pseudolabels
    from ..generation.engines import Decoding
    from ..generation.label_store import check_output

    Decoding(strategy.value, max_new_tokens, labels_per_input, num_beams, temperature)
    if not overwrite:
        check_output(out, overwrite=False)

    from ..data.examples import Examples
    from ..data.prompts import load_templates
    from ..data.rows import load_rows

    tokenizer, valid_vocab = _check_teacher(teacher, teacher_dtype.value)
    chosen = [template for spec in templates or [] for template in load_templates(spec, folder=templates_dir)]
    examples = Examples(
        load_rows(dataset, split=split, subset=subset, limit=limit),
        chosen,
        student_column=input_column,
        reference_column=reference_column,
        id_column=id_column,
        source=dataset,
        seed=seed,
    )
    manifest = pseudolabels.generate_pseudolabels(
        _load_teacher(teacher, tokenizer, valid_vocab, teacher_dtype.value, max_input_tokens, input_eos),
        examples,
        out=out,
        strategy=strategy.value,
        template_names=examples.template_names,
        labels_per_input=labels_per_input,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        shard_rows=shard_rows,
        seed=seed,
        overwrite=overwrite,
    )
    typer.echo(f"{manifest['rows']} labels in {len(manifest['shards'])} shards, {manifest['seconds']} s: {out}")


def _check_teacher(name: str, dtype: str) -> tuple[Any, int]:
    """The tokenizer and the number of its ids, if the configuration can be a teacher's; no weights load."""
    from ..models.architectures import check_config, load_config, resolve_dtype
    from ..models.vocabulary import check_vocabulary_fits, load_tokenizer

    config = load_config(name, "teacher")
    check_config(config, "teacher", name, resolve_dtype(dtype, "teacher_dtype"))
    tokenizer = load_tokenizer(name, "teacher")
    valid_vocab = max(tokenizer.get_vocab().values()) + 1
    check_vocabulary_fits(config, valid_vocab, "teacher", name)
    return tokenizer, valid_vocab


def _load_teacher(
    name: str, tokenizer: Any, valid_vocab: int, dtype: str, max_input_tokens: int, append_eos: bool
) -> Teacher:
    import torch

    from ..models.architectures import EncoderDecoder, load_encoder_decoder
    from ..models.teacher import Teacher

    model = load_encoder_decoder(name, "teacher", dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    return Teacher(
        EncoderDecoder(model, valid_vocab), tokenizer, max_input_tokens=max_input_tokens, append_eos=append_eos
    )


def main(argv: list[str] | None = None) -> None:
    """Run `rlkd`; an error the user can mend is one message on stderr and its exit code, without a traceback."""
    run_main(lambda: app(args=argv, prog_name="rlkd"))
