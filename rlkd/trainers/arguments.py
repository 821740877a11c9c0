"""Settings of the trainers of generating students."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..checks import Count, Fraction, Natural, NonNegative, OneOf, Positive
from ..evaluation.task_reward import check_task_reward
from ..objectives.advantages import BASELINES
from ..objectives.rewards import REWARDS
from .base_arguments import DistillationArguments
from .base_arguments import require as _require
from .supervised_arguments import DivergenceArguments
from .supervised_arguments import SupervisedArguments as SupervisedArguments


@dataclass
class OnPolicyArguments(DistillationArguments):
    """Settings of rollouts, shared by all on-policy objectives."""

    rollouts_per_prompt: Count = field(default=4, metadata={"help": "Answers sampled for each prompt."})
    epochs_per_rollout: Count = field(default=1, metadata={"help": "Passes over each batch of rollouts."})
    minibatches_per_rollout: Count = field(default=1, metadata={"help": "Optimizer steps per pass."})
    sync_every: Count = field(
        default=1, metadata={"help": "Rollout batches between copies of the student into the behaviour policy."}
    )
    rollout_temperature: Positive = field(default=1.0, metadata={"help": "Temperature of rollouts, at most 10."})
    rollout_top_p: Fraction = field(
        default=1.0,
        metadata={"help": "Rollouts draw from the most probable tokens that reach this probability; 1: from all."},
    )
    teacher_mix: Fraction = field(
        default=0.0, metadata={"help": "Share of the teacher in what rollouts are drawn from (MiniLLM: 0.2)."}
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
        heat, top_p, mix = self.rollout_temperature, self.rollout_top_p, self.teacher_mix
        _require(heat <= 10, "rollout_temperature", heat, "must be at most 10")
        _require(top_p > 0, "rollout_top_p", top_p, "must be above 0 (1 draws from all tokens)")
        _require(mix < 1, "teacher_mix", mix, "must be below 1 (labels are the teacher's own answers)")
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
    def samples_itself(self) -> bool:
        """Whether rollouts are drawn from the behaviour policy as it is."""
        return self.rollout_temperature == 1 and self.rollout_top_p == 1 and self.teacher_mix == 0

    @property
    def rows_per_update(self) -> int:
        """Answers of one process that an optimizer step is on."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_per_rollout(self) -> int:
        """Answers one process samples for one rollout batch."""
        return self.rows_per_update * self.minibatches_per_rollout

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout batch."""
        return self.epochs_per_rollout * self.minibatches_per_rollout


@dataclass
class GKDArguments(OnPolicyArguments, DivergenceArguments):
    """GKD: a divergence at every prefix of the student's own answers or of labels."""

    on_policy_fraction: Fraction = field(
        default=1.0,
        metadata={"help": "Probability that a batch's answers are the student's and not labels (lambda of GKD)."},
    )
    rollouts_per_prompt: Count = field(default=1, metadata={"help": "Answers sampled for each prompt."})
    learning_rate: NonNegative = field(default=1e-5, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.samples_itself or self.on_policy_fraction > 0,
            "on_policy_fraction",
            self.on_policy_fraction,
            "there are no rollouts for rollout_temperature, rollout_top_p or teacher_mix: leave them out",
        )

    @property
    def reads_labels(self) -> bool:
        return self.on_policy_fraction < 1

    @property
    def label_setting(self) -> str:
        return f"on_policy_fraction = {self.on_policy_fraction:g}"


@dataclass
class RLArguments(OnPolicyArguments):
    """Reward, credit and KL penalty, shared by REINFORCE and PPO."""

    # Reward
    reward_value: Annotated[str, OneOf(REWARDS)] = field(
        default="max",
        metadata={"help": "V of the induced reward: max (regret, length-neutral), lse (log-likelihood), softmax."},
    )
    task_reward: str | None = field(
        default=None,
        metadata={
            "help": "A score of each sampled answer beside the teacher's reward: rouge1, rouge2, rougeL, exact_match, "
            "or module:function of (answers, examples), one number per answer."
        },
    )
    task_reward_coef: NonNegative = field(
        default=1.0, metadata={"help": "Weight of task_reward, which is in its own unit; 0 only logs it."}
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
    entropy_in: Literal["loss", "reward"] = field(
        default="loss",
        metadata={
            "help": "loss: the exact entropy at each visited state; reward: -log pi of each token, so that credit also "
            "counts the entropy of what follows (with entropy_coef 1 and lse the reward is log p - log pi)."
        },
    )
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
    importance_weight: Literal["none", "token", "cumulative"] = field(
        default="cumulative",
        metadata={"help": "Weights of answers of an older policy (REINFORCE), a temperature or the teacher's share."},
    )
    importance_cap: Positive = field(default=2.0, metadata={"help": "Upper bound of the importance weights."})
    imitation_coef: NonNegative = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy on as many pseudo-labels as answers in the same update, nats per "
            "label token."
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

    @property
    def reads_labels(self) -> bool:
        return self.imitation_coef > 0

    @property
    def label_setting(self) -> str:
        return f"imitation_coef = {self.imitation_coef:g}"

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
        self._check_entropy()
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
        _require(
            self.importance_weight != "none" or self.importance_cap == RLArguments.importance_cap,
            "importance_cap",
            self.importance_cap,
            "importance_weight none has no weights to truncate: leave it out",
        )
        check_task_reward(self.task_reward, self.task_reward_coef, self.rollouts_per_prompt)
        if self.kl_target is not None:
            _require(self.kl_coef > 0, "kl_target", self.kl_target, "needs a starting kl_coef > 0")

    def _check_entropy(self) -> None:
        sums_nothing = self.gamma * self.lam == 0 or self.k_step >= self.max_new_tokens
        _require(
            self.entropy_in == "loss" or self.entropy_coef > 0,
            "entropy_in",
            self.entropy_in,
            "entropy_coef is 0: raise it, or leave entropy_in out",
        )
        _require(
            self.entropy_in == "loss" or self.one_step == "sampled" or not sums_nothing,
            "entropy_in",
            self.entropy_in,
            f"with one_step exact and no credit for what follows (gamma = {self.gamma:g}, lam = {self.lam:g}, k_step = "
            f"{self.k_step}) it is the same as loss: leave it out, or raise lam",
        )


@dataclass
class ReinforceArguments(RLArguments):
    """REINFORCE: one pass over fresh rollouts, off-policy weights when the behaviour policy lags."""


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
        for name in ("importance_weight", "importance_cap"):
            value = getattr(self, name)
            _require(
                not self.samples_itself or value == getattr(RLArguments, name),
                name,
                value,
                "PPO weights answers of rollout_temperature, rollout_top_p and teacher_mix alone: leave it out",
            )
