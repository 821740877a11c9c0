"""Check once, before the first update, that the student is strong enough for long-horizon credit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..errors import ConfigError
from ..models.generation import rules_of
from ..models.heads import HeadOverStates
from ..objectives.advantages import price_of_stopping, regret_per_sequence
from ..records import given

if TYPE_CHECKING:
    from .policy_gradient import PolicyGradientTrainer

logger = logging.getLogger(__name__)


class StartCheck(TrainerCallback):
    """Warns (or refuses, `weak_start`) when the student is too weak for the chosen credit horizon.

    While a sequence's regret exceeds the cost of an early end, stopping early has the better return, and long-horizon
    credit learns it (docs/method.md, "the EOS shortcut").
    """

    def __init__(self, trainer: PolicyGradientTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.weak_start == "ignore" or state.global_step > 0:
            return
        missing = {"max", "distribution"} - self.trainer.teacher.gives
        if missing:
            message = (
                "whether the student is strong enough to start cannot be checked: the teacher provides no "
                f"{' and no '.join(sorted(missing))}"
            )
            if args.weak_start == "refuse":
                raise ConfigError(f"{message} (weak_start: refuse)")
            if state.is_world_process_zero:
                logger.warning(f"{message} (weak_start: ignore silences this)")
            return
        start = self.measure()
        self.trainer.log(dict(start))
        regret, price = start["start_regret"], start["start_eos_price"]
        # With lam = 0 a token is credited with its own regret only, so stopping early gains nothing.
        if regret <= 0.5 * price or args.lam == 0:
            return
        message = (
            f"weak start: the student's regret is {regret:.1f} nats per sequence, an early end-of-sequence costs "
            f"{price:.1f}. Until the first is below half of the second, credit over many tokens (lam = {args.lam}) may "
            "teach the student to stop early, and credit over few to run on: no lam repairs it. Warm up longer on the "
            "teacher's greedy labels (docs/method.md, Choosing lam)."
        )
        if args.weak_start == "refuse":
            raise ConfigError(message + " (weak_start: refuse)")
        if state.is_world_process_zero:
            logger.warning(message)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Regret per sequence, cost of an early end, length and finish rate of the first rollout batch."""
        trainer = self.trainer
        # Its strength is that of the student itself; lengths are compared with those of later rollouts.
        rollouts, eos = trainer.answers(0), trainer.policy.lm.eos_id
        drawn = rollouts if trainer.args.samples_itself else trainer.sample(0)
        mask = rollouts.answer_mask
        scores = trainer.score(rollouts, distribution=True)
        assert isinstance(scores.distribution, HeadOverStates)
        maximum = given(scores.max)
        states, head = scores.distribution.states, scores.distribution.head
        (eos_logits,) = head.map(lambda logits: (logits[:, eos],), states[mask])
        gap = maximum.masked_scatter(mask, maximum[mask] - eos_logits)
        regret = regret_per_sequence(scores.chosen - maximum, mask)
        ends = torch.tensor(rules_of(trainer.policy.lm).eos_ids, device=mask.device)
        going_on = mask & ~torch.isin(rollouts.answer_ids, ends)
        return {
            "start_regret": float(trainer.gather(regret[:, None]).mean()),
            "start_eos_price": float(price_of_stopping(trainer.gather(gap), trainer.gather(going_on))),
            "start_length": float(trainer.gather(drawn.answer_mask).sum(1).float().mean()),
            "start_finish_rate": float(trainer.gather(given(drawn.finished)[:, None]).float().mean()),
        }
