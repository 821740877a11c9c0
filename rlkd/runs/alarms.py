"""The alarms: training that goes wrong while every number is still finite, and what to change (docs/guards.md).

An alarm is one entry of ALARMS: a measure (`rlkd.runs.measures`) and the threshold that it is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import measures
from .measures import History, Reading

SETTING = re.compile(r"\b(?:lam|\w+_\w+)\b")  # a name in an advice
CHOOSING_LAM = "in small steps (docs/method.md, Choosing lam)"


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


ALARMS = {
    alarm.name: alarm
    for alarm in (
        Alarm(
            name="length_collapse",
            meaning="Answers have become much shorter: the student may be exploiting the end-of-sequence shortcut.",
            advice=("warm up longer before RL", f"lower lam {CHOOSING_LAM}", "raise kl_coef"),
            reads=("length", "eval_length"),
            measure=measures.shortest,
            threshold=0.7,
            below=True,
        ),
        Alarm(
            name="run_on",
            meaning="Answers have become much longer: a short credit horizon makes continuing look free.",
            advice=("warm up longer before RL", f"raise lam {CHOOSING_LAM}", "raise kl_coef"),
            reads=("length", "eval_length"),
            measure=measures.longest,
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
            measure=measures.unfinished,
            threshold=0.1,
        ),
        Alarm(
            name="entropy_collapse",
            meaning="The student is nearly deterministic where the teacher is not: sampling no longer explores.",
            advice=("raise entropy_coef", "raise kl_coef", "lower learning_rate"),
            reads=("entropy",),
            measure=measures.certainty,
            threshold=0.1,
            below=True,
        ),
        Alarm(
            name="kl_runaway",
            meaning="The student has drifted far from the reference policy.",
            advice=("raise kl_coef", "set kl_target", "lower learning_rate"),
            reads=("kl",),
            measure=measures.distance,
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
            measure=measures.distance,
            threshold=-0.1,
            below=True,
        ),
        Alarm(
            name="value_loss_explosion",
            meaning="The critic's loss is many times its usual value.",
            advice=("lower learning_rate", "lower value_coef", "lower value_clip_range"),
            reads=("value_loss",),
            measure=measures.value_loss,
            threshold=10.0,
        ),
        Alarm(
            name="critic_misled",
            meaning="The critic remains worse than none: it adds variance.",
            advice=("raise value_learning_rate", "set value_warmup_updates", "choose another baseline"),
            reads=("value_gain",),
            measure=measures.critic_fit,
            threshold=-0.2,
            below=True,
        ),
        Alarm(
            name="clip_saturated",
            meaning="PPO clips so many ratios that later passes over a rollout batch contribute little.",
            advice=("lower learning_rate", "lower epochs_per_rollout", "lower minibatches_per_rollout"),
            reads=("clip_fraction",),
            measure=measures.clipped,
            threshold=0.3,
        ),
        Alarm(
            name="few_effective_samples",
            meaning="A few tokens carry most of the importance weight: gradients are as noisy as a small batch's.",
            advice=(
                "lower sync_every",
                "lower teacher_mix",
                "bring rollout_temperature closer to 1",
                "choose importance_weight: token",
                "use shorter answers (max_new_tokens)",
            ),
            reads=("effective_sample_size",),
            measure=measures.effective_share,
            threshold=0.2,
            below=True,
        ),
        Alarm(
            name="gradient_spikes",
            meaning="Gradient norms are several times their usual value.",
            advice=("lower learning_rate", "lower max_grad_norm", "lengthen warmup_steps", "use larger batches"),
            reads=("grad_norm",),
            measure=measures.gradient_norm,
            threshold=5.0,
        ),
        Alarm(
            name="objective_rising",
            meaning="What training minimizes (regret in RL, else the loss) has risen well above its minimum.",
            advice=("lower learning_rate and return to an earlier checkpoint",),
            reads=("regret", "ce", "kd", "loss"),
            measure=measures.rise,
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
            measure=measures.held_out_loss,
            threshold=0.1,
        ),
    )
}
