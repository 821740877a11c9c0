"""The alarms: what goes wrong slowly, while every number is still finite, and what to change (docs/guards.md).

A measure is a function of the history of logged numbers alone; it is held against the threshold of its alarm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import mean, median
from typing import Any

from ..evaluation.evaluator import MEANS
from .best import LOWER_IS_BETTER

KEPT = 200  # readings of each number that are looked back on
WINDOW = 3  # log lines whose mean is judged: one noisy line is no alarm
USUAL = 5  # readings before one can say what is usual

# Of evaluations, what says nothing about quality. The rest is better when higher, but for `LOWER_IS_BETTER`.
NOT_A_SCORE = {
    *(f"eval_{name}" for name in MEANS if "regret" not in name),
    *(f"eval_{name}" for name in ("seconds", "runtime", "samples_per_second", "steps_per_second", "loss")),
}


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
        """Before the first update where the start was measured, else the first reading."""
        return self.first.get(f"start_{name}", self.first[name])


@dataclass(frozen=True)
class Reading:
    """What an alarm measured, and the numbers behind it in words."""

    value: float
    text: str


@dataclass(frozen=True)
class Alarm:
    """Fires when `measure` is above `threshold` (below it, if `below`).

    meaning  one sentence; advice, what to change; reads, the logged names that bring a new reading
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


# Measures. Training is judged by the mean of a few lines, an evaluation (many answers) by itself.


def _now_and_start(history: History, name: str) -> list[tuple[float, float, str]]:
    """(now, at the start, whose) of the sampled answers and, where evaluated, of the greedy held-out answers.

    Of RL only: supervised training begins with a student whose answers mean nothing.
    """
    found: list[tuple[float, float, str]] = []
    if name not in history.first:
        return found
    for series, lines, whose in ((name, WINDOW, "sampled"), (f"eval_{name}", 1, "greedy held-out")):
        now = history.recent(series, lines)
        if now is not None:
            found.append((now, history.start(series), whose))
    return found


def _length_ratios(history: History) -> list[Reading]:
    return [
        Reading(now / start, f"{whose} answers have {now:.1f} tokens, {start:.1f} at the start")
        for now, start, whose in _now_and_start(history, "length")
        if start > 0
    ]


def shortest(history: History) -> Reading | None:
    """Length of the answers over that at the start, the lower of sampled and held-out ones."""
    return min(_length_ratios(history), key=lambda r: r.value, default=None)


def longest(history: History) -> Reading | None:
    """Length of the answers over that at the start, the higher of sampled and held-out ones."""
    return max(_length_ratios(history), key=lambda r: r.value, default=None)


def unfinished(history: History) -> Reading | None:
    """By how much the share of answers that end has fallen since the start."""
    drops = [
        Reading(start - now, f"{100 * now:.0f} % of {whose} answers end, {100 * start:.0f} % at the start")
        for now, start, whose in _now_and_start(history, "finish_rate")
    ]
    return max(drops, key=lambda r: r.value, default=None)


def certainty(history: History) -> Reading | None:
    """The student's entropy over the teacher's on the same answers; a hundredth of a nat keeps sharp teachers quiet."""
    own, theirs = history.recent("entropy"), history.recent("teacher_entropy")
    if own is None or theirs is None:
        return None
    text = f"the student's entropy is {own:.3f} nats where the teacher's is {theirs:.2f}"
    return Reading((own + 0.01) / (theirs + 0.01), text)


def distance(history: History) -> Reading | None:
    """KL per token to the initial student."""
    kl = history.recent("kl")
    return None if kl is None else Reading(kl, f"KL to the initial student is {kl:.2f} nats per token")


def _over_usual(history: History, name: str, what: str) -> Reading | None:
    """Median of the last lines over the median of those before: one spike is none."""
    values = list(history.values.get(name, ()))
    before = values[:-WINDOW]
    if len(before) < USUAL or median(before) <= 0:
        return None
    now, usual = median(values[-WINDOW:]), median(before)
    return Reading(now / usual, f"{what} is {now:.3g}, usually {usual:.3g}")


def value_loss(history: History) -> Reading | None:
    """The critic's loss over what is usual."""
    return _over_usual(history, "value_loss", "the critic's loss")


def gradient_norm(history: History) -> Reading | None:
    """The gradient's norm over what is usual."""
    return _over_usual(history, "grad_norm", "the gradient's norm")


def critic_fit(history: History) -> Reading | None:
    """Explained variance of the critic."""
    fit = history.recent("explained_variance", USUAL)
    return None if fit is None else Reading(fit, f"the critic's explained variance is {fit:.2f}")


def clipped(history: History) -> Reading | None:
    """Share of tokens whose ratio PPO clips."""
    share = history.recent("clip_fraction")
    return None if share is None else Reading(share, f"{100 * share:.0f} % of the ratios lie outside the clip range")


def _objective(history: History) -> str:
    """What training lowers: regret; in TKD a term that is always on, as others join later; else the loss."""
    return next((name for name in ("regret", "ce", "kd") if name in history.first), "loss")


def rise(history: History) -> Reading | None:
    """Regret (RL) or loss over its lowest; a fifth of the first reading on both sides, or small ones would swing."""
    name = _objective(history)
    now = history.recent(name, USUAL)
    if now is None:
        return None
    lowest, slack = history.lowest(name, USUAL), abs(history.first[name]) / 5
    value = (now + slack) / (lowest + slack) if lowest + slack > 0 else 1.0
    return Reading(value, f"{name} is {now:.3g}, it was {lowest:.3g}")


def held_out_loss(history: History) -> Reading | None:
    """Largest share by which a held-out score fell below its best while training went on improving.

    Regret counts in RL only (empty answers of an untrained student have a low one), and half of training's first is
    added to the best, which may be near 0.
    """
    objective = _objective(history)
    now = history.recent(objective)
    if now is None or now > history.first[objective]:
        return None
    losses = []
    for name, values in history.values.items():
        if not name.startswith("eval_") or name in NOT_A_SCORE or len(values) < 3:
            continue
        regret = "regret" in name
        if regret and objective != "regret":
            continue
        lower = name.removeprefix("eval_") in LOWER_IS_BETTER
        recent, best = mean(list(values)[-2:]), (min if lower else max)(values)
        scale = abs(best) + (history.first["regret"] / 2 if regret else 0.0)
        fall = (recent - best if lower else best - recent) / scale if scale else 0.0
        losses.append(Reading(fall, f"{name} is {recent:.3g}, it was {best:.3g}, while training lowers {objective}"))
    return max(losses, key=lambda r: r.value, default=None)


ALARMS = (
    Alarm(
        "length_collapse",
        "Answers have become much shorter: the student may be taking the EOS shortcut.",
        "Lower lam towards 0, raise kl_coef, or warm up longer before RL.",
        ("length", "eval_length"),
        shortest,
        0.7,
        below=True,
    ),
    Alarm(
        "run_on",
        "Answers have become much longer: the student does not see that going on costs.",
        "Raise lam (a short horizon ignores what follows), raise kl_coef, or lower learning_rate.",
        ("length", "eval_length"),
        longest,
        1.2,
    ),
    Alarm(
        "finish_rate_drop",
        "Fewer answers end before max_new_tokens than at the start.",
        "Raise lam or kl_coef; if the answers are right but long, raise max_new_tokens.",
        ("finish_rate", "eval_finish_rate"),
        unfinished,
        0.1,
    ),
    Alarm(
        "entropy_collapse",
        "The student is nearly certain where the teacher is not: sampling explores nothing more.",
        "Raise entropy_coef or kl_coef, or lower learning_rate.",
        ("entropy",),
        certainty,
        0.1,
        below=True,
    ),
    Alarm(
        "kl_runaway",
        "The student has left the initial student far behind.",
        "Raise kl_coef, set kl_target, or lower learning_rate.",
        ("kl",),
        distance,
        1.0,
    ),
    Alarm(
        "kl_negative",
        "The mean KL estimate is far below 0, which it cannot be if answers come from the policy that is scored.",
        "Sampling and scoring disagree: check the precision (bf16), dropout (must be 0) and changes to sampling.",
        ("kl",),
        distance,
        -0.1,
        below=True,
    ),
    Alarm(
        "value_loss_explosion",
        "The critic's loss is many times what it was.",
        "Lower learning_rate, value_coef or value_clip_range.",
        ("value_loss",),
        value_loss,
        10.0,
    ),
    Alarm(
        "critic_misled",
        "The critic stays worse than a constant: it adds variance.",
        "Lower learning_rate, raise value_coef, or choose another baseline.",
        ("explained_variance",),
        critic_fit,
        -0.2,
        below=True,
    ),
    Alarm(
        "clip_saturated",
        "PPO clips so many ratios that most of each later pass teaches nothing.",
        "Lower learning_rate, epochs_per_rollout or minibatches_per_rollout.",
        ("clip_fraction",),
        clipped,
        0.3,
    ),
    Alarm(
        "gradient_spikes",
        "Gradients are several times what they were.",
        "Lower learning_rate or max_grad_norm, lengthen warmup_steps, or use larger batches.",
        ("grad_norm",),
        gradient_norm,
        5.0,
    ),
    Alarm(
        "objective_rising",
        "What training should lower (regret in RL, else the loss) has risen well above its lowest.",
        "Lower learning_rate, and go back to an earlier checkpoint.",
        ("regret", "ce", "kd", "loss"),
        rise,
        1.3,
    ),
    Alarm(
        "held_out_worse",
        "Training improves but held-out regret or a held-out score gets worse: overfitting, or a reward misused.",
        "Stop at the best checkpoint (load_best_model_at_end, early_stopping_patience), raise kl_coef, use more data.",
        ("eval_seconds", "eval_runtime"),
        held_out_loss,
        0.1,
    ),
)
