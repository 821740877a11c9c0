"""Uncertainty of scores: percentile bootstrap over held-out rows and seeds, and the verdict on a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics import held_out

RESAMPLES = 4000
LEVEL = 0.95
FEW_ROWS = 10  # below this no interval is given: too few rows to resample
CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (None if there are too few rows); rows and seeds that were resampled."""

    value: float
    low: float | None
    high: float | None
    rows: int
    seeds: int

    @property
    def over(self) -> str:
        """What was resampled, in words."""
        seeds = f" and {self.seeds} seeds" if self.seeds > 1 else ", one seed"
        return f"{self.rows} held-out rows{seeds}"


@dataclass(frozen=True)
class Difference:
    """One student minus another on the same rows: `interval` of the mean difference and a two-sided `p_value`."""

    interval: Interval
    p_value: float | None

    def verdict(self, name: str) -> str:
        """better, worse (or more, less, where neither direction is better) or within noise; not known without an
        interval.
        """
        low, high = self.interval.low, self.interval.high
        if low is None or high is None:
            return "not known"
        if low <= 0 <= high:
            return "within noise"
        direction = "up" if low > 0 else "down"
        better = held_out(name).better
        if better == "neither":
            return "more" if direction == "up" else "less"
        return "better" if direction == better else "worse"


def mean_interval(scores: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of scores [S seeds, N rows].

    Rows are resampled, and so are seeds where there are several, independently of the rows (all seeds share the rows):
    Efron & Tibshirani 1993, chapter 13; for crossed factors, Owen 2007 (arXiv 0711.1216).
    """
    seeds, rows = scores.shape
    value = float(scores.mean())
    if rows < FEW_ROWS:
        return Interval(value, None, None, rows, seeds)
    random = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    block = max(1, min(RESAMPLES, CHUNK // rows))
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = random.integers(rows, size=(count, rows))
        of_seeds = np.stack([own[drawn].mean(1) for own in scores])  # [S, count]
        means.append(of_seeds[random.integers(seeds, size=(count, seeds)), np.arange(count)[:, None]].mean(1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(value, float(low), float(high), rows, seeds)


def paired_difference(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Difference:
    """one - other, [S, N] of the same rows and seeds: bootstrap interval, and p of a sign-flip permutation test."""
    difference = one - other
    interval = mean_interval(difference, seed)
    if interval.low is None:
        return Difference(interval, None)
    per_row = difference.mean(0)
    random = np.random.default_rng(seed + 1)
    block = max(1, min(RESAMPLES, CHUNK // len(per_row)))
    flipped: list[np.ndarray] = []
    for start in range(0, RESAMPLES, block):
        signs = random.integers(0, 2, size=(min(block, RESAMPLES - start), len(per_row))) * 2 - 1
        flipped.append(signs @ per_row / len(per_row))
    as_far = (np.abs(np.concatenate(flipped)) >= abs(per_row.mean()) - 1e-12).sum()
    return Difference(interval, float((as_far + 1) / (RESAMPLES + 1)))


def overall(verdicts: Sequence[str]) -> str:
    """One verdict for several: the common one if all agree, mixed if some are better and some worse."""
    kinds = set(verdicts) - {"not known"}
    if not kinds:
        return "not known"
    if {"better", "worse"} <= kinds:
        return "mixed"
    if kinds == {"within noise"}:
        return "within noise"
    side = "better" if "better" in kinds else "worse"
    return side if kinds == {side} else f"partly {side}"
