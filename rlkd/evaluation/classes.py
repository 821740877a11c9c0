"""Whether a classifier tells classes apart: scores of each class, and the baseline of the commonest label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
