"""Teacher and student compared: dev scores, size and speed, as a table and as summary.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import EvalPrediction

from ..checks import OUTSIDE
from ..choices import ProblemType
from ..data.labelled import LABELS, EncodedTexts, model_inputs, stacked_labels
from ..data.words import EncodedWords, encoded_rows, label_logits
from ..evaluation.class_facts import class_facts, constant_prediction
from ..evaluation.classes import commonest, in_words, one_class_warning
from ..evaluation.problems import PROBLEMS, classified_rows
from ..io.files import write_text
from ..metrics import held_out
from ..models.encoders.labels import head_for
from ..models.encoders.onnx_export import Agreement, export_onnx
from ..models.footprint import count_parameters, latency, megabytes
from ..runs.files import SUMMARY_FILE
from ..tensors import pad_stack
from .encoder_label_folder import agreement, commonest_guess
from .encoder_setup import EncoderSetup, load_saved_student

BATCH_SIZES = (1, 32)
TIMED_SENTENCES = 32
TIMED_PASSES = 5
CONSTANTS: dict[ProblemType, str] = {
    "single_label_classification": "the commonest training label",
    "multi_label_classification": "the commonest set of training labels",
    "regression": "the mean of the training numbers",
    "token_classification": "the commonest tag of training words",
}
LEFT_OUT: dict[ProblemType, str] = {
    "multi_label_classification": "no confusion matrix and no calibration error: a row has any number of labels",
    "regression": "no scores of each label, no confusion matrix and no calibration error: the labels are numbers",
    "token_classification": "no confusion matrix and no calibration error: an entity is several words",
}
SHOWN_LABELS = 10  # of a confusion matrix; more do not fit a screen, and are in summary.json


def compare_with_teacher(setup: EncoderSetup) -> dict[str, Any]:
    """Evaluate the saved student and its teacher, both loaded from disk as a user would; print a table and write
    summary.json to output_dir. To be called in the main process only, after training.

    Returns: the summary. Scores are those of float32 models on dev rows, on which the checkpoint was selected, and on
    test rows; `majority` has those of a constant (the commonest training label or set of labels, the mean of the
    training numbers) for every row, `constant` what a model itself gives every row, `classes` the scores of each label,
    `confusion` rows by true and predicted label, `ece` the calibration error; those that a problem does not have are
    empty, and named on the screen; of words, `classes` has each type of entity, and `unread` the words that the model
    does not read. A teacher of which there are only
    labels is `labels_of_teacher`: their accuracy on the training rows with a gold label. Times are
    medians over interleaved passes, on dev sentences, without tokenization.
    """
    training, data = setup.training, setup.data
    folders = {"teacher": setup.teacher_folder, "student": str(training.output_dir)}
    tokenizers = {"teacher": setup.teacher_tokenizer, "student": setup.tokenizer}
    models = _models(setup, folders)
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
    timed = spread_rows(data.first_dev, TIMED_SENTENCES)
    for size in BATCH_SIZES:
        batches = {
            role: [model_inputs(batch) for batch in _batches(timed, tokenizers[role], setup, size)] for role in models
        }
        for role, milliseconds in latency(models, batches, TIMED_PASSES).items():
            facts[role]["ms_per_sentence"][f"batch_{size}"] = round(milliseconds, 4)
    summary = {
        "data": {
            "name": data.name,
            "train": len(data.train),
            **{
                kind: {split: len(rows) for split, rows in held_out.items()}
                for kind, held_out in (("dev", data.dev), ("test", data.test))
                if held_out
            },
        },
        "dev_rows": data.note,
        "labels": list(data.labels),
        "problem_type": data.problem_type,
        "preset": training.preset,
        "seed": training.seed,
        "majority": _majority(setup),
        **facts,
        **_said_by_labels(setup),
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


def _models(setup: EncoderSetup, folders: dict[str, str]) -> dict[str, Any]:
    """Teacher, if there is one, and student as they are on disk."""
    teacher = {"teacher": setup.load_teacher(folders["teacher"])} if "teacher" in setup.roles else {}
    return teacher | {"student": load_saved_student(folders["student"])}


def _said_by_labels(setup: EncoderSetup) -> dict[str, Any]:
    """What there is of the teacher or of assistants besides: where they are, and how good labels are."""
    found: dict[str, Any] = {}
    if setup.student.assistant_layers:
        count = len(setup.student.assistant_layers)
        found["assistants"] = [f"{setup.training.output_dir}/assistant-{k}" for k in range(1, count + 1)]
    if setup.data.recorded:
        right = agreement(setup.data.train)
        found["labels_of_teacher"] = {"rows": right[1], "accuracy": right[0]} if right else {"rows": 0}
    return found


def show_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a summary as tables, followed by warnings and the conditions of the measurement."""
    console = console or Console(width=100, highlight=False)
    student, majority = summary["student"], summary["majority"]
    models = [summary[role] for role in ("teacher", "student") if role in summary]
    table = Table(title=f"{summary['preset']} on {summary['data']['name']}", title_justify="left")
    ratios = len(models) == 2
    for name in ("", "majority", *(("teacher",) if ratios else ()), "student", *(("student / teacher",) * ratios)):
        table.add_column(name, justify="left" if not name else "right")

    def row(label: str, base: str, values: list[float], form: str, compare: bool = True) -> None:
        one, other = values[0], values[-1]
        ratio = [f"{other / one:.3f}" if compare and one else "-"] if ratios else []
        table.add_row(label, base, *(format(value, form) for value in values), *ratio)

    constant = any(facts["constant"][split] for facts in models for split in facts["scores"])
    for split, scores in student["scores"].items():
        for name in scores:
            if name == "score" and len(scores) == 2:
                continue  # the only metric
            base, values = majority["scores"][split][name], [facts["scores"][split][name] for facts in models]
            # A ratio to a teacher that is no better than a constant says nothing of the student.
            better = values[0] < base if held_out(name).lower_is_better else values[0] > base
            row(f"{split} {name}", f"{base:.4f}", values, ".4f", not constant and better)
        if all(split in facts.get("ece", ()) for facts in models):
            row(f"{split} calibration error", "", [facts["ece"][split] for facts in models], ".4f", False)
    table.add_section()
    for label, name in (("layers", "layers"), ("parameters", "parameters"), ("size, MB", "megabytes")):
        row(label, "", [facts[name] for facts in models], ",.2f" if name == "megabytes" else ",")
    for name in student["ms_per_sentence"]:
        times = [facts["ms_per_sentence"][name] for facts in models]
        row(f"ms a sentence, {name.replace('_', ' ')}", "", times, ".3f")
    console.print(table)
    _show_classes(summary, console)
    for line in warnings_of(summary):
        console.print(f"WARNING: {line}", soft_wrap=True, markup=False)
    kind = summary.get("problem_type", "single_label_classification")
    _show_conditions(summary, kind, console)


def _show_conditions(summary: dict[str, Any], kind: ProblemType, console: Console) -> None:
    """How the numbers came about, and where the models are."""
    student, majority = summary["student"], summary["majority"]
    every = "word" if PROBLEMS[kind].of_words else "row"
    console.print(
        f"majority: '{majority['label']}', {CONSTANTS[kind]}, for every {every}", soft_wrap=True, markup=False
    )
    if left_out := LEFT_OUT.get(kind):
        console.print(left_out, soft_wrap=True)
    for role in ("teacher", "student"):
        for split, unread in summary.get(role, {}).get("unread", {}).items():
            console.print(
                f"{split}, {role}: {unread['unread']} of {unread['words']} words are not read (beyond max_length, or "
                f"without a token), and are predicted as {OUTSIDE}",
                soft_wrap=True,
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
    if "labels_of_teacher" in summary:
        console.print(f"teacher: {_in_words(summary['labels_of_teacher'])}", soft_wrap=True)
    teacher = f", teacher: {summary['teacher']['folder']}" if "teacher" in summary else ""
    loads = f"AutoModel{head_for(kind)}"
    console.print(f"student: {student['folder']} ({loads}){teacher}", soft_wrap=True)


def _in_words(labels: dict[str, Any]) -> str:
    if not labels["rows"]:
        return "labels, of rows without gold labels"
    return f"labels, right for {labels['accuracy']:.1%} of {labels['rows']} training rows with a gold label"


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """What makes the scores of a summary say less than they seem to: models that are no better than a constant."""
    lines, base = [], summary["majority"]["scores"]
    kind = summary.get("problem_type", "single_label_classification")
    unit = "word" if PROBLEMS[kind].of_words else "row"
    for role in ("teacher", "student"):
        facts = summary.get(role, {"scores": {}})
        for split, scores in facts["scores"].items():
            where = f"the {role}" if len(facts["scores"]) == 1 else f"the {role} ({split})"
            if said := facts["constant"][split]:
                lines.append(one_class_warning(where, said["label"], said["rows"], f"{unit}s"))
            elif kind != "single_label_classification" and scores["score"] <= base[split]["score"]:
                lines.append(
                    f"{where} has a score of {scores['score']:.4f}, {CONSTANTS[kind]} for every {unit} "
                    f"{base[split]['score']:.4f}: it has not learned the task."
                )
            elif kind == "single_label_classification" and scores["accuracy"] <= base[split]["accuracy"]:
                lines.append(
                    f"{where} is right for {scores['accuracy']:.1%} of the dev rows, the commonest label alone for "
                    f"{base[split]['accuracy']:.1%}: it has not learned the task, or its labels are in another order."
                )
    return lines


def _show_classes(summary: dict[str, Any], console: Console) -> None:
    roles = [role for role in ("teacher", "student") if role in summary]
    words = summary.get("problem_type") == "token_classification"
    what, each = ("entities", "each type of entity") if words else ("rows", "each label")
    for split, own in summary["student"]["classes"].items():
        table = Table(title=f"{split}, {each}", title_justify="left")
        for name in ("", what, *(column for role in roles for column in (f"{role}: predicted", "recall", "F1"))):
            table.add_column(name, justify="left" if not name else "right")
        for k, mine in enumerate(own):
            found = [summary[role]["classes"][split][k] for role in roles]
            cells = [cell for c in found for cell in (str(c["predicted"]), f"{c['recall']:.3f}", f"{c['f1']:.3f}")]
            table.add_row(escape(mine["label"]), str(mine["rows"]), *cells)
        console.print(table)
        if (matrix := summary["student"].get("confusion", {}).get(split)) and len(own) <= SHOWN_LABELS:
            console.print(f"{split}, student: rows by true label (down) and predicted label", soft_wrap=True)
            table = Table()
            for name in ("", *(escape(one["label"]) for one in own)):
                table.add_column(name, justify="left" if not name else "right")
            for one, counts in zip(own, matrix, strict=True):
                table.add_row(escape(one["label"]), *map(str, counts))
            console.print(table)


def _batches(rows: list[dict[str, Any]], tokenizer: Any, setup: EncoderSetup, size: int) -> Iterator[dict[str, Tensor]]:
    yield from _batched(_encoded(rows, tokenizer, setup), setup, size)


def _encoded(rows: list[dict[str, Any]], tokenizer: Any, setup: EncoderSetup) -> EncodedTexts:
    data = setup.data
    return encoded_rows(rows, tokenizer, setup.training.max_length, len(data.labels), data.problem_type)


def _batched(texts: EncodedTexts, setup: EncoderSetup, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), size):
        batch = texts.collate([texts[i] for i in range(start, min(start + size, len(texts)))])
        yield {name: tensor.to(setup.training.device) for name, tensor in batch.items()}


@torch.inference_mode()
def _evaluated(model: Any, tokenizer: Any, setup: EncoderSetup) -> dict[str, Any]:
    """Scores of every dev and test split, and of each label in it."""
    found: dict[str, Any] = {"scores": {}, "constant": {}, "classes": {}, "confusion": {}, "ece": {}}
    kind, names = setup.data.problem_type, setup.data.labels
    for split, rows in setup.data.held_out.items():
        texts = _encoded(rows, tokenizer, setup)
        batches = _batched(texts, setup, setup.training.per_device_eval_batch_size)
        outputs = pad_stack([row for batch in batches for row in label_logits(model, batch, names).cpu()]).numpy()
        true = texts.true
        found["scores"][split] = setup.data.compute_metrics()(EvalPrediction(outputs, true))
        rated = classified_rows(PROBLEMS[kind].predict(outputs), true, [row["text"] for row in rows], kind, names)
        found["constant"][split] = constant_prediction(rated, names, kind)
        for name, fact in class_facts(outputs, true, names, kind).items():
            found[name][split] = fact
        if isinstance(texts, EncodedWords):
            found.setdefault("unread", {})[split] = {"unread": sum(texts.unread), "words": sum(map(len, texts.words))}
    return found


def _majority(setup: EncoderSetup) -> dict[str, Any]:
    """The best constant of the training labels (of the teacher's, without gold ones), and its scores for every held-out
    row.
    """
    data, kind = setup.data, setup.data.problem_type
    gold = [row["label"] for row in data.train if row["label"] is not None]
    if kind == "regression":
        label: Any = float(np.mean(gold))
    elif kind == "multi_label_classification":
        sets = Counter(tuple(sorted(one)) for one in gold)
        label = list(sorted(sets.items(), key=lambda item: (-item[1], item[0]))[0][0])
    elif kind == "token_classification":
        label = commonest([tag for tags in gold for tag in tags] or [data.labels.index(OUTSIDE)])
    else:
        label = commonest(gold) if gold else commonest_guess(data.train)
    count, own = len(data.labels), LABELS[kind]
    scores = {}
    for split, rows in data.held_out.items():
        constant = [[label] * len(row["label"]) if kind == "token_classification" else label for row in rows]
        true, guess = (
            stacked_labels([own(0, one, count) for one in of], kind).numpy()
            for of in ([row["label"] for row in rows], constant)
        )
        outputs = PROBLEMS[kind].outputs(guess, count)
        scores[split] = data.compute_metrics()(EvalPrediction(outputs, true))
    return {"label": in_words(label, data.labels), "scores": scores}


def spread_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly spaced."""
    step = max(len(rows) / count, 1)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
