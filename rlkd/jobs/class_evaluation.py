"""How good, how fast and how large a saved classifier is: its part of `rlkd evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..checks import OUTSIDE
from ..data.glue import TableLayout, load_labelled
from ..data.labelled import EncodedTexts, labelled_rows
from ..data.text import text_format
from ..data.words import EncodedWords, encoded_rows, label_logits
from ..errors import ConfigError
from ..evaluation.class_facts import class_facts, constant_prediction
from ..evaluation.classes import commonest, one_class_warning
from ..evaluation.problems import PROBLEMS, classification_metrics, classified_rows
from ..models.footprint import count_parameters, latency, megabytes
from ..tensors import pad_stack
from .classifiers import SavedClassifier
from .encoder_report import TIMED_PASSES, TIMED_SENTENCES, spread_rows

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluatedClasses:
    """rows, as held_out.jsonl has them; numbers, by their names in `rlkd.metrics`; classes: `class_facts`, of single
    labels the accuracy of the commonest, the problem, warnings; speed; and what was evaluated.
    """

    rows: Rows
    numbers: dict[str, float]
    classes: dict[str, Any]
    speed: dict[str, float]
    model: Any
    texts: EncodedTexts


def classified_rows_of(request: dict[str, Any], classifier: SavedClassifier) -> Rows:
    """The labelled rows {text, text_pair, label} that a command names, for what the classifier gives; rows without a
    label are counted in a warning. Raises DataError for columns, texts or labels that do not fit, and ConfigError for a
    separator of labels where a row has one.
    """
    kind = classifier.problem_type
    if request["label_separator"] is not None and kind != "multi_label_classification":
        raise ConfigError(f"--label-separator has no effect: '{classifier.name}' is of {kind}. Leave it out.")
    found = text_format(request)
    layout = TableLayout(
        request["input_column"],
        request["reference_column"],
        request["pair_column"],
        columns=None if found.columns is None else tuple(found.columns),
        delimiter=found.delimiter,
        encoding=found.encoding,
        problem_type=kind,
        separator=request["label_separator"],
    )
    where = {name: request[name] for name in ("split", "subset", "limit", "on_bad_row")}
    rows = load_labelled(request["dataset"], layout, labels=classifier.classes, **where)
    return [dict(row) for row in labelled_rows(rows, request["dataset"])]


@torch.inference_mode()
def evaluate_classes(classifier: SavedClassifier, rows: Rows, batch_rows: int) -> EvaluatedClasses:
    """Classify the rows with the classifier, which loads now, and score the classes. Raises DataError for texts that
    cannot be encoded, before that.
    """
    names, kind = classifier.classes, classifier.problem_type
    texts, model = _encoded(classifier, rows), classifier.load()
    logits = [torch.empty(0)] * len(rows)
    for numbers, batch in texts.collated(batch_rows):
        on_device = {name: x.to(model.device) for name, x in batch.items()}
        for number, row in zip(numbers, label_logits(model, on_device, names).cpu(), strict=True):
            logits[number] = row
    outputs, true = pad_stack(logits).numpy(), texts.true
    problem = PROBLEMS[kind]
    inputs = [" / ".join(filter(None, pair)) for pair in texts.texts]
    rated = classified_rows(problem.predict(outputs), true, inputs, kind, names)
    classes = class_facts(outputs, true, names, kind) | {
        "problem_type": kind,
        "warnings": _warnings(rated, texts, classifier),
    }
    if kind == "single_label_classification":
        most = commonest(true.tolist())
        classes["commonest"] = {"label": names[most], "accuracy": float(np.mean(true == most))}
    return EvaluatedClasses(
        rated,
        classification_metrics(list(problem.scores), kind, names)(EvalPrediction(outputs, true)),
        classes,
        _speed(model, classifier, rows, batch_rows),
        model,
        texts,
    )


def _encoded(classifier: SavedClassifier, rows: Rows) -> EncodedTexts:
    classes = len(classifier.classes)
    return encoded_rows(rows, classifier.tokenizer, classifier.max_length, classes, classifier.problem_type)


def _warnings(rated: Rows, texts: EncodedTexts, classifier: SavedClassifier) -> list[str]:
    """What makes the scores say less than they seem to."""
    kind, lines = classifier.problem_type, []
    if alone := constant_prediction(rated, classifier.classes, kind):
        what = "words" if PROBLEMS[kind].of_words else "rows"
        lines.append(one_class_warning("the model", alone["label"], alone["rows"], what))
    if isinstance(texts, EncodedWords) and (unread := sum(texts.unread)):
        lines.append(
            f"{unread} of {sum(map(len, texts.words))} words are not read (beyond {classifier.max_length} tokens, or "
            f"without a token), and are predicted as {OUTSIDE}"
        )
    return lines


def _speed(model: Any, classifier: SavedClassifier, rows: Rows, batch_rows: int) -> dict[str, float]:
    """Size, and how fast texts are classified in batches and one by one, without tokenization."""
    some = spread_rows(rows, TIMED_SENTENCES)
    texts = _encoded(classifier, some)

    def milliseconds(size: int) -> float:
        batches = [{name: x.to(model.device) for name, x in batch.items()} for _, batch in texts.batches(size)]
        return latency({"model": model}, {"model": batches}, TIMED_PASSES)["model"]

    return {
        "parameters": count_parameters(model),
        "megabytes": megabytes(model),
        "texts_per_second": 1000 / milliseconds(batch_rows),
        "milliseconds_per_input": milliseconds(1),
    }
