"""Whether a student is strong enough for long-horizon credit: measured before RL, and at the end of a warm-up."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..models.signals import LocalSource
from ..objectives.advantages import regret_per_sequence
from ..records import Answers, given
from ..sharding import unsharded

if TYPE_CHECKING:
    from .distillation import DistillationTrainer
    from .policy_gradient import PolicyGradientTrainer

logger = logging.getLogger(__name__)

# What the measurement reads of the teacher's signal.
START_NEEDS = frozenset({"chosen", "max", "distribution"})


def too_weak(regret: float, eos_price: float) -> bool:
    """Whether the regret of an answer is not well below the cost of an early end (nats): more than half of it."""
    return regret > 0.5 * eos_price


@dataclass(frozen=True)
class Start:
    """What a student's sampled answers cost it; docs/metrics.md defines the numbers (`start_*`).

    While a sequence's regret exceeds the cost of an early end, stopping early has the better return, and long-horizon
    credit learns it (docs/method.md, "the EOS shortcut").
    """

    regret: float
    eos_price: float
    length: float
    finish_rate: float

    @property
    def weak(self) -> bool:
        """As `too_weak`."""
        return too_weak(self.regret, self.eos_price)

    @classmethod
    def of(cls, sums: Tensor) -> Start:
        """From `start_sums` [6] over all processes."""
        rows, regret, length, finished, gap, states = sums.tolist()
        return cls(regret / rows, gap / max(states, 1), length / rows, finished / rows)

    def logged(self) -> dict[str, float]:
        """The numbers by their logged names."""
        return {f"start_{name}": value for name, value in asdict(self).items()}


@torch.no_grad()
def start_sums(trainer: DistillationTrainer, batches: Iterable[Answers]) -> Tensor:
    """[6]: answers sampled from the trainer's policy, their regret, tokens and ends; the cost of an end at the states
    at which they go on, and the number of these.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=trainer.args.device)
    for answers in batches:
        mask, prompts = answers.answer_mask, [example.teacher_inputs for example in answers.examples]
        signal, ends = trainer.teacher.score_ends(prompts, answers.answer_ids, mask, answers.ids)
        regret = regret_per_sequence(signal.chosen - given(signal.max), mask)
        columns = (torch.ones_like(regret), regret, mask.sum(1), given(answers.finished))
        sums += torch.cat([torch.stack([column.double().sum() for column in columns]), ends])
    return sums


class StartCheck(TrainerCallback):
    """Warns (or refuses, `weak_start`) when the student is too weak for the chosen credit horizon: once, before the
    first update, by the first rollout batch.
    """

    def __init__(self, trainer: PolicyGradientTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.weak_start == "ignore" or state.global_step > 0:
            return
        if not isinstance(self.trainer.teacher, LocalSource):
            missing = START_NEEDS - self.trainer.teacher.gives or {"cost of an early end"}
            message = (
                "whether the student is strong enough to start cannot be checked: the teacher provides no "
                f"{' and no '.join(sorted(missing))}"
            )
            if args.weak_start == "refuse":
                raise ConfigError(f"{message} (weak_start: refuse)")
            if state.is_world_process_zero:
                logger.warning(f"{message} (weak_start: ignore silences this)")
            return
        # Its strength is that of the student itself; lengths are compared with those of later rollouts.
        with unsharded(self.trainer.policy):
            rollouts = self.trainer.answers(0)
            drawn = rollouts if args.samples_itself else self.trainer.sample(0)
        with self.trainer.finite.together(rollouts.ids, rollouts):
            sums = start_sums(self.trainer, [rollouts])
        sums[2], sums[3] = drawn.answer_mask.sum(), given(drawn.finished).sum()
        start = Start.of(self.trainer.sum(sums))
        self.trainer.log(start.logged())
        # With lam = 0 a token is credited with its own regret only, so stopping early gains nothing.
        if not start.weak or args.lam == 0:
            return
        message = (
            f"weak start: the student's regret is {start.regret:.1f} nats per sequence, an early end-of-sequence costs "
            f"{start.eos_price:.1f}. Until the first is below half of the second, credit over many tokens (lam = "
            f"{args.lam}) may teach the student to stop early, and credit over few to run on: no lam repairs it. Warm "
            "up longer on the teacher's greedy labels (`until_ready: true`; docs/method.md, Choosing lam)."
        )
        if args.weak_start == "refuse":
            raise ConfigError(message + " (weak_start: refuse)")
        if state.is_world_process_zero:
            logger.warning(message)
