"""Linear probes: how well frozen features predict a label, compared with its most frequent value.

Source: Conneau et al. 2018 (arXiv 1805.01070), whose files `rlkd.data.probe_rows` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
MOST_STEPS = 2000


class Split(NamedTuple):
    """features [rows, D] and label indices [rows] of some rows."""

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy on test rows, with low and high of its 95 % (Wilson) interval.

    C is the inverse strength of the L2 penalty, chosen on the validation rows, and validation the accuracy there; both
    are None for a majority baseline.
    """

    accuracy: float
    low: float
    high: float
    C: float | None = None
    validation: float | None = None


def majority_baseline(train_labels: np.ndarray, test_labels: np.ndarray) -> ProbeScore:
    """The training rows' most frequent label (the first of several), given to every test row."""
    return _score(test_labels == np.bincount(train_labels).argmax())


def linear_probe(train: Split, validation: Split, test: Split, grid: Sequence[float] = GRID) -> ProbeScore:
    """Logistic regression on features standardised by the training rows.

    C is the value of `grid` (ascending) with the highest validation accuracy, the smallest of equal ones.
    Raises ValueError if all training rows have the same label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.features.astype(np.float64))
    fitted, tried, scored = (scaler.transform(split.features.astype(np.float64)) for split in (train, validation, test))
    probes = [LogisticRegression(C=C, max_iter=MOST_STEPS).fit(fitted, train.labels) for C in grid]
    scores = [float(candidate.score(tried, validation.labels)) for candidate in probes]
    best = int(np.argmax(scores))
    return _score(probes[best].predict(scored) == test.labels, grid[best], scores[best])


def _score(hits: np.ndarray, C: float | None = None, validation: float | None = None) -> ProbeScore:
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "wilson")
    return ProbeScore(float(hits.mean()), float(interval.low), float(interval.high), C, validation)
