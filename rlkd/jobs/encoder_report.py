"""Teacher and student compared: dev scores, size and speed, as a table and as summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, EvalPrediction

from ..data.labelled import EncodedTexts, model_inputs
from ..evaluation.classes import class_scores, commonest, one_class_warning
from ..io.files import write_text
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

    Returns: the summary. Scores are those of float32 models on dev rows, on which the checkpoint was selected;
    `majority` has those of the commonest training label, predicted for every row, and `classes` those of each label.
    Times are medians over interleaved passes, on dev sentences, without tokenization.
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
            **_evaluated(model, tokenizers[role], setup),
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
        "majority": _majority(setup),
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
    write_text(Path(folders["student"]) / SUMMARY_FILE, text)
    show_summary(summary)
    return summary


def show_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a summary as tables, followed by warnings and the conditions of the measurement."""
    console = console or Console(width=100, highlight=False)
    teacher, student, majority = summary["teacher"], summary["student"], summary["majority"]
    table = Table(title=f"{summary['preset']} on {summary['data']['name']}", title_justify="left")
    for name in ("", "majority", "teacher", "student", "student / teacher"):
        table.add_column(name, justify="left" if not name else "right")

    def ratio(one: float, other: float) -> str:
        return f"{other / one:.3f}" if one else "-"

    constant = any(_constant(facts, split) for facts in (teacher, student) for split in facts["scores"])
    for split, scores in teacher["scores"].items():
        for name, value in scores.items():
            if name == "score" and len(scores) == 2:
                continue  # the only metric
            other, base = student["scores"][split][name], majority["scores"][split][name]
            # A ratio to a teacher that is no better than a constant says nothing of the student.
            share = "-" if constant or value <= base else ratio(value, other)
            table.add_row(f"{split} {name}", f"{base:.4f}", f"{value:.4f}", f"{other:.4f}", share)
    table.add_section()
    for label, name in (("layers", "layers"), ("parameters", "parameters"), ("size, MB", "megabytes")):
        one, other = teacher[name], student[name]
        table.add_row(
            label, "", *(f"{n:,.2f}" if name == "megabytes" else f"{n:,}" for n in (one, other)), ratio(one, other)
        )
    for name, one in teacher["ms_per_sentence"].items():
        other = student["ms_per_sentence"][name]
        table.add_row(f"ms a sentence, {name.replace('_', ' ')}", "", f"{one:.3f}", f"{other:.3f}", ratio(one, other))
    console.print(table)
    _show_classes(summary, console)
    for line in warnings_of(summary):
        console.print(f"WARNING: {line}", soft_wrap=True, markup=False)
    console.print(
        f"majority: '{majority['label']}', the commonest training label, for every row", soft_wrap=True, markup=False
    )
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


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """What makes the scores of a summary say less than they seem to: models that are no better than a constant."""
    lines, base = [], summary["majority"]["scores"]
    for role in ("teacher", "student"):
        facts = summary[role]
        for split, scores in facts["scores"].items():
            where = f"the {role}" if len(facts["scores"]) == 1 else f"the {role} ({split})"
            if label := _constant(facts, split):
                rows = sum(one["rows"] for one in facts["classes"][split])
                lines.append(one_class_warning(where, label, rows))
            elif scores["accuracy"] <= base[split]["accuracy"]:
                lines.append(
                    f"{where} is right for {scores['accuracy']:.1%} of the dev rows, the commonest label alone for "
                    f"{base[split]['accuracy']:.1%}: it has not learned the task, or its labels are in another order."
                )
    return lines


def _constant(facts: dict[str, Any], split: str) -> str:
    """The label that a model predicts for every row of a split; empty if it predicts several."""
    predicted = [one["label"] for one in facts["classes"][split] if one["predicted"]]
    return predicted[0] if len(predicted) == 1 else ""


def _show_classes(summary: dict[str, Any], console: Console) -> None:
    for split, own in summary["student"]["classes"].items():
        table = Table(title=f"{split}, each label", title_justify="left")
        for name in ("", "rows", "teacher: predicted", "recall", "F1", "student: predicted", "recall", "F1"):
            table.add_column(name, justify="left" if not name else "right")
        for theirs, mine in zip(summary["teacher"]["classes"][split], own, strict=True):
            cells = [(str(c["predicted"]), f"{c['recall']:.3f}", f"{c['f1']:.3f}") for c in (theirs, mine)]
            table.add_row(escape(mine["label"]), str(mine["rows"]), *cells[0], *cells[1])
        console.print(table)


def _batches(rows: list[dict[str, Any]], tokenizer: Any, setup: EncoderSetup, size: int) -> Iterator[dict[str, Tensor]]:
    texts = EncodedTexts(rows, tokenizer, setup.training.max_length, len(setup.data.labels))
    for start in range(0, len(texts), size):
        batch = texts.collate([texts[i] for i in range(start, min(start + size, len(texts)))])
        yield {name: tensor.to(setup.training.device) for name, tensor in batch.items()}


@torch.inference_mode()
def _evaluated(model: Any, tokenizer: Any, setup: EncoderSetup) -> dict[str, Any]:
    """Scores of every dev split, and of each label in it."""
    found: dict[str, Any] = {"scores": {}, "classes": {}}
    for split, rows in setup.data.dev.items():
        logits, labels = [], []
        for batch in _batches(rows, tokenizer, setup, setup.training.per_device_eval_batch_size):
            logits.append(model(**model_inputs(batch)).logits.float().cpu())
            labels.append(batch["labels"].cpu())
        prediction = EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy())
        found["scores"][split] = setup.data.compute_metrics()(prediction)
        guesses, true = torch.cat(logits).argmax(-1).tolist(), torch.cat(labels).tolist()
        found["classes"][split] = [asdict(one) for one in class_scores(guesses, true, setup.data.labels)]
    return found


def _majority(setup: EncoderSetup) -> dict[str, Any]:
    """The commonest training label and the scores of predicting it for every dev row."""
    data = setup.data
    label = commonest([row["label"] for row in data.train if row["label"] is not None])
    scores = {}
    for split, rows in data.dev.items():
        true = np.array([-1 if row["label"] is None else row["label"] for row in rows])
        constant = np.tile(np.eye(len(data.labels))[label], (len(rows), 1))
        scores[split] = data.compute_metrics()(EvalPrediction(constant, true))
    return {"label": data.labels[label], "scores": scores}


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly spaced."""
    step = max(len(rows) / count, 1)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
