"""How an evaluation compares with the best one before it, row by row: an interval, so that noise is not a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist, mean, stdev
from typing import Any

from ..metrics import held_out

KEY = "paired"  # of a record of an evaluation, in the history only
LEVEL = 0.95  # of all intervals of a run together
FEW_ROWS = 8  # below this there is no interval

Pair = tuple[float, float, int]


class BestRows:
    """The rows of the best evaluation so far, by score. A checkpoint keeps them (`state`, JSON-able)."""

    def __init__(self) -> None:
        self.best: dict[str, tuple[float, list[float]]] = {}
        self.evaluations = 0

    def compare(self, scores: Mapping[str, Any], rows: Mapping[str, Sequence[float]]) -> dict[str, Pair | None]:
        """Score -> (low, high, rows): by how much rows are worse than in its best evaluation, on the average; None
        without one. Then makes this evaluation the best where it is.

        scores: a logged evaluation, `eval_*`; rows: score -> one value per row, in the same direction as the score.

        The best of many noisy evaluations is better than it should be, and every evaluation is one more test: the
        interval of the k-th covers with a probability of 1 - (1 - LEVEL) / (k^2 m), m the number of scores.
        """
        self.evaluations += 1
        quantile = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / self.evaluations**2 / max(len(rows), 1))
        found: dict[str, Pair | None] = {}
        for name, values in rows.items():
            value, lower = float(scores[f"eval_{name}"]), held_out(name).lower_is_better
            known = self.best.get(name)
            found[name] = None if known is None else _interval(known[1], values, lower, quantile)
            if known is None or (value < known[0] if lower else value > known[0]):
                self.best[name] = value, list(values)
        return found

    def state(self) -> dict[str, Any]:
        """For `load_state`."""
        return {"evaluations": self.evaluations, "best": {name: list(best) for name, best in self.best.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.evaluations = state["evaluations"]
        self.best = {name: (value, rows) for name, (value, rows) in state["best"].items()}


def _interval(best: Sequence[float], now: Sequence[float], lower: bool, quantile: float) -> Pair | None:
    if len(best) != len(now) or len(now) < FEW_ROWS:
        return None
    worse = [(n - b) if lower else (b - n) for n, b in zip(now, best, strict=True)]
    half = quantile * stdev(worse) / sqrt(len(worse))
    return mean(worse) - half, mean(worse) + half, len(worse)
