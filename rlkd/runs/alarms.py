"""The alarms: training that goes wrong while every number is still finite, and what to change (docs/guards.md).

A measure is a function of the history of logged numbers alone; it is compared with the threshold of its alarm. An alarm
is one entry of ALARMS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import mean, median
from typing import Any

from ..metrics import metric

KEPT = 200  # readings of each number that are remembered
WINDOW = 3  # log lines that are averaged: one noisy line is not an alarm
USUAL = 5  # readings before a usual value is known


class History:
    """The finite numbers logged so far, by name: the first, and the last `KEPT`."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.values: dict[str, deque[float]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and isfinite(value):
                self.first.setdefault(name, float(value))
                self.values.setdefault(name, deque(maxlen=KEPT)).append(float(value))

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
    advice   what to change
    reads    logged names; a record with one of them gives a new reading
    measure  history -> reading, None while there is too little to measure
    """

    name: str
    meaning: str
    advice: str
    reads: tuple[str, ...]
    measure: Callable[[History], Reading | None]
    threshold: float
    below: bool = False

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
    """Explained variance of the critic."""
    fit = history.recent("explained_variance", USUAL)
    return None if fit is None else Reading(fit, f"the critic's explained variance is {fit:.2f}")


def clipped(history: History) -> Reading | None:
    """Share of tokens whose ratio is outside PPO's clip range."""
    share = history.recent("clip_fraction")
    return None if share is None else Reading(share, f"{100 * share:.0f} % of the ratios are outside the clip range")


def _objective(history: History) -> str:
    """What training lowers: regret; in TKD a term that is on from the start, as others join later; else the loss."""
    return next((name for name in ("regret", "ce", "kd") if name in history.first), "loss")


def rise(history: History) -> Reading | None:
    """Regret (RL) or loss over its lowest; a fifth of the first reading, added to both, damps the ratio of small
    ones.
    """
    name = _objective(history)
    now = history.recent(name, USUAL)
    if now is None:
        return None
    lowest, slack = history.lowest(name, USUAL), abs(history.first[name]) / 5
    value = (now + slack) / (lowest + slack) if lowest + slack > 0 else 1.0
    return Reading(value, f"{name} is {now:.3g}, its minimum was {lowest:.3g}")


def held_out_loss(history: History) -> Reading | None:
    """Largest relative loss of a held-out score (regret, task scores) since its best, while training improves.

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
        lower = score.lower_is_better
        recent, best = mean(list(values)[-2:]), (min if lower else max)(values)
        scale = abs(best) + (history.first["regret"] / 2 if regret else 0.0)
        fall = (recent - best if lower else best - recent) / scale if scale else 0.0
        text = f"{name} is {recent:.3g}, its best was {best:.3g}, while {objective} falls in training"
        losses.append(Reading(fall, text))
    return max(losses, key=lambda r: r.value, default=None)


ALARMS = {
    alarm.name: alarm
    for alarm in (
        Alarm(
            name="length_collapse",
            meaning="Answers have become much shorter: the student may be exploiting the end-of-sequence shortcut.",
            advice="Lower lam towards 0, raise kl_coef, or warm up longer before RL.",
            reads=("length", "eval_length"),
            measure=shortest,
            threshold=0.7,
            below=True,
        ),
        Alarm(
            name="run_on",
            meaning="Answers have become much longer: a short credit horizon makes continuing look free.",
            advice="Raise lam (a short horizon ignores what follows), raise kl_coef, or lower learning_rate.",
            reads=("length", "eval_length"),
            measure=longest,
            threshold=1.2,
        ),
        Alarm(
            name="finish_rate_drop",
            meaning="Fewer answers end before max_new_tokens than at the start.",
            advice="Raise lam or kl_coef; if the answers are right but long, raise max_new_tokens.",
            reads=("finish_rate", "eval_finish_rate"),
            measure=unfinished,
            threshold=0.1,
        ),
        Alarm(
            name="entropy_collapse",
            meaning="The student is nearly deterministic where the teacher is not: sampling no longer explores.",
            advice="Raise entropy_coef or kl_coef, or lower learning_rate.",
            reads=("entropy",),
            measure=certainty,
            threshold=0.1,
            below=True,
        ),
        Alarm(
            name="kl_runaway",
            meaning="The student has drifted far from the reference policy.",
            advice="Raise kl_coef, set kl_target, or lower learning_rate.",
            reads=("kl",),
            measure=distance,
            threshold=1.0,
        ),
        Alarm(
            name="kl_negative",
            meaning=(
                "The mean KL estimate is far below 0, which cannot be if answers are sampled from the policy that is "
                "scored."
            ),
            advice=(
                "Sampling and scoring disagree: check the precision (bf16), dropout (must be 0) and changes to "
                "sampling."
            ),
            reads=("kl",),
            measure=distance,
            threshold=-0.1,
            below=True,
        ),
        Alarm(
            name="value_loss_explosion",
            meaning="The critic's loss is many times its usual value.",
            advice="Lower learning_rate, value_coef or value_clip_range.",
            reads=("value_loss",),
            measure=value_loss,
            threshold=10.0,
        ),
        Alarm(
            name="critic_misled",
            meaning="The critic remains worse than a constant baseline: it adds variance.",
            advice="Lower learning_rate, raise value_coef, or choose another baseline.",
            reads=("explained_variance",),
            measure=critic_fit,
            threshold=-0.2,
            below=True,
        ),
        Alarm(
            name="clip_saturated",
            meaning="PPO clips so many ratios that later passes over a rollout batch contribute little.",
            advice="Lower learning_rate, epochs_per_rollout or minibatches_per_rollout.",
            reads=("clip_fraction",),
            measure=clipped,
            threshold=0.3,
        ),
        Alarm(
            name="gradient_spikes",
            meaning="Gradient norms are several times their usual value.",
            advice="Lower learning_rate or max_grad_norm, lengthen warmup_steps, or use larger batches.",
            reads=("grad_norm",),
            measure=gradient_norm,
            threshold=5.0,
        ),
        Alarm(
            name="objective_rising",
            meaning="What training minimizes (regret in RL, else the loss) has risen well above its minimum.",
            advice="Lower learning_rate, and return to an earlier checkpoint.",
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
                "Keep the best checkpoint (load_best_model_at_end, early_stopping_patience), raise kl_coef, or use "
                "more data."
            ),
            reads=("eval_seconds", "eval_runtime"),
            measure=held_out_loss,
            threshold=0.1,
        ),
    )
}
