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

    @classmethod
    def of(cls, label: str, *, rows: int, predicted: int, right: int) -> ClassScore:
        """The scores of these counts; right, those that are predicted and true."""
        precision, recall = right / max(predicted, 1), right / max(rows, 1)
        return cls(label, rows, predicted, precision, recall, 2 * right / max(predicted + rows, 1))


def class_scores(predicted: Sequence[Any], true: Sequence[Any], names: Sequence[str] = ()) -> list[ClassScore]:
    """Scores of every label that is named, true or predicted, in the order of the indices.

    A row has one label, or a list of them. Rows whose true label is negative have none and are left out.
    """
    pairs = [
        (_as_set(guess), _as_set(label))
        for guess, label in zip(predicted, true, strict=True)
        if isinstance(label, list) or label >= 0
    ]
    if not pairs:
        return []
    given = Counter(k for guess, _ in pairs for k in guess)
    rows = Counter(k for _, label in pairs for k in label)
    right = Counter(k for guess, label in pairs for k in guess & label)
    return [
        ClassScore.of(names[k] if k < len(names) else str(k), rows=rows[k], predicted=given[k], right=right[k])
        for k in sorted({*range(len(names)), *given, *rows})
    ]


def _as_set(label: Any) -> set[int]:
    return set(label) if isinstance(label, list) else {label}


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


def commonest(labels: Sequence[int]) -> int:
    """The most frequent label of those that are not negative; of equally frequent ones the smallest index."""
    counts = Counter(label for label in labels if label >= 0)
    return max(sorted(counts), key=lambda label: counts[label])


def only_prediction(predicted: Sequence[Any]) -> Any:
    """What is predicted for every row (an index or a list of indices), if it is the same for at least two rows."""
    same = len(predicted) > 1 and all(one == predicted[0] for one in predicted)
    return predicted[0] if same else None


def in_words(label: Any, names: Sequence[str]) -> str:
    """A label, by index, or a list of them, or a number, as text."""
    if isinstance(label, list):
        return ", ".join(_named(one, names) for one in label) or "none of the labels"
    return _named(label, names)


def _named(label: Any, names: Sequence[str]) -> str:
    if isinstance(label, float):
        return f"{label:.4g}"
    return names[label] if type(label) is int and 0 <= label < len(names) else str(label)


def one_class_warning(who: str, label: str, rows: int, what: str = "rows") -> str:
    """What to say of a classifier that predicts the same for every row, or word."""
    return (
        f"{who} predicts '{label}' for all {rows} held-out {what}: it tells no classes apart, and its scores are those "
        "of a constant. Train longer or with another learning rate, and check the labels."
    )
