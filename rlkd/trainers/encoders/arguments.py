"""Settings of the distillation of encoder-only students; the student itself is cut by `build_student`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from ...checks import Count, Fraction, NonNegative, OneOf, Positive
from ...errors import ConfigError
from ...objectives.encoder import PRESETS, TREE_TERMS
from ..base_arguments import StudentArguments, require

STUDENT_TREE = {"td_student", "td_random"}
CACHE_ORDER = ("none", "logits", "cls", "hidden")


@dataclass
class TKDArguments(StudentArguments):
    """Terms of the loss and their weights, the tree, and the cache of teacher outputs."""

    # Loss
    preset: Annotated[str, OneOf(PRESETS)] = field(
        default="tkd", metadata={"help": "Row of the paper's Table 1: which terms are on (docs/tkd.md)."}
    )
    w_ce: NonNegative = field(
        default=0.5, metadata={"help": "Weight of cross-entropy with the labels (1 in preset ft)."}
    )
    w_kd: NonNegative = field(default=0.5, metadata={"help": "Weight of the teacher's logits."})
    beta: NonNegative = field(default=100.0, metadata={"help": "Weight of the patient-KD term: [CLS] at every layer."})
    gamma_s: NonNegative = field(
        default=100.0, metadata={"help": "Weight of the tree grown in the student's attention."}
    )
    gamma_t: NonNegative = field(
        default=100.0, metadata={"help": "Weight of the tree grown in the teacher's attention."}
    )
    gamma_r: NonNegative = field(
        default=100.0, metadata={"help": "Weight of the term over random tokens, as many as in the tree."}
    )
    eta: NonNegative = field(default=100.0, metadata={"help": "Weight of the term over all tokens."})
    auto_scale: bool = field(
        default=False,
        metadata={"help": "Replaces beta, gamma, eta: at its first step, each such term equals CE + KD."},
    )
    # Logits
    temperature: Positive = field(default=5.0, metadata={"help": "Softmax temperature of the KD term."})
    logit_loss: Literal["kl", "mse"] = field(
        default="kl", metadata={"help": "KD term: KL at the temperature, or squared error of the logits."}
    )
    noise_probability: Fraction = field(default=0.0, metadata={"help": "Share of rows whose teacher logits get noise."})
    noise_deviation: NonNegative = field(default=0.5, metadata={"help": "Relative standard deviation of that noise."})
    # Hidden states
    normalise: bool = field(
        default=True, metadata={"help": "Compare normalised states; false: the states themselves (un-normalised PKD)."}
    )
    distance_reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "Reduction of squared distances; sum needs far smaller weights."}
    )
    layer_map: list[int] | None = field(
        default=None, metadata={"help": "The teacher's layer for each student layer; null spreads them evenly."}
    )
    patience_last_layer: bool = field(
        default=True, metadata={"help": "Last layer in the patient-KD term too (eq. 7); PKD's authors leave it out."}
    )
    # Tree
    tree_m: Count = field(default=2, metadata={"help": "Children of each node."})
    tree_variant: Literal["algorithm1", "abstract", "flow"] = field(
        default="algorithm1", metadata={"help": "Three readings of the paper's tree (docs/tkd.md)."}
    )
    tree_multiplicity: bool = field(default=False, metadata={"help": "Count a token once for each parent."})
    tree_exclude: list[Annotated[str, OneOf(("self", "cls", "sep"))]] = field(
        default_factory=list, metadata={"help": "Tokens that are never chosen."}
    )
    tree_start_epoch: NonNegative = field(
        default=0.0, metadata={"help": "For this many epochs, only CE, KD and patient-KD are on."}
    )
    # Teacher and texts
    teacher_cache: Literal["none", "logits", "cls", "hidden"] = field(
        default="none", metadata={"help": "Teacher outputs to precompute and cache per row."}
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cache, which runs can share; null: inside output_dir."}
    )
    max_length: Annotated[int, Ge(3)] = field(
        default=128, metadata={"help": "Texts are cut to this many tokens, [CLS] and [SEP] included."}
    )
    learning_rate: NonNegative = field(default=2e-5, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights()
        self._check_cache()
        if self.max_steps <= 0 and any(name in TREE_TERMS for name in self.weights):
            require(
                self.tree_start_epoch < self.num_train_epochs,
                "tree_start_epoch",
                self.tree_start_epoch,
                f"must be less than num_train_epochs = {self.num_train_epochs:g}, or the tree never starts",
            )

    def _check_weights(self) -> None:
        logits = self.weights.keys() & {"ce", "kd"}
        first = self.weights.keys() - (set(TREE_TERMS) if self.tree_start_epoch > 0 else set())
        if not first:
            raise ConfigError(
                f"preset = {self.preset!r}: no term has a weight above 0 at the start. Raise w_ce, w_kd or beta."
            )
        require(
            bool(logits) or not self.auto_scale,
            "auto_scale",
            True,
            "scales to CE and KD: w_ce or w_kd must not be 0",
        )

    def _check_cache(self) -> None:
        if self.teacher_cache == "none":
            return
        if self.teacher_needs == "none":
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} uses no teacher. Set it to none."
            )
        if "td_teacher" in self.weights:
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} grows a tree in the teacher's "
                "attention, which is not cached. Set it to none, or choose a preset without a teacher tree."
            )
        if CACHE_ORDER.index(self.teacher_cache) < CACHE_ORDER.index(self.teacher_needs):
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} needs '{self.teacher_needs}'"
                f"{' or hidden' if self.teacher_needs == 'cls' else ''}, or none"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that is on: those of the preset with a weight above 0."""
        if self.preset == "ft":
            return {"ce": 1.0}
        given = {
            "ce": self.w_ce,
            "kd": self.w_kd,
            "pt": self.beta,
            "td_student": self.gamma_s,
            "td_teacher": self.gamma_t,
            "td_random": self.gamma_r,
            "all": self.eta,
        }
        return {name: given[name] for name in PRESETS[self.preset] if given[name] > 0}

    @property
    def teacher_needs(self) -> str:
        """The minimum needed from the teacher: 'none', 'logits', 'cls' or 'hidden'."""
        if any(name in TREE_TERMS for name in self.weights):
            return "hidden"
        return "cls" if "pt" in self.weights else "logits" if "kd" in self.weights else "none"

    @property
    def tree_roles(self) -> tuple[str, ...]:
        """Whose attention the terms read: the student's, the teacher's, both or neither."""
        student = bool(self.weights.keys() & STUDENT_TREE)
        return ("student",) * student + ("teacher",) * ("td_teacher" in self.weights)
