"""Whether a classifier tells classes apart: scores of each class, and the baseline of the commonest label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ClassScore:
    """One label: rows that have it, rows predicted to have it, and precision, recall and F1 (0 where undefined)."""

    label: str
    rows: int
    predicted: int
    precision: float
    recall: float
    f1: float


def class_scores(predicted: Sequence[int], true: Sequence[int], names: Sequence[str] = ()) -> list[ClassScore]:
    """Scores of every label that is named, true or predicted, in the order of the indices; by scikit-learn.

    Rows whose true label is negative have none and are left out.
    """
    from sklearn.metrics import precision_recall_fscore_support

    pairs = [(guess, label) for guess, label in zip(predicted, true, strict=True) if label >= 0]
    labels = sorted({*range(len(names)), *(label for pair in pairs for label in pair)})
    if not pairs:
        return []
    guesses, truths = zip(*pairs, strict=True)
    found = precision_recall_fscore_support(truths, guesses, labels=labels, zero_division=0)
    return [
        ClassScore(
            label=names[k] if k < len(names) else str(k),
            rows=truths.count(k),
            predicted=guesses.count(k),
            precision=float(found[0][i]),
            recall=float(found[1][i]),
            f1=float(found[2][i]),
        )
        for i, k in enumerate(labels)
    ]


def confusion_matrix(predicted: Sequence[int], true: Sequence[int], labels: int) -> list[list[int]]:
    """Rows by true (down) and predicted (across) label, [labels, labels]; rows with a negative true label have none."""
    counts = [[0] * labels for _ in range(labels)]
    for guess, label in zip(predicted, true, strict=True):
        if label >= 0:
            counts[label][guess] += 1
    return counts


def calibration_error(probabilities: np.ndarray, true: Sequence[int], bins: int = 15) -> float:
    """Expected calibration error: sum over bins of share of rows x |accuracy - mean confidence|, from 0 to 1.

    The confidence is the largest probability [rows, C]; bins have equal width (Guo et al. 2017, arXiv 1706.04599,
    eq. 3, with their 15). Rows whose true label is negative are left out; 0 without rows.
    """
    labels = np.asarray(true)
    probabilities, labels = probabilities[labels >= 0], labels[labels >= 0]
    if not len(labels):
        return 0.0
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = [abs(float((right[bin_of == b] - confidence[bin_of == b]).sum())) for b in range(bins)]
    return sum(gaps) / len(labels)


def classified_rows(predicted: Sequence[int], true: Sequence[int], texts: Sequence[str]) -> list[dict[str, Any]]:
    """{id, input, label, predicted, accuracy} of each row that has a label: the lines of held_out.jsonl."""
    return [
        {"id": str(i), "input": text, "label": label, "predicted": guess, "accuracy": float(guess == label)}
        for i, (guess, label, text) in enumerate(zip(predicted, true, texts, strict=True))
        if label >= 0
    ]


def commonest(labels: Sequence[int]) -> int:
    """The most frequent label of those that are not negative; of equally frequent ones the smallest index."""
    counts = Counter(label for label in labels if label >= 0)
    return max(sorted(counts), key=lambda label: counts[label])


def only_class(predicted: Sequence[int]) -> int | None:
    """The label predicted for every row, if it is one label for at least two rows."""
    return predicted[0] if len(predicted) > 1 and len(set(predicted)) == 1 else None


def one_class_warning(who: str, label: str, rows: int) -> str:
    """What to say of a classifier that predicts one label for every row."""
    return (
        f"{who} predicts '{label}' for all {rows} held-out rows: it tells no classes apart, and its scores are those "
        "of a constant. Train longer or with another learning rate, and check the labels."
    )
