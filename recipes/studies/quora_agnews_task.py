"""Data and metrics of the study: Quora paraphrases and AG News topics, split so that no stage sees another's rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import T5Config, T5ForConditionalGeneration

from rlkd import (
    TASK_METRICS,
    ConfigError,
    Example,
    Examples,
    load_rows,
    load_templates,
    supervised_pairs,
)

TASKS = {"quora": "quora_para", "agnews": "agnews_names"}
INPUT = {"quora": "source", "agnews": "text"}
REFERENCE = {"quora": "target", "agnews": "label"}


def load_splits(folder: Path, sizes: dict[str, Any]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows of both tasks: teacher | unlabeled | validation, from train by input text, and test.

    A question with several paraphrases is in one part only. Test questions that occur in train are removed.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"data = {str(folder)!r} is not a folder: pass --data FOLDER that holds quora_para and agnews"
        )
    splits = {}
    for task, name in (("quora", "quora_para"), ("agnews", "agnews")):
        train, test = (_rows(folder / name / f"{part}.jsonl", task, sizes) for part in ("train", "test"))
        known = {row[INPUT[task]] for row in train}
        train, test = _short(train, task, sizes), _short(test, task, sizes)
        texts = sorted({row[INPUT[task]] for row in train})
        random.Random(0).shuffle(texts)
        cuts = {"validation": sizes["validation"], "unlabeled": sizes["unlabeled"][task]}
        part_of = dict.fromkeys(texts, "teacher")
        for part, count in cuts.items():
            part_of.update(dict.fromkeys(texts[:count], part))
            texts = texts[count:]
        parts: dict[str, list[dict[str, str]]] = {"teacher": [], "unlabeled": [], "validation": []}
        seen: set[str] = set()
        for row in train:
            text = row[INPUT[task]]
            if part_of[text] == "teacher" or text not in seen:
                parts[part_of[text]].append(row)
            seen.add(text)
        fresh = [row for row in test if row[INPUT[task]] not in known]
        splits[task] = {**parts, "test": fresh[: sizes["test"]]}
    return splits


def _rows(path: Path, task: str, sizes: dict[str, Any]) -> list[dict[str, str]]:
    """Rows with an `id`; news is cut to its first words."""
    rows = []
    for number, row in enumerate(load_rows(str(path)).to_list()):
        if task == "agnews":
            row["text"] = " ".join(row["text"].split()[: sizes["news_words"]])
        rows.append({"id": f"{task}-{path.stem}-{number}", **row})
    return rows


def _short(rows: list[dict[str, str]], task: str, sizes: dict[str, Any]) -> list[dict[str, str]]:
    """Without the Quora pairs that have a longer question than the study reads."""
    most = sizes["question_words"]
    return [r for r in rows if task != "quora" or max(len(r[side].split()) for side in ("source", "target")) <= most]


def teacher_pairs(splits: dict[str, Any], counts: dict[str, int], batch_rows: int) -> datasets.Dataset:
    """Prompts with gold answers, `counts` of each task under all its templates, in batches of one task in random order.

    One task per batch, because news is several times longer than a question; to be read in sequence.
    """
    batches: list[list[dict[str, str]]] = []
    for task, name in TASKS.items():
        rows = datasets.Dataset.from_list(splits[task]["teacher"])
        reads = {"student_column": INPUT[task], "source": f"{task} teacher rows"}
        pairs = supervised_pairs(rows, load_templates(name), **reads).shuffle(seed=0)
        chosen = pairs.select(range(min(counts[task], len(pairs)))).to_list()
        batches += [chosen[i : i + batch_rows] for i in range(0, len(chosen) - batch_rows + 1, batch_rows)]
    random.Random(0).shuffle(batches)
    return datasets.Dataset.from_list([row for batch in batches for row in batch])


def examples(splits: dict[str, Any], part: str, templates: dict[str, str]) -> list[Example]:
    """Both tasks' inputs: the teacher reads them under one template each, the student bare."""
    found: list[Example] = []
    for task in TASKS:
        found += Examples(
            datasets.Dataset.from_list(splits[task][part]),
            load_templates(f"{TASKS[task]}:{templates[task]}"),
            student_column=INPUT[task],
            reference_column=None if part == "unlabeled" else REFERENCE[task],
            id_column="id",
            source=f"{task} {part} rows",
        )[:]
    return found


def task_metric(predictions: list[str], held_out: list[Example]) -> dict[str, float]:
    """Paraphrases: BLEU and ROUGE-L to the reference, self-BLEU and copies of the source. News: accuracy."""
    scores: dict[str, float] = {}
    rows = list(zip(predictions, held_out, strict=True))
    for task in TASKS:
        mine = [(text, example) for text, example in rows if example.id.startswith(task)]
        if not mine:
            continue
        texts, inputs = [text for text, _ in mine], [example for _, example in mine]
        if task == "agnews":
            scores["accuracy"] = TASK_METRICS["exact_match"](texts, inputs)["exact_match"]
            continue
        sources = [Example(e.id, e.student_input, e.teacher_inputs, (e.student_input,)) for e in inputs]
        scores["bleu"] = TASK_METRICS["bleu"](texts, inputs)["bleu"]
        scores["rougeL"] = TASK_METRICS["rouge"](texts, inputs)["rougeL"]
        scores["self_bleu"] = TASK_METRICS["bleu"](texts, sources)["bleu"]
        scores["copies"] = TASK_METRICS["exact_match"](texts, sources)["exact_match"]
    # Plain numbers: a RowMean would have a score for each row, and these are of some of the rows.
    return {name: float(value) for name, value in scores.items()}


def summarise(evaluator: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Held-out metrics of a policy's answers, over both tasks and per task."""
    metrics = evaluator.summarise(rows)
    for name in TASKS:
        own = evaluator.summarise([row for row in rows if row["id"].startswith(name)])
        metrics |= {f"{p}{name}_{m}": own[p + m] for p in ("", "sample_") for m in ("regret", "length", "finish_rate")}
        metrics[f"{name}_match"] = own["match"]
    return {name: round(value, 4) for name, value in metrics.items()}


def build_model(tokenizer: Any, width: int, layers: int, seed: int) -> Any:
    """A T5 v1.1-shaped model with random weights, tied embedding and the true vocabulary's 32,128 rows."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
