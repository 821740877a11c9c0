"""What alarms measure: functions of the history of logged numbers alone (`rlkd.runs.alarms` has the thresholds)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import mean, median
from typing import Any

from ..metrics import metric
from .paired import KEY, Pair

KEPT = 200  # readings of each number that are remembered
WINDOW = 3  # log lines that are averaged: one noisy line is not an alarm
USUAL = 5  # readings before a usual value is known


class History:
    """The finite numbers logged so far, by name: the first, and the last `KEPT`; for scores also how each evaluation
    compares with the best one before it (`rlkd.runs.paired`), None where that is not known.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.values: dict[str, deque[float]] = {}
        self.pairs: dict[str, deque[Pair | None]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        pairs = record.get(KEY) or {}
        for name, value in record.items():
            if isinstance(value, (int, float)) and isfinite(value):
                self.first.setdefault(name, float(value))
                self.values.setdefault(name, deque(maxlen=KEPT)).append(float(value))
                self.pairs.setdefault(name, deque(maxlen=KEPT)).append(pairs.get(name.removeprefix("eval_")))

    def recent(self, name: str, lines: int = WINDOW) -> float | None:
        """Mean of the last `lines` readings; None if there are fewer."""
        values = self.values.get(name, ())
        return mean(list(values)[-lines:]) if len(values) >= lines else None

    def lowest(self, name: str, lines: int) -> float:
        """The lowest mean of `lines` successive readings."""
        values = list(self.values[name])
        return min(mean(values[i : i + lines]) for i in range(len(values) - lines + 1))

    def start(self, name: str) -> float:
        """The value before the first update if it was measured, else the first reading."""
        return self.first.get(f"start_{name}", self.first[name])


@dataclass(frozen=True)
class Reading:
    """What an alarm measured, and a sentence about it."""

    value: float
    text: str


# Training is measured by the mean of a few log lines, an evaluation (many answers) by itself.


def _now_and_start(history: History, name: str) -> list[tuple[float, float, str]]:
    """(now, at the start, which answers) of the sampled answers and, where evaluated, of the greedy held-out answers.

    For RL only: supervised training starts from a student with meaningless answers.
    """
    found: list[tuple[float, float, str]] = []
    if name not in history.first:
        return found
    for series, lines, which in ((name, WINDOW, "sampled"), (f"eval_{name}", 1, "greedy held-out")):
        now = history.recent(series, lines)
        if now is not None:
            found.append((now, history.start(series), which))
    return found


def _length_ratios(history: History) -> list[Reading]:
    return [
        Reading(now / start, f"{which} answers have {now:.1f} tokens on average, {start:.1f} at the start")
        for now, start, which in _now_and_start(history, "length")
        if start > 0
    ]


def shortest(history: History) -> Reading | None:
    """Length of the answers over that at the start, the lower of sampled and held-out ones."""
    return min(_length_ratios(history), key=lambda r: r.value, default=None)


def longest(history: History) -> Reading | None:
    """Length of the answers over that at the start, the higher of sampled and held-out ones."""
    return max(_length_ratios(history), key=lambda r: r.value, default=None)


def unfinished(history: History) -> Reading | None:
    """By how much the share of answers that end (before max_new_tokens) has fallen since the start."""
    drops = [
        Reading(start - now, f"{100 * now:.0f} % of {which} answers end, {100 * start:.0f} % at the start")
        for now, start, which in _now_and_start(history, "finish_rate")
    ]
    return max(drops, key=lambda r: r.value, default=None)


def certainty(history: History) -> Reading | None:
    """The student's entropy over the teacher's on the same answers; 0.01 nats added to both tolerate a sharp
    teacher.
    """
    own, theirs = history.recent("entropy"), history.recent("teacher_entropy")
    if own is None or theirs is None:
        return None
    text = f"the student's entropy is {own:.3f} nats where the teacher's is {theirs:.2f}"
    return Reading((own + 0.01) / (theirs + 0.01), text)


def distance(history: History) -> Reading | None:
    """KL per token to the reference policy."""
    kl = history.recent("kl")
    return None if kl is None else Reading(kl, f"KL to the reference policy is {kl:.2f} nats per token")


def _over_usual(history: History, name: str, what: str) -> Reading | None:
    """Median of the last lines over the median of those before, so that a single spike does not count; a hundredth of
    the first reading, added to both, damps the ratio of small ones.
    """
    values = list(history.values.get(name, ()))
    before = values[:-WINDOW]
    if len(before) < USUAL or median(before) <= 0:
        return None
    now, usual, slack = median(values[-WINDOW:]), median(before), history.first[name] / 100
    return Reading((now + slack) / (usual + slack), f"{what} is {now:.3g}, usually {usual:.3g}")


def value_loss(history: History) -> Reading | None:
    """The critic's loss over its usual value."""
    return _over_usual(history, "value_loss", "the critic's loss")


def gradient_norm(history: History) -> Reading | None:
    """The gradient norm over its usual value."""
    return _over_usual(history, "grad_norm", "the gradient norm")


def critic_fit(history: History) -> Reading | None:
    """What the critic takes from the mean square of the credit, constant errors included."""
    gain = history.recent("value_gain", USUAL)
    return None if gain is None else Reading(gain, f"the critic's gain over none is {gain:.2f}")


def clipped(history: History) -> Reading | None:
    """Share of tokens whose ratio is outside PPO's clip range."""
    share = history.recent("clip_fraction")
    return None if share is None else Reading(share, f"{100 * share:.0f} % of the ratios are outside the clip range")


def effective_share(history: History) -> Reading | None:
    """The share of tokens that, weighted equally, would give as precise a mean as the importance weights do."""
    share = history.recent("effective_sample_size")
    if share is None:
        return None
    return Reading(share, f"the importance weights are worth {100 * share:.0f} % of the tokens, weighted equally")


def _objective(history: History) -> str:
    """What training lowers: regret; in TKD a term that is on from the start, as others join later; else the loss."""
    return next((name for name in ("regret", "ce", "kd") if name in history.first), "loss")


def rise(history: History) -> Reading | None:
    """Regret (RL) or loss above its lowest, relative to the size of the lowest, plus 1: for positive numbers their
    ratio. A fifth of the first reading damps the ratio of small ones, and five usual steps from line to line that of a
    loss that may be negative, which can pass through 0.
    """
    name = _objective(history)
    now = history.recent(name, USUAL)
    if now is None:
        return None
    lowest, slack = history.lowest(name, USUAL), abs(history.first[name]) / 5
    values = list(history.values[name])
    if min(values) < 0:
        slack += 5 * median(abs(b - a) for a, b in pairwise(values))
    size = abs(lowest) + slack
    return Reading(1 + (now - lowest) / size if size else 1.0, f"{name} is {now:.3g}, its minimum was {lowest:.3g}")


def held_out_loss(history: History) -> Reading | None:
    """Largest relative loss of a held-out score (regret, task scores) since its best, while training improves; 0 unless
    each of the last two evaluations is worse than the best one beyond noise.

    Regret counts in RL only (empty answers of an untrained student have a low one); it is relative to its best plus
    half of the first training regret, as the best may be near 0.
    """
    objective = _objective(history)
    now = history.recent(objective)
    if now is None or now > history.first[objective]:
        return None
    losses = []
    for name, values in history.values.items():
        score = metric(name)
        regret = score.name == "regret"
        if not name.startswith("eval_") or not (score.task or regret) or len(values) < 3:
            continue
        if regret and objective != "regret":
            continue
        best = (min if score.lower_is_better else max)(values)
        scale = abs(best) + (history.first["regret"] / 2 if regret else 0.0)
        certain = scale > 0 and all(_beyond_noise(history, name, -k) for k in (1, 2))
        fall = abs(values[-1] - best) / scale if certain else 0.0
        text = f"{name} is {values[-1]:.3g}, its best was {best:.3g}{_shown(history.pairs[name][-1])}"
        losses.append(Reading(fall, f"{text}, while {objective} falls in training"))
    return max(losses, key=lambda r: r.value, default=None)


def _beyond_noise(history: History, name: str, position: int) -> bool:
    """Whether an evaluation is worse than the best before it: by the interval over its rows or, for a score that has no
    value per row, by more than three times the usual change between evaluations.
    """
    pair = history.pairs[name][position]
    if pair is not None:
        return pair[0] > 0
    values = list(history.values[name])
    best = (min if metric(name).lower_is_better else max)(values)
    changes = [abs(b - a) for a, b in pairwise(values[:-2])]
    usual = median(changes) if len(changes) >= 3 else 0.0
    return abs(values[position] - best) > 3 * usual


def _shown(pair: Pair | None) -> str:
    return "" if pair is None else f" (row by row worse by {pair[0]:.3g} to {pair[1]:.3g}, {pair[2]} rows)"
