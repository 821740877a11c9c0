"""Settings of the distillation of encoder-only students; the student itself is cut by `build_student`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge

from ...checks import Count, Fraction, NonNegative, OneOf, Positive, check_choice
from ...errors import ConfigError
from ...models.encoders.outputs import Need
from ..base_arguments import StudentArguments, require
from .terms import PRESETS, TERMS, needs_of

# What each kind of cache holds; `needed` holds what the terms need.
CACHED: dict[str, frozenset[Need]] = {
    "logits": frozenset({"logits"}),
    "cls": frozenset({"logits", "cls"}),
    "hidden": frozenset({"logits", "cls", "hidden"}),
}
# Settings that a single term reads.
READ_BY = {"noise_probability": "noisy", "noise_deviation": "noisy", "relation_heads": "relations"}


@dataclass
class TKDArguments(StudentArguments):
    """Terms of the loss and their weights, the tree, and the cache of teacher outputs. Raises ConfigError."""

    # Loss
    preset: Annotated[str, OneOf(PRESETS)] = field(
        default="tkd", metadata={"help": "Method: which terms are on (docs/tkd.md); custom: those of terms alone."}
    )
    terms: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Weights of further terms by name, and of the preset's terms that have no setting."},
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
    noise_probability: Fraction = field(
        default=0.5, metadata={"help": "Share of rows whose teacher logits get noise (term noisy)."}
    )
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
    relation_heads: Count | None = field(
        default=None, metadata={"help": "Heads of the term relations; null: the teacher's attention heads."}
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
    teacher_cache: Literal["none", "needed", "logits", "cls", "hidden"] = field(
        default="none",
        metadata={"help": "Teacher outputs to precompute and cache per row; needed: what the terms need."},
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
        self._check_terms()
        self._check_weights()
        self._check_cache()
        if self.max_steps <= 0 and any(TERMS[name].late for name in self.weights):
            require(
                self.tree_start_epoch < self.num_train_epochs,
                "tree_start_epoch",
                self.tree_start_epoch,
                f"must be less than num_train_epochs = {self.num_train_epochs:g}, or the tree never starts",
            )

    def _check_terms(self) -> None:
        if isinstance(self.terms, str):
            try:
                self.terms = json.loads(self.terms)
            except ValueError:
                raise ConfigError(f"terms = {self.terms!r}: must be a mapping such as {{gram: 10}}") from None
        if not isinstance(self.terms or {}, dict):
            raise ConfigError(f"terms = {self.terms!r}: must be a mapping such as {{gram: 10}}")
        for name, weight in dict(self.terms or {}).items():  # type: ignore[arg-type]
            check_choice("terms", name, TERMS)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            require(number and 0 <= weight < math.inf, f"terms: {name}", weight, "must be a number, at least 0")
            if name in PRESETS[self.preset] and TERMS[name].setting:
                raise ConfigError(
                    f"terms: {name} is in preset {self.preset!r}, where {TERMS[name].setting} is its weight. Set that."
                )

    def _check_weights(self) -> None:
        if self.preset == "custom" and not self.terms:
            raise ConfigError(f"preset = 'custom' needs terms, e.g. {{ce: 1, gram: 10}}. There are {', '.join(TERMS)}.")
        if not any(self.tree_start_epoch == 0 or not TERMS[name].late for name in self.weights):
            raise ConfigError(
                f"preset = {self.preset!r}: no term has a weight above 0 at the start. Raise w_ce, w_kd or beta, or "
                "set terms."
            )
        require(
            any(TERMS[name].of_logits for name in self.weights) or not self.auto_scale,
            "auto_scale",
            True,
            "scales to CE and KD: w_ce or w_kd must not be 0",
        )
        for name, term in READ_BY.items():
            changed = getattr(self, name) != type(self).__dataclass_fields__[name].default
            require(
                not changed or term in self.weights, name, getattr(self, name), f"has no effect without the term {term}"
            )
        require(
            "gradient" not in self.weights or not self.gradient_checkpointing,
            "gradient_checkpointing",
            True,
            "checkpoints cannot be differentiated twice, as the term gradient needs",
        )

    def _check_cache(self) -> None:
        if self.teacher_cache == "none":
            return
        if not self.uses_teacher:
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} uses no teacher. Set it to none."
            )
        needs = self.teacher_needs
        if "tree" in needs:
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} grows a tree in the teacher's "
                "attention, which is not cached. Set it to none, or choose a preset without a teacher tree."
            )
        if not needs <= self.cached:
            least = [kind for kind, held in CACHED.items() if needs <= held]
            fitting = f"'{least[0]}'{' or hidden' if least[0] == 'cls' else ''}" if least else "'needed'"
            raise ConfigError(
                f"teacher_cache = {self.teacher_cache!r}: preset {self.preset!r} needs {fitting}, or none"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that is on: those of the preset and of `terms` with a weight above 0."""
        own = {} if self.preset == "ft" else {name: TERMS[name].setting for name in PRESETS[self.preset]}
        given = {name: getattr(self, setting) if setting else 1.0 for name, setting in own.items()}
        given |= {"ce": 1.0} if self.preset == "ft" else {}
        given |= dict(self.terms or {})  # type: ignore[arg-type]
        return {name: float(weight) for name, weight in given.items() if weight > 0}

    @property
    def uses_teacher(self) -> bool:
        """Whether a term that is on compares with a teacher."""
        return bool(self.teacher_needs)

    @property
    def teacher_needs(self) -> frozenset[Need]:
        """What the terms that are on need of the teacher, besides its logits where they need anything."""
        needs = needs_of(self.weights, "teacher")
        return needs | {"logits"} if needs else needs

    @property
    def student_needs(self) -> frozenset[Need]:
        """What the terms that are on need of the student, besides its logits."""
        return needs_of(self.weights, "student")

    @property
    def cached(self) -> frozenset[Need]:
        """What of the teacher is cached."""
        return CACHED.get(self.teacher_cache, self.teacher_needs if self.teacher_cache == "needed" else frozenset())
