"""The alarms: training that goes wrong while every number is still finite, and what to change (docs/guards.md).

A measure is a function of the history of logged numbers alone; it is compared with the threshold of its alarm. An alarm
is one entry of ALARMS.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import mean, median
from typing import Any

from ..metrics import metric
from .paired import KEY, Pair

KEPT = 200  # readings of each number that are remembered
WINDOW = 3  # log lines that are averaged: one noisy line is not an alarm
SETTING = re.compile(r"\b(?:lam|\w+_\w+)\b")  # a name in an advice
CHOOSING_LAM = "in small steps (docs/method.md, Choosing lam)"
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


@dataclass(frozen=True)
class Alarm:
    """Fires when `measure` is above `threshold` (below it, if `below`).

    meaning  one sentence
    advice   what to change, one remedy each; those that name settings the trainer does not have are left out
    reads    logged names; a record with one of them gives a new reading
    measure  history -> reading, None while there is too little to measure
    """

    name: str
    meaning: str
    advice: tuple[str, ...]
    reads: tuple[str, ...]
    measure: Callable[[History], Reading | None]
    threshold: float
    below: bool = False

    def advice_for(self, settings: Any = None) -> str:
        """The remedies as a sentence; those for `settings`, the trainer's arguments, if given."""
        remedies = [
            remedy
            for remedy in self.advice
            if settings is None or all(hasattr(settings, name) for name in SETTING.findall(remedy))
        ]
        *most, last = remedies or self.advice
        text = f"{', '.join(most)}{',' if len(most) > 1 else ''} or {last}" if most else last
        return f"{text[0].upper()}{text[1:]}."

    def crossed(self, reading: Reading) -> bool:
        """Whether the reading is beyond the threshold."""
        return reading.value < self.threshold if self.below else reading.value > self.threshold


# Measures. Training is measured by the mean of a few log lines, an evaluation (many answers) by itself.


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


ALARMS = {
    alarm.name: alarm
    for alarm in (
        Alarm(
            name="length_collapse",
            meaning="Answers have become much shorter: the student may be exploiting the end-of-sequence shortcut.",
            advice=("warm up longer before RL", f"lower lam {CHOOSING_LAM}", "raise kl_coef"),
            reads=("length", "eval_length"),
            measure=shortest,
            threshold=0.7,
            below=True,
        ),
        Alarm(
            name="run_on",
            meaning="Answers have become much longer: a short credit horizon makes continuing look free.",
            advice=("warm up longer before RL", f"raise lam {CHOOSING_LAM}", "raise kl_coef"),
            reads=("length", "eval_length"),
            measure=longest,
            threshold=1.2,
        ),
        Alarm(
            name="finish_rate_drop",
            meaning="Fewer answers end before max_new_tokens than at the start.",
            advice=(
                "warm up longer before RL",
                f"raise lam {CHOOSING_LAM}",
                "raise kl_coef",
                "raise max_new_tokens if the answers are right but long",
            ),
            reads=("finish_rate", "eval_finish_rate"),
            measure=unfinished,
            threshold=0.1,
        ),
        Alarm(
            name="entropy_collapse",
            meaning="The student is nearly deterministic where the teacher is not: sampling no longer explores.",
            advice=("raise entropy_coef", "raise kl_coef", "lower learning_rate"),
            reads=("entropy",),
            measure=certainty,
            threshold=0.1,
            below=True,
        ),
        Alarm(
            name="kl_runaway",
            meaning="The student has drifted far from the reference policy.",
            advice=("raise kl_coef", "set kl_target", "lower learning_rate"),
            reads=("kl",),
            measure=distance,
            threshold=1.0,
        ),
        Alarm(
            name="kl_negative",
            meaning=(
                "The mean KL estimate is far below 0, which cannot be if answers are sampled from the policy that is "
                "scored: sampling and scoring disagree."
            ),
            advice=("check the precision (bf16), dropout (must be 0) and changes to sampling",),
            reads=("kl",),
            measure=distance,
            threshold=-0.1,
            below=True,
        ),
        Alarm(
            name="value_loss_explosion",
            meaning="The critic's loss is many times its usual value.",
            advice=("lower learning_rate", "lower value_coef", "lower value_clip_range"),
            reads=("value_loss",),
            measure=value_loss,
            threshold=10.0,
        ),
        Alarm(
            name="critic_misled",
            meaning="The critic remains worse than none: it adds variance.",
            advice=("raise value_learning_rate", "set value_warmup_updates", "choose another baseline"),
            reads=("value_gain",),
            measure=critic_fit,
            threshold=-0.2,
            below=True,
        ),
        Alarm(
            name="clip_saturated",
            meaning="PPO clips so many ratios that later passes over a rollout batch contribute little.",
            advice=("lower learning_rate", "lower epochs_per_rollout", "lower minibatches_per_rollout"),
            reads=("clip_fraction",),
            measure=clipped,
            threshold=0.3,
        ),
        Alarm(
            name="gradient_spikes",
            meaning="Gradient norms are several times their usual value.",
            advice=("lower learning_rate", "lower max_grad_norm", "lengthen warmup_steps", "use larger batches"),
            reads=("grad_norm",),
            measure=gradient_norm,
            threshold=5.0,
        ),
        Alarm(
            name="objective_rising",
            meaning="What training minimizes (regret in RL, else the loss) has risen well above its minimum.",
            advice=("lower learning_rate and return to an earlier checkpoint",),
            reads=("regret", "ce", "kd", "loss"),
            measure=rise,
            threshold=1.3,
        ),
        Alarm(
            name="held_out_worse",
            meaning=(
                "Training improves but held-out regret or a held-out score gets worse: overfitting or reward hacking."
            ),
            advice=(
                "keep the best checkpoint (load_best_model_at_end, early_stopping_patience)",
                "raise kl_coef",
                "use more data",
            ),
            reads=("eval_seconds", "eval_runtime"),
            measure=held_out_loss,
            threshold=0.1,
        ),
    )
}
