"""What `rlkd generate-pseudolabels` does, from a request: its options as JSON-able values, kept in the manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from ..data.examples import PromptedRows, RowRenderer
from ..data.row_maps import parse_row_map
from ..data.rows import RowStream
from ..errors import ConfigError
from ..io.lock import writer_lock
from ..labels.card import summary
from ..labels.folder import check_output
from ..labels.maintenance import part_of
from ..labels.manifest import manifest_name
from ..labels.pseudolabels import RunOptions, label_rows
from ..models.teacher import Teacher
from ..sampling.engines.protocol import Decoding, Engine
from ..sampling.engines.registry import make_engine
from ..sampling.engines.torch_engine import TorchEngine
from ..templates.template import load_templates

# How the command is run, not what it makes.
NOT_IN_REQUEST = ("out", "overwrite", "allow_config_change", "quiet")
FINISHED_WITH_FAILED_ROWS = 4


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """The request of a command line: plain values, and the folder that relative paths start from."""
    plain = {name: str(value) if isinstance(value, (Path, str)) else value for name, value in options.items()}
    return plain | {"folder": os.getcwd()}


def label(
    request: dict[str, Any],
    out: Path,
    *,
    overwrite: bool = False,
    allow_config_change: bool = False,
    quiet: bool = False,
) -> None:
    """Label as asked and print a summary. Checks come in order of cost: settings and folder, the teacher's
    configuration and tokenizer, templates, rows; weights load last.

    Raises: what `label_rows` raises; typer.Exit(4) if rows failed.
    """
    decoding = _decoding(request)
    part = part_of(request["shard"]) if request["shard"] else None
    manifest = check_output(out, overwrite=overwrite, part=part)
    tokenizer, valid_vocab = check_teacher(request["teacher"], request["teacher_dtype"])
    earlier = manifest.header["scan"] if manifest.headers else None
    source = source_of(request, earlier)
    options = RunOptions(
        seed=request["seed"],
        on_long=request["on_long"],
        batch_tokens=request["batch_tokens"],
        shard_rows=request["shard_rows"],
        part=part,
        overwrite=overwrite,
        allow_config_change=allow_config_change,
        quiet=quiet,
        request=request,
    )
    # A second writer is turned away before it loads the weights.
    with writer_lock(out / manifest_name(part)) as lock:
        quantization = request["teacher_quantization"]
        teacher = load_teacher(request, tokenizer, valid_vocab, quantization)
        engine = make_engine(request["engine"], teacher.lm, decoding, compute_type=request["compute_type"] or None)

        def full_precision() -> Engine:
            exact = teacher if quantization == "none" else load_teacher(request, tokenizer, valid_vocab, "none")
            return TorchEngine(exact.lm, exact.batch_tokens)

        totals = label_rows(
            teacher, source, out=out, decoding=decoding, options=options, engine=engine,
            reference=full_precision, lock=lock,
        )  # fmt: skip
    if not quiet:
        typer.echo(f"{summary(totals)}\n{out}")
    if totals["status"]["failed"]:
        raise typer.Exit(FINISHED_WITH_FAILED_ROWS)


def _decoding(request: dict[str, Any]) -> Decoding | None:
    """How answers are decoded; None if choices are ranked."""
    settings = {name: request[name] for name in ("labels_per_input", "num_beams", "temperature", "top_k_logprobs")}
    if request["strategy"] != "rank":
        return Decoding(request["strategy"], request["max_new_tokens"], **settings)
    if settings["labels_per_input"] > 1 or settings["top_k_logprobs"]:
        raise ConfigError(
            "strategy = 'rank' gives one label and its choices' scores: leave out labels_per_input, top_k."
        )
    return None


def source_of(request: dict[str, Any], earlier: dict[str, Any] | None) -> PromptedRows:
    folder = Path(request["templates_dir"]) if request["templates_dir"] else None
    reading = {name: request[name] for name in ("all_templates", "gold_input", "truncation", "strict_compat")}
    specs = request["templates"] or []
    chosen = [template for spec in specs for template in load_templates(spec, folder=folder, **reading)]
    row_map = parse_row_map(request["column_map"] or [], request["label_map"] or [])
    stream = RowStream(
        request["dataset"],
        split=request["split"],
        subset=request["subset"],
        limit=request["limit"],
        on_bad_row=request["on_bad_row"],
    )
    render = RowRenderer(
        tuple(chosen),
        student_column=request["input_column"],
        reference_column=request["reference_column"],
        id_column=request["id_column"],
        seed=request["seed"],
        with_choices=request["strategy"] == "rank",
    )
    return PromptedRows(stream, render, row_map=row_map, earlier=earlier)


def check_teacher(name: str, dtype: str) -> tuple[Any, int]:
    """The tokenizer and the number of its ids, if the configuration can be a teacher's; no weights load."""
    from ..models.loading import check_config, load_config, resolve_dtype
    from ..models.vocabulary import check_vocabulary_fits, load_tokenizer, valid_vocab

    config = load_config(name, "teacher")
    check_config(config, "teacher", name, resolve_dtype(dtype, "teacher_dtype"))
    tokenizer = load_tokenizer(name, "teacher")
    size = valid_vocab(tokenizer)
    check_vocabulary_fits(config, size, "teacher", name)
    return tokenizer, size


def load_teacher(request: dict[str, Any], tokenizer: Any, valid_vocab: int, quantization: str) -> Teacher:
    import torch

    from ..models import loading
    from ..models.encoder_decoder import EncoderDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = loading.quantization_config(quantization)
    model = loading.load_encoder_decoder(
        request["teacher"], "teacher", dtype=request["teacher_dtype"], quantization=settings
    )
    return Teacher(
        # bitsandbytes places its weights itself.
        EncoderDecoder(model.to(device) if settings is None else model, valid_vocab),
        tokenizer,
        max_input_tokens=request["max_input_tokens"],
        append_eos=request["input_eos"],
    )
