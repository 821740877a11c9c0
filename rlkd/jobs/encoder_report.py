"""Teacher and student compared: dev scores, size and speed, as a table and as summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, EvalPrediction

from ..data.labelled import EncodedTexts, model_inputs
from ..models.encoders.onnx_export import Agreement, export_onnx
from ..models.footprint import count_parameters, latency, megabytes
from ..models.loading import load_config, load_pretrained
from ..runs.files import SUMMARY_FILE
from .encoder_setup import EncoderSetup

BATCH_SIZES = (1, 32)
TIMED_SENTENCES = 32
TIMED_PASSES = 5


def compare_with_teacher(setup: EncoderSetup) -> dict[str, Any]:
    """Evaluate the saved student and its teacher, both loaded from disk as a user would; print a table and write
    summary.json to output_dir. To be called in the main process only, after training.

    Returns: the summary. Scores are those of float32 models on dev rows, on which the checkpoint was selected. Times
    are medians over interleaved passes, on dev sentences, without tokenization.
    """
    training, data = setup.training, setup.data
    folders = {"teacher": setup.teacher_folder, "student": str(training.output_dir)}
    tokenizers = {"teacher": setup.teacher_tokenizer, "student": setup.tokenizer}
    config = load_config(folders["student"], "student")
    student = load_pretrained(
        AutoModelForSequenceClassification, folders["student"], "student", config=config, dtype=torch.float32
    )
    models = {"teacher": setup.load_teacher(folders["teacher"]), "student": student}
    facts: dict[str, dict[str, Any]] = {}
    for role, model in models.items():
        model.eval().to(training.device)
        facts[role] = {
            "folder": folders[role],
            "layers": model.config.num_hidden_layers,
            "parameters": count_parameters(model),
            "megabytes": round(megabytes(model), 3),
            "scores": {split: _score(model, tokenizers[role], rows, setup) for split, rows in data.dev.items()},
            "ms_per_sentence": {},
        }
    timed = _spread(data.first_dev, TIMED_SENTENCES)
    for size in BATCH_SIZES:
        batches = {
            role: [model_inputs(batch) for batch in _batches(timed, tokenizers[role], setup, size)] for role in models
        }
        for role, milliseconds in latency(models, batches, TIMED_PASSES).items():
            facts[role]["ms_per_sentence"][f"batch_{size}"] = round(milliseconds, 4)
    summary = {
        "data": {"name": data.name, "train": len(data.train), "dev": {split: len(r) for split, r in data.dev.items()}},
        "dev_rows": data.note,
        "labels": list(data.labels),
        "preset": training.preset,
        "seed": training.seed,
        **facts,
        "timing": {
            "device": str(training.device),
            "threads": torch.get_num_threads(),
            "sentences": len(timed),
            "passes": TIMED_PASSES,
        },
    }
    if setup.student.export_onnx:
        onnx_folder = Path(folders["student"]) / "onnx"
        agreement = export_onnx(folders["student"], onnx_folder)
        summary["onnx"] = {"folder": str(onnx_folder), **agreement._asdict()}
    text = json.dumps(summary, indent=2) + "\n"
    (Path(folders["student"]) / SUMMARY_FILE).write_text(text, encoding="utf-8")
    show_summary(summary)
    return summary


def show_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a summary as a table, followed by the conditions of the measurement."""
    console = console or Console(width=100, highlight=False)
    teacher, student = summary["teacher"], summary["student"]
    table = Table(title=f"{summary['preset']} on {summary['data']['name']}", title_justify="left")
    for name in ("", "teacher", "student", "student / teacher"):
        table.add_column(name, justify="left" if not name else "right")

    def ratio(one: float, other: float) -> str:
        return f"{other / one:.3f}" if one else "-"

    for split, scores in teacher["scores"].items():
        for name, value in scores.items():
            if name == "score" and len(scores) == 2:
                continue  # the only metric
            other = student["scores"][split][name]
            table.add_row(f"{split} {name}", f"{value:.4f}", f"{other:.4f}", ratio(value, other))
    table.add_section()
    for label, name in (("layers", "layers"), ("parameters", "parameters"), ("size, MB", "megabytes")):
        one, other = teacher[name], student[name]
        table.add_row(
            label, *(f"{n:,.2f}" if name == "megabytes" else f"{n:,}" for n in (one, other)), ratio(one, other)
        )
    for name, one in teacher["ms_per_sentence"].items():
        other = student["ms_per_sentence"][name]
        table.add_row(f"ms a sentence, {name.replace('_', ' ')}", f"{one:.3f}", f"{other:.3f}", ratio(one, other))
    console.print(table)
    timing = summary["timing"]
    console.print(f"dev rows: {summary['dev_rows']}; the checkpoints were selected on them", soft_wrap=True)
    console.print(
        f"times: {timing['device']}, {timing['threads']} threads, {timing['sentences']} dev sentences, float32, median "
        f"of {timing['passes']} interleaved passes, without tokenization",
        soft_wrap=True,
    )
    if "onnx" in summary:
        onnx = dict(summary["onnx"])
        console.print(f"ONNX: {onnx.pop('folder')}, {Agreement(**onnx)}", soft_wrap=True)
    console.print(
        f"student: {student['folder']} (AutoModelForSequenceClassification), teacher: {teacher['folder']}",
        soft_wrap=True,
    )


def _batches(rows: list[dict[str, Any]], tokenizer: Any, setup: EncoderSetup, size: int) -> Iterator[dict[str, Tensor]]:
    texts = EncodedTexts(rows, tokenizer, setup.training.max_length, len(setup.data.labels))
    for start in range(0, len(texts), size):
        batch = texts.collate([texts[i] for i in range(start, min(start + size, len(texts)))])
        yield {name: tensor.to(setup.training.device) for name, tensor in batch.items()}


@torch.inference_mode()
def _score(model: Any, tokenizer: Any, rows: list[dict[str, Any]], setup: EncoderSetup) -> dict[str, float]:
    logits, labels = [], []
    for batch in _batches(rows, tokenizer, setup, setup.training.per_device_eval_batch_size):
        logits.append(model(**model_inputs(batch)).logits.float().cpu())
        labels.append(batch["labels"].cpu())
    return setup.data.compute_metrics()(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly spaced."""
    step = max(len(rows) / count, 1)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
