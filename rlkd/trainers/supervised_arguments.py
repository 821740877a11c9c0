"""Settings of divergences, and of supervised distillation."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..checks import Fraction, NonNegative, OneOf, Positive
from ..objectives.divergences import DIVERGENCES
from .base_arguments import DistillationArguments
from .base_arguments import require as _require
from .plateau import complete_schedule, prepare_warm_up

# Objectives of supervised distillation: cross-entropy on the labels, or a divergence, user-defined ones included.
IMITATION: ChainMap[str, Any] = ChainMap(DIVERGENCES, {"sequence": None})


@dataclass
class DivergenceArguments(DistillationArguments):
    """A divergence between teacher and student at every prefix of given answers, and its parameters."""

    objective: Annotated[str, OneOf(DIVERGENCES)] = field(
        default="jensen_shannon", metadata={"help": "Divergence to the teacher at every prefix (docs/method.md)."}
    )
    temperature: Positive = field(default=1.0, metadata={"help": "Divergences: temperature of both softmaxes."})
    alpha: Fraction | None = field(
        default=None,
        metadata={
            "help": "skew_forward_kl, skew_reverse_kl: weight of the first distribution in the mixture (null: 0.1); "
            "alpha_beta: exponent of the teacher (null: 0.2)."
        },
    )
    beta: Fraction | None = field(
        default=None,
        metadata={
            "help": "jensen_shannon: weight of the teacher in the mixture (null: 0.5); alpha_beta: exponent of the "
            "student (null: 0.7)."
        },
    )

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
            # A mixture with weight 0 or 1 is no mixture; an exponent may be either.
            _require(
                name == "temperature" or self.objective == "alpha_beta" or value not in (0.0, 1.0),
                name,
                value,
                "must be between 0 and 1, both excluded",
            )
        _require(
            not (self.alpha == 0 and self.beta == 0),
            "alpha",
            self.alpha,
            "beta is 0, too, and alpha_beta has no such divergence: raise one of them",
        )


@dataclass
class SupervisedArguments(DivergenceArguments):
    """Warm-up on pseudo-labels, or word-level distillation on their prefixes."""

    objective: Annotated[str, OneOf(IMITATION)] = field(
        default="sequence",
        metadata={
            "help": "sequence: cross-entropy on the labels (SeqKD). Others: that divergence to the teacher at every "
            "label prefix."
        },
    )
    label_weights: Literal["equal", "probability"] = field(
        default="equal",
        metadata={
            "help": "sequence: several labels of one prompt count alike, or by the teacher's probability of each, "
            "which suits the distinct answers of beam search."
        },
    )
    until_ready: bool = field(
        default=False,
        metadata={
            "help": "Train until held-out regret stops falling, lowering the rate on the way, and say whether the "
            "student is ready for RL; max_steps or num_train_epochs is the upper bound."
        },
    )
    hidden_coef: NonNegative = field(
        default=0.0,
        metadata={
            "help": "Weight of the squared distance of the layers' outputs to the teacher's, on labels (TinyBERT, "
            "docs/method.md); encoder-decoder models."
        },
    )
    attention_coef: NonNegative = field(
        default=0.0, metadata={"help": "The same of self-attention scores; as many heads in both models."}
    )
    encoder_layer_map: list[int] | None = field(
        default=None, metadata={"help": "The teacher's layer for each encoder layer; null spreads them evenly."}
    )
    decoder_layer_map: list[int] | None = field(
        default=None, metadata={"help": "The teacher's layer for each decoder layer; null spreads them evenly."}
    )
    learning_rate: NonNegative = field(default=3e-4, metadata={"help": "Peak learning rate."})

    def __post_init__(self) -> None:
        if self.until_ready:
            prepare_warm_up(self)
        super().__post_init__()
        _require(
            self.label_weights == "equal" or self.objective == "sequence",
            "label_weights",
            self.label_weights,
            f"objective = {self.objective!r} learns distributions at the prefixes of labels, not the labels: set it to "
            "equal, or objective to sequence",
        )
        if self.until_ready:
            complete_schedule(self)
        for name in ("encoder_layer_map", "decoder_layer_map"):
            value = getattr(self, name)
            _require(
                value is None or bool(self.layer_weights),
                name,
                value,
                "compares no layers while hidden_coef and attention_coef are 0: leave it out",
            )
        _require(
            not (self.gradient_checkpointing and self.layer_weights),
            "gradient_checkpointing",
            True,
            f"the layers that {self.layer_setting} compares would have no gradient: turn it off, or set that to 0",
        )

    @property
    def layer_weights(self) -> dict[str, float]:
        """Weight of each term over layers that is on, by its name in the log."""
        weights = {"hidden_loss": self.hidden_coef, "attention_loss": self.attention_coef}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def layer_setting(self) -> str:
        """The setting that compares layers, with its value."""
        name = "hidden_coef" if self.hidden_coef > 0 else "attention_coef"
        return f"{name} = {getattr(self, name)}"

    @property
    def reads_labels(self) -> bool:
        return True
