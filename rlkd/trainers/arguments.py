"""Settings of the trainers, on top of transformers' TrainingArguments (its fields are never repeated here)."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from transformers import TrainingArguments

from ..checks import Count, Fraction, Natural, NonNegative, OneOf, Positive, check_settings
from ..errors import ConfigError
from ..io.redaction import redacted
from ..metrics import held_out
from ..objectives.advantages import BASELINES
from ..objectives.divergences import DIVERGENCES
from ..objectives.rewards import REWARDS
from .environment import check_half_precision, check_launch, use_one_gpu

# Objectives of supervised distillation: cross-entropy on the labels, or a divergence, user-defined ones included.
IMITATION: ChainMap[str, Any] = ChainMap(DIVERGENCES, {"sequence": None})


def _require(condition: bool, name: str, value: object, constraint: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: {constraint}")


@dataclass
class StudentArguments(TrainingArguments):
    """Settings of all rlkd trainers.

    Where these differ from TrainingArguments' own defaults: NaN losses are shown (and stopped), nothing is reported
    to a tracker unless requested, columns are kept for the collators, and a resumed run restores its callbacks.
    """

    allow_config_change: bool = field(
        default=False, metadata={"help": "Resume a checkpoint that was written with other settings."}
    )
    alarms: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={"help": "When a logged number crosses a threshold of docs/guards.md: warn, or save and exit with 5."},
    )
    early_stopping_patience: Count | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement; null: never."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Always on: a resumed run keeps its early-stopping count."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Always off: a NaN loss must not be hidden."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always off: the collators use all columns."})

    def to_dict(self) -> dict[str, Any]:
        """As in TrainingArguments, without secrets: trackers get it."""
        return redacted(super().to_dict())

    def __post_init__(self) -> None:
        check_settings(self)
        check_launch(self)
        self.run_name = redacted(self.run_name)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not held_out(self.metric_for_best_model).lower_is_better
        super().__post_init__()
        use_one_gpu(self)
        patience = self.early_stopping_patience
        if patience is not None:
            _require(
                self.load_best_model_at_end,
                "early_stopping_patience",
                patience,
                "needs load_best_model_at_end: true (and eval_strategy, save_strategy: epoch or steps)",
            )
        _require(
            not self.load_best_model_at_end or self.save_strategy != "steps" or self.save_steps == self.eval_steps,
            "save_steps",
            self.save_steps,
            f"load_best_model_at_end keeps an evaluated step only if it is saved: set it to eval_steps = "
            f"{self.eval_steps}, or save_strategy to best",
        )


@dataclass
class DistillationArguments(StudentArguments):
    """Settings of all trainers of generating students."""

    max_input_tokens: Count = field(default=512, metadata={"help": "Prompts are cut to this many tokens."})
    max_new_tokens: Count = field(default=64, metadata={"help": "Answers are cut to this many tokens."})
    eval_limit: Count | None = field(
        default=512, metadata={"help": "Evaluate on at most this many inputs; null for all."}
    )
    sample_table_rows: Natural = field(
        default=4, metadata={"help": "Rows of the prompt / student / teacher / reward table shown at each evaluation."}
    )

    def __post_init__(self) -> None:
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "regret"
        super().__post_init__()
        check_half_precision(self.mixed_precision, setting=self.fp16)


@dataclass
class SupervisedArguments(DistillationArguments):
    """Warm-up on pseudo-labels, or word-level distillation on their prefixes."""

    objective: Annotated[str, OneOf(IMITATION)] = field(
        default="sequence",
        metadata={
            "help": "sequence: cross-entropy on the labels (SeqKD). Others: that divergence to the teacher at every "
            "label prefix."
        },
    )
    temperature: Positive = field(default=1.0, metadata={"help": "Divergences: temperature of both softmaxes."})
    alpha: Fraction | None = field(
        default=None, metadata={"help": "Weight of the teacher in the mixture of skew_forward_kl; null is 0.1."}
    )
    beta: Fraction | None = field(
        default=None, metadata={"help": "Weight of the teacher in the mixture of jensen_shannon; null is 0.5."}
    )
    learning_rate: NonNegative = field(default=3e-4, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        divergence = DIVERGENCES.get(self.objective)
        takes = [] if divergence is None else ["temperature", *(name for name, _ in divergence.parameters)]
        for name, default in (("temperature", 1.0), ("alpha", None), ("beta", None)):
            value = getattr(self, name)
            _require(
                value == default or name in takes,
                name,
                value,
                f"objective = {self.objective!r} does not take it: leave it out"
                + (f"; it takes {', '.join(takes)}" if takes else ""),
            )
            _require(
                name == "temperature" or value not in (0.0, 1.0), name, value, "must be between 0 and 1, both excluded"
            )


@dataclass
class OnPolicyArguments(DistillationArguments):
    """Settings of rollouts, shared by all on-policy objectives."""

    rollouts_per_prompt: Count = field(default=4, metadata={"help": "Answers sampled for each prompt."})
    epochs_per_rollout: Count = field(default=1, metadata={"help": "Passes over each batch of rollouts."})
    minibatches_per_rollout: Count = field(default=1, metadata={"help": "Optimizer steps per pass."})
    sync_every: Count = field(
        default=1, metadata={"help": "Rollout batches between copies of the student into the behaviour policy."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.rows_per_rollout
        _require(
            rows % self.rollouts_per_prompt == 0,
            "rollouts_per_prompt",
            self.rollouts_per_prompt,
            f"must divide the {rows} answers of a rollout batch (per_device_train_batch_size x "
            "gradient_accumulation_steps x minibatches_per_rollout)",
        )
        # The Trainer also saves at max_steps.
        for name in {"steps": ("save_steps", "max_steps"), "best": ("eval_steps",)}.get(self.save_strategy, ()):
            steps = getattr(self, name) or 0
            _require(
                steps <= 0 or self.updates_per_rollout == 1 or steps % self.updates_per_rollout == 0,
                name,
                steps,
                f"checkpoints fall between rollout batches: use a multiple of {self.updates_per_rollout} "
                "(epochs_per_rollout x minibatches_per_rollout)",
            )

    @property
    def rows_per_rollout(self) -> int:
        """Answers one process samples for one rollout batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.minibatches_per_rollout

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout batch."""
        return self.epochs_per_rollout * self.minibatches_per_rollout


@dataclass
class RLArguments(OnPolicyArguments):
    """Reward, credit and KL penalty, shared by REINFORCE and PPO."""

    # Reward
    reward_value: Annotated[str, OneOf(REWARDS)] = field(
        default="max",
        metadata={"help": "V of the induced reward: max (regret, length-neutral), lse (log-likelihood), softmax."},
    )
    # Credit
    baseline: Annotated[str, OneOf(BASELINES)] = field(
        default="leave_one_out",
        metadata={"help": "Subtracted from the credit; does not change the expected gradient."},
    )
    gamma: Fraction = field(default=1.0, metadata={"help": "Discount, the same in reward and return."})
    lam: Fraction = field(
        default=0.2,
        metadata={"help": "Credit horizon: 0 own regret only .. 1 full return (docs/method.md, Choosing lam)."},
    )
    k_step: Count = field(default=1, metadata={"help": "Keep every K-th regret of the return (K-step); 1 keeps all."})
    length_normalised: bool = field(
        default=False,
        metadata={"help": "Divide the credit of what follows a token by the number of tokens that follow (MiniLLM)."},
    )
    one_step: Literal["exact", "sampled"] = field(
        default="exact",
        metadata={
            "help": "exact: the immediate term's gradient over the whole vocabulary; sampled: of the drawn token."
        },
    )
    cut_answers: Literal["keep", "drop", "end_price"] = field(
        default="keep",
        metadata={
            "help": "Answers without an end: keep adds nothing beyond the cut, drop leaves them out of the loss, "
            "end_price charges the last token the reward of the missing end (max: its regret)."
        },
    )
    whiten_advantages: bool = field(
        default=False,
        metadata={
            "help": "Advantages to mean 0 over the batch's tokens, divided by the deviation of the whole credit."
        },
    )
    # Loss
    loss_reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = field(
        default="token_mean", metadata={"help": "How token losses are averaged; determines the weight of long answers."}
    )
    entropy_coef: NonNegative = field(default=0.0, metadata={"help": "Weight of the entropy bonus, nats per token."})
    kl_coef: NonNegative = field(
        default=0.05,
        metadata={"help": "Weight of the KL penalty to the reference policy (initial student); 0: off."},
    )
    kl_target: Positive | None = field(
        default=None, metadata={"help": "Target KL per token, reached by adapting kl_coef; null: kl_coef is fixed."}
    )
    kl_in: Literal["loss", "reward"] = field(
        default="loss", metadata={"help": "KL penalty as a term of the loss, or in the reward (the sampled k1)."}
    )
    kl_estimator: Literal["exact", "k2"] | None = field(
        default=None,
        metadata={
            "help": "KL in the loss: exact, over the vocabulary (as null), or k2 of the sampled token (cheaper)."
        },
    )
    value_coef: NonNegative = field(default=0.5, metadata={"help": "Weight of the critic's loss."})
    value_clip_range: Positive = field(
        default=5.0, metadata={"help": "Clip range of the critic's change per rollout batch, nats."}
    )
    value_learning_rate: Positive | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic; null: that of the student."}
    )
    value_warmup_updates: Natural = field(
        default=0, metadata={"help": "First updates, in which only the critic is trained (the schedule runs on)."}
    )
    weak_start: Literal["warn", "refuse", "ignore"] = field(
        default="warn",
        metadata={"help": "If regret per sequence is not well below the cost of an early end-of-sequence."},
    )
    learning_rate: NonNegative = field(default=1e-5, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave_one_out":
            _require(
                self.rollouts_per_prompt >= 2,
                "rollouts_per_prompt",
                self.rollouts_per_prompt,
                "baseline leave_one_out needs at least 2",
            )
        if self.k_step > 1:
            _require(
                not BASELINES[self.baseline].critic,
                "baseline",
                self.baseline,
                "k_step > 1 does not support a critic: choose another baseline or k_step 1",
            )
        if self.length_normalised:
            for name, value, fits, why in (
                ("baseline", self.baseline, self.baseline != "none", "V(s_t) is a part of the sum, not of a mean"),
                ("k_step", self.k_step, self.k_step == 1, "its number of terms is not what follows"),
                ("lam", self.lam, self.gamma * self.lam > 0, "with gamma or lam 0 there is no future to normalise"),
            ):
                _require(fits, name, value, f"length_normalised does not take it ({why}): change one of the two")
        _require(
            self.one_step != "exact" or REWARDS[self.reward_value].expected is not None,
            "one_step",
            self.one_step,
            f"reward_value {self.reward_value} has no exact expectation: use sampled",
        )
        for name, unset in (("value_learning_rate", None), ("value_warmup_updates", 0)):
            _require(
                getattr(self, name) == unset or (BASELINES[self.baseline].critic and self.value_coef > 0),
                name,
                getattr(self, name),
                "of the critic, which only baseline critic with value_coef > 0 trains: leave it out",
            )
        _require(
            not 0 < self.max_steps <= self.value_warmup_updates,
            "value_warmup_updates",
            self.value_warmup_updates,
            f"the student would never be trained in max_steps = {self.max_steps}: use fewer",
        )
        _require(
            self.kl_estimator is None or (self.kl_coef > 0 and self.kl_in == "loss"),
            "kl_estimator",
            self.kl_estimator,
            "of the KL penalty in the loss, which kl_coef 0 and kl_in reward do not have: leave it out",
        )
        if self.kl_target is not None:
            _require(self.kl_coef > 0, "kl_target", self.kl_target, "needs a starting kl_coef > 0")


@dataclass
class ReinforceArguments(RLArguments):
    """REINFORCE: one pass over fresh rollouts, off-policy weights when the behaviour policy lags."""

    importance_weight: Literal["none", "token", "cumulative"] = field(
        default="cumulative", metadata={"help": "Importance weights for a behaviour policy older than the student."}
    )
    importance_cap: Positive = field(default=2.0, metadata={"help": "Upper bound of the importance weights."})


@dataclass
class PPOArguments(RLArguments):
    """PPO: several passes over each rollout batch, clipped ratio, learned critic."""

    epochs_per_rollout: Count = field(default=2, metadata={"help": "Passes over each batch of rollouts."})
    minibatches_per_rollout: Count = field(default=2, metadata={"help": "Optimizer steps per pass."})
    baseline: Annotated[str, OneOf(BASELINES)] = field(
        default="critic", metadata={"help": "Subtracted from the credit; critic: a learned value head."}
    )
    clip_range: Positive = field(default=0.2, metadata={"help": "PPO's clip range: ratios are clipped to 1 +- this."})
    dual_clip: Positive | None = field(
        default=None,
        metadata={"help": "Bound c > 1 of the loss of a token with a negative advantage, c |advantage|; null: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "must be above 1")
