"""How good, how fast and how large a saved classifier is: its part of `rlkd evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.glue import TableLayout, load_labelled
from ..data.labelled import EncodedTexts, labelled_rows
from ..data.text import text_format
from ..evaluation.classes import (
    calibration_error,
    class_scores,
    commonest,
    confusion_matrix,
    one_class_warning,
    only_prediction,
)
from ..evaluation.problems import PROBLEMS, classification_metrics, classified_rows
from ..models.footprint import count_parameters, latency, megabytes
from .classifiers import SavedClassifier
from .encoder_report import TIMED_PASSES, TIMED_SENTENCES, spread_rows

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluatedClasses:
    """rows, as held_out.jsonl has them; numbers, by their names in `rlkd.metrics`; classes: scores of each class,
    confusion matrix, calibration error, accuracy of the commonest label, warnings; speed; and what was evaluated.
    """

    rows: Rows
    numbers: dict[str, float]
    classes: dict[str, Any]
    speed: dict[str, float]
    model: Any
    texts: EncodedTexts


def classified_rows_of(request: dict[str, Any], classes: tuple[str, ...]) -> Rows:
    """The labelled rows {text, text_pair, label} that a command names; rows without a label are counted in a warning.
    Raises DataError for columns, texts or labels that do not fit.
    """
    found = text_format(request)
    layout = TableLayout(
        request["input_column"],
        request["reference_column"],
        request["pair_column"],
        columns=None if found.columns is None else tuple(found.columns),
        delimiter=found.delimiter,
        encoding=found.encoding,
    )
    where = {name: request[name] for name in ("split", "subset", "limit", "on_bad_row")}
    rows = load_labelled(request["dataset"], layout, labels=classes, **where)
    return [dict(row) for row in labelled_rows(rows, request["dataset"])]


@torch.inference_mode()
def evaluate_classes(classifier: SavedClassifier, rows: Rows, batch_rows: int) -> EvaluatedClasses:
    """Classify the rows with the classifier, which loads now, and score the classes. Raises DataError for texts that
    cannot be encoded, before that.
    """
    names = classifier.classes
    texts = EncodedTexts(rows, classifier.tokenizer, classifier.max_length, len(names))
    model = classifier.load()
    logits = torch.zeros(len(rows), len(names))
    for numbers, batch in texts.batches(batch_rows):
        logits[numbers] = model(**{name: x.to(model.device) for name, x in batch.items()}).logits.float().cpu()
    predicted, true = logits.argmax(-1).tolist(), texts.labels
    probabilities = logits.double().softmax(-1).numpy()
    numbers_of = classification_metrics(list(PROBLEMS["single_label_classification"].scores))
    alone = only_prediction(predicted)
    classes = {
        "classes": [asdict(one) for one in class_scores(predicted, true, names)],
        "confusion": confusion_matrix(predicted, true, len(names)),
        "ece": calibration_error(probabilities, true),
        "commonest": {"label": names[commonest(true)], "accuracy": float(np.mean(np.array(true) == commonest(true)))},
        "warnings": [] if alone is None else [one_class_warning("the model", names[alone], len(rows))],
    }
    return EvaluatedClasses(
        classified_rows(predicted, true, [" / ".join(filter(None, pair)) for pair in texts.texts]),
        numbers_of(EvalPrediction(logits.numpy(), np.array(true))),
        classes,
        _speed(model, classifier, rows, batch_rows),
        model,
        texts,
    )


def _speed(model: Any, classifier: SavedClassifier, rows: Rows, batch_rows: int) -> dict[str, float]:
    """Size, and how fast texts are classified in batches and one by one, without tokenization."""
    some = spread_rows(rows, TIMED_SENTENCES)
    texts = EncodedTexts(some, classifier.tokenizer, classifier.max_length, len(classifier.classes))

    def milliseconds(size: int) -> float:
        batches = [{name: x.to(model.device) for name, x in batch.items()} for _, batch in texts.batches(size)]
        return latency({"model": model}, {"model": batches}, TIMED_PASSES)["model"]

    return {
        "parameters": count_parameters(model),
        "megabytes": megabytes(model),
        "texts_per_second": 1000 / milliseconds(batch_rows),
        "milliseconds_per_input": milliseconds(1),
    }
