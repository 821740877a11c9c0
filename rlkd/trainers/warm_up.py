"""The warm-up that knows when it is done (`until_ready`): when to stop, and whether the student is ready for RL.

train at a constant rate, evaluating regularly
whenever held-out regret has stopped falling: lower the rate; at its lowest: stop
keep the best checkpoint; compare the regret of its sampled answers with the cost of an early end
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback

from ..io.provenance import described
from ..records import Answers
from ..sampling.rollouts import sample_rollouts
from ..sharding import unsharded
from .start import Start, start_sums

if TYPE_CHECKING:
    from .supervised import SupervisedTrainer

logger = logging.getLogger(__name__)

# Strategies whose labels are what `reward_value: max` pays for: the teacher's greedy answers, its most probable choice.
GREEDY = ("greedy", "rank")


class WarmUp(TrainerCallback):
    """Stops the run when regret no longer falls at the lowest rate; at the end says whether the student is ready.

    saturated  whether regret has stopped falling; checkpoints keep it
    start      what was measured at the end of training, None before
    """

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer
        self.saturated = False
        self.start: Start | None = None

    @property
    def ready(self) -> bool:
        """Whether RL can start from the student: it is strong enough, and imitation has nothing more to give."""
        return self.saturated and self.start is not None and not self.start.weak

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.saturated
        if state.is_world_process_zero:
            warn_of_labels(self.trainer.train_dataset)

    @property
    def plateau(self) -> ReduceLROnPlateau:
        """The schedule: it steps after each evaluation, and its state is in the checkpoints."""
        scheduler: Any = self.trainer.lr_scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        return scheduler

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation and the schedule's step: stops the run if regret has stopped falling at the lowest
        rate.
        """
        plateau = self.plateau
        best, rates = plateau.best, plateau.get_last_lr()
        yield
        # The schedule starts to count anew when it has lost its patience, whether or not it can lower the rate.
        stopped_falling = plateau.best == best and plateau.num_bad_epochs == 0
        if stopped_falling and plateau.get_last_lr() == rates:
            self.saturated = self.trainer.control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        with trainer.finite.together([], None), unsharded(trainer.policy):
            sums = start_sums(trainer, self.samples())
        self.start = Start.of(trainer.sum(sums))
        trainer.log(self.start.logged())
        words = self.in_words()
        if trainer.run_record is not None:
            trainer.run_record.readiness = {
                "ready": self.ready, "saturated": self.saturated, "step": trainer.last.step, "words": words,
                **self.start.logged(),
            }  # fmt: skip
        if not state.is_world_process_zero:
            return
        if trainer.run_record is not None:
            trainer.run_record.write(trainer.run_folder)
        if not self.ready:
            logger.warning(words)
        elif trainer.announcement.whole_job or not args.disable_tqdm:
            print(words)

    def samples(self) -> Iterator[Answers]:
        """One sampled answer to each held-out input of this process, in batches."""
        trainer, args = self.trainer, self.trainer.args
        assert trainer.evaluator is not None
        limit = len(trainer.evaluator.examples) if args.eval_limit is None else args.eval_limit
        examples = list(trainer.evaluator.examples[:limit])[args.process_index :: args.world_size]
        trainer.policy.eval()
        for first in range(0, len(examples), args.per_device_eval_batch_size):
            yield sample_rollouts(
                trainer.policy,
                trainer.tokenizer,
                examples[first : first + args.per_device_eval_batch_size],
                rollouts_per_prompt=1,
                max_input_tokens=args.max_input_tokens,
                max_new_tokens=args.max_new_tokens,
                seed=(args.seed, "start"),
            )

    def in_words(self) -> str:
        """Whether the student is ready for RL, why, and what to do if it is not."""
        start, state = self.start, self.trainer.state
        assert start is not None
        measured = (
            f"regret {start.regret:.1f} nats per sampled answer, an early end-of-sequence costs {start.eos_price:.1f} "
            "(weak from half of that)"
        )
        if self.ready:
            return f"ready for RL: {measured}; held-out regret has stopped falling (step {state.global_step})"
        if not self.saturated:
            return (
                f"not ready for RL: held-out regret was still falling at step {state.global_step}, the upper bound of "
                f"this run; {measured}. Raise max_steps or num_train_epochs and resume the run."
            )
        return (
            f"not ready for RL: a weak start, and held-out regret has stopped falling (step {state.global_step}); "
            f"{measured}. More of the same does not help: label more inputs (greedily), take a larger student, try "
            "another learning_rate, or an objective that sees the teacher's distributions (objective: forward_kl). "
            "Until then RL is safe with lam: 0 only."
        )


def warn_of_labels(labels: Any) -> None:
    """Say which labels are not the teacher's greedy answers, which `reward_value: max` pays for."""
    strategies = {str(made.get("strategy")) for made in described(labels) if made.get("strategy") is not None}
    if other := sorted(strategies - set(GREEDY)):
        logger.warning(
            f"until_ready: the labels were decoded with strategy {', '.join(other)}, but the reward of RL "
            "(reward_value: max, the default) pays for the teacher's greedy answers: a student of others starts with "
            "regret that no warm-up removes. Make them with `rlkd generate-pseudolabels --strategy greedy`, "
            "or keep these for reward_value: lse or softmax."
        )
    if not strategies:
        logger.info("until_ready: how the labels were decoded is not recorded; reward_value: max wants greedy ones")
