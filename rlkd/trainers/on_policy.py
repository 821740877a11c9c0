"""On-policy training: answers come from the policy itself. The loop, in order:

    for each rollout batch:                              `experience`
        sample answers from the behaviour policy         `sample`
        run teacher, reference and critic on them         `evidence`
        let the objective annotate them                  `annotate`  (policy gradients: reward, credit, baseline)
        for each epoch, for each minibatch:              `minibatches`
            one optimizer step on the objective's loss   `compute_loss`

The module does not depend on the objective. Rollout batch i is a function of the seed, i and the weights alone:
resuming between batches continues the same run, and the same global batch split over more processes is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..evaluation.recording import rollout_samples
from ..evaluation.samples import Sample
from ..io.provenance import described
from ..labels.makers import announce
from ..labels.recorded import RecordedTeacher
from ..models.signals import LocalSource
from ..models.teacher import Teacher
from ..objectives.policy import reduction_count
from ..records import Answers, Example, Minibatch, select_rows
from ..sampling.decode import row_seed
from ..sampling.proposal import PLAIN, Proposal
from ..sampling.rollouts import sample_rollouts
from ..sharding import copy_weights, unsharded
from .arguments import OnPolicyArguments
from .base_arguments import check_labels
from .distillation import DistillationTrainer, TrainerInputs
from .labelled import LabelBatches

RECORDED_ONLY = (
    "teacher_signal = 'recorded': the teacher's probabilities are known for its own labels only, not for the student's "
    "answers: train with SupervisedTrainer (recipes/seqkd_t0_to_t5.py), or set teacher_signal to model or server."
)
BEHAVIOUR_FILE = "behaviour.safetensors"


def check_mix(args: OnPolicyArguments, *, local: bool) -> None:
    """Raise ConfigError if rollouts should have a share of the tokens of a teacher that is not a local model."""
    if args.teacher_mix > 0 and not local:
        raise ConfigError(
            f"teacher_mix = {args.teacher_mix}: the teacher takes part in every step of the rollouts: give a local "
            "Teacher, or set it to 0"
        )


class OnPolicyTrainer(DistillationTrainer):
    """Trains `student` on its own answers to `train_examples`, the unlabeled inputs; subclasses name the objective.

    The student given here is also the reference policy of the KL penalty. labels: rows of a label folder, for settings
    that read them (`args.reads_labels`). Other arguments as in `DistillationTrainer`.
    Raises ConfigError if there are no labels that the settings need, or labels that they do not read.
    """

    args: OnPolicyArguments
    # Made of the trainer: callbacks that look at it before the first update.
    start_checks: ClassVar[tuple[Callable[[Any], TrainerCallback], ...]] = ()

    def __init__(
        self,
        student: Any,
        args: OnPolicyArguments,
        *,
        train_examples: Sequence[Example],
        labels: Any = None,
        **inputs: Unpack[TrainerInputs],
    ):
        check_labels(args, given=labels is not None, name="labels")
        super().__init__(student, args, train_dataset=train_examples, **inputs)
        self.label_batches = None if labels is None else LabelBatches(labels, self.policy, self.tokenizer, args)
        # `ExperienceLoader` finds its position from the step count on resume, so the Trainer must not skip batches.
        self.args.ignore_data_skip = True
        self.steps_between_checkpoints = args.updates_per_rollout
        self.train_examples = train_examples
        # Both are exact copies of the initial student; with sync_every = 1 the student itself samples.
        self.reference = self.policy.frozen_copy()
        self.behaviour = self.policy if args.sync_every == 1 else self.policy.frozen_copy()
        self.proposal = self.make_proposal()
        self.newest: Minibatch | None = None
        self.prompts_per_process = args.rows_per_rollout // args.rollouts_per_prompt
        self.prompts_per_rollout = self.prompts_per_process * self.accelerator.num_processes
        if len(train_examples) < self.prompts_per_rollout:
            raise ConfigError(
                f"one rollout batch takes {self.prompts_per_rollout} prompts but the training data have "
                f"{len(train_examples)}: lower per_device_train_batch_size, gradient_accumulation_steps or "
                "minibatches_per_rollout, or raise rollouts_per_prompt"
            )
        self.add_callback(_EpochOfStep())
        for check in self.start_checks:
            self.add_callback(check(self))

    def training_data(self) -> dict[str, Any]:
        """As in `StudentTrainer`; the labels, if any, have a role of their own."""
        batches = self.label_batches
        return {**super().training_data(), **({} if batches is None else {"labels": batches.labels})}

    def begin_run(self, checkpoint: Path | None) -> None:
        """As in `StudentTrainer`; says whose labels the student learns, and warns of those of another teacher."""
        super().begin_run(checkpoint)
        if self.label_batches is not None and self.is_world_process_zero():
            announce(described(self.label_batches.labels), self.makers())

    def check_teacher(self) -> None:
        """As in `DistillationTrainer`; a recorded teacher knows nothing of the student's answers."""
        if isinstance(self.teacher, RecordedTeacher):
            raise ConfigError(RECORDED_ONLY)
        super().check_teacher()

    # The loop

    def make_proposal(self) -> Proposal:
        """What rollouts are drawn from. Raises ConfigError if the teacher should have a share and cannot answer."""
        args, teacher = self.args, self.teacher
        check_mix(args, local=isinstance(teacher, Teacher))
        return Proposal(
            temperature=args.rollout_temperature,
            top_p=args.rollout_top_p,
            teacher_mix=args.teacher_mix,
            teacher=teacher if isinstance(teacher, Teacher) else None,
        )

    def get_train_dataloader(self) -> ExperienceLoader:  # type: ignore[override]
        rollouts_per_epoch = len(self.train_examples) // self.prompts_per_rollout
        micro_batches = self.args.updates_per_rollout * self.args.gradient_accumulation_steps
        return ExperienceLoader(self, rollouts_per_epoch * micro_batches)

    def describe_run(self, steps: int, epochs: float) -> str:
        """As in `StudentTrainer`; per_device_train_batch_size counts answers."""
        updates = self.args.updates_per_rollout
        answers = self.args.rows_per_rollout * self.accelerator.num_processes
        prompts = -(-steps // updates) * self.prompts_per_rollout
        return (
            f"a rollout batch is {answers} answers to {self.prompts_per_rollout} prompts, for {updates} "
            f"update{'s' if updates > 1 else ''}; this run of {steps} updates sees {prompts} prompts, {epochs:.3g} "
            f"epochs of {len(self.train_examples)}"
        )

    def experience(self) -> Iterator[dict[str, Minibatch]]:
        """Endless minibatches, starting with the rollout batch that follows from the step count."""
        while True:
            index = self.rollout_index
            self.synchronise(index)
            started = time.perf_counter()
            with unsharded(self.policy):
                batch = self.annotate(self.sample(index))
            self.record(rollout_seconds=time.perf_counter() - started)
            for minibatch in self.minibatches(batch, index):
                yield {"minibatch": minibatch}

    @property
    def rollout_index(self) -> int:
        """Number of the rollout batch that comes next (between batches) or is being used."""
        return self.state.global_step // self.args.updates_per_rollout

    def synchronise(self, index: int) -> None:
        """Copy the student into the behaviour policy every `sync_every` rollout batches."""
        if self.behaviour is not self.policy and index % self.args.sync_every == 0:
            copy_weights(self.policy, self.behaviour)

    def prompts(self, index: int) -> list[Example]:
        """This process's prompts of rollout batch `index`: each pass over the data has its own order."""
        # A function of `index` alone, so that a resumed run needs no data-loader state. The last, incomplete batch of a
        # pass is dropped; every process takes its own slice of the same permutation.
        epoch, position = divmod(index, len(self.train_examples) // self.prompts_per_rollout)
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        order = torch.randperm(len(self.train_examples), generator=generator)
        start = position * self.prompts_per_rollout + self.accelerator.process_index * self.prompts_per_process
        return [self.train_examples[i] for i in order[start : start + self.prompts_per_process].tolist()]

    def sample(self, index: int) -> Answers:
        """Answers to this process's prompts, drawn from the behaviour policy as the settings of rollouts say."""
        return self.answers(index, self.proposal)

    def answers(self, index: int, proposal: Proposal = PLAIN) -> Answers:
        """Answers to the prompts of rollout batch `index` from a proposal, by default the behaviour policy itself."""
        # In the precision of the loss, so that the first ratio pi / mu is 1 within rounding. Attention may run another
        # kernel with a gradient than without (T5's trained position bias, on a CPU), which in bfloat16 moves single
        # ratios by up to 0.03. What is recorded is what was drawn from, so the weights pi / mu hold all the same; a
        # forward more would hide the difference, not correct it.
        self.behaviour.eval()
        with self.accelerator.autocast():
            return sample_rollouts(
                self.behaviour,
                self.tokenizer,
                self.prompts(index),
                rollouts_per_prompt=self.args.rollouts_per_prompt,
                max_input_tokens=self.args.max_input_tokens,
                max_new_tokens=self.args.max_new_tokens,
                seed=(self.args.seed, "rollout", index),
                proposal=proposal,
            )

    def labelled(self, index: int, rows: int) -> Answers:
        """This process's `rows` of label batch `index`."""
        assert self.label_batches is not None
        return self.label_batches.batch(index, rows, self.accelerator.process_index, self.accelerator.num_processes)

    @torch.no_grad()
    def annotate(self, answers: Answers) -> Minibatch:
        """A whole rollout batch as the objective sees it, checked and logged."""
        self.tokens_since_log += int(answers.answer_mask.sum())
        evidence = self.evidence(answers)
        annotations = self.objective.annotate(answers, evidence)
        # Before whitening, which would spread one NaN over the batch of every process.
        self.check_experience(answers, annotations)
        annotations, logged = self.objective.over_batch(annotations, answers, evidence, self)
        self.record_batch(answers, logged)
        batch = Minibatch(answers=answers, signal=evidence.signal, annotations=annotations)
        shown = torch.arange(min(len(answers.examples), self.args.sample_table_rows))
        self.newest = None if answers.finished is None else select_rows(batch, shown)
        return replace(batch, answers=self.objective.learned(answers))

    def check_experience(self, answers: Answers, annotations: Any) -> None:
        """Raise DivergenceError, on every process, if a number [B, R] of a rollout batch is not finite."""
        numbers = {"the student's log-probability": answers.behaviour_logps, **self.objective.numbers(annotations)}
        values = {name: value for name, value in numbers.items() if value is not None}
        if values:
            self.finite.check(values, answers.ids, answers)

    def minibatches(self, batch: Minibatch, index: int) -> Iterator[Minibatch]:
        """Every epoch draws new minibatches from the rollout batch; each is split into micro-batches by length.

        The rows form a table of `minibatches_per_rollout` columns; every line is permuted on its own and a minibatch is
        a column. The permutation of a line depends on its global number only, so splitting the lines over processes
        changes no minibatch.
        """
        args = self.args
        columns = args.minibatches_per_rollout
        table = torch.arange(args.rows_per_rollout).view(-1, columns)
        first_line = self.accelerator.process_index * len(table)
        plan: list[Tensor] = []
        for epoch in range(args.epochs_per_rollout):
            generator = torch.Generator().manual_seed(row_seed(args.seed, "minibatches", index, epoch))
            shuffles = torch.rand(len(table) * self.accelerator.num_processes, columns, generator=generator).argsort(1)
            shuffled = table.gather(1, shuffles[first_line : first_line + len(table)])
            plan += list(shuffled.T)
        mask = batch.answers.answer_mask
        counts = torch.tensor(
            [reduction_count(mask[rows], self.objective.loss_reduction) for rows in plan], device=mask.device
        )
        # One denominator per minibatch over all processes and micro-batches: a mean of means would weight short
        # micro-batches too much.
        counts = self.accelerator.reduce(counts, reduction="sum").tolist()
        lengths = (mask.sum(1) + batch.answers.input_mask.sum(1)).cpu()
        for rows, count in zip(plan, counts, strict=True):
            # Rows of similar length share a micro-batch: less padding, the same gradient.
            by_length = rows[lengths[rows].argsort(stable=True)]
            for micro in by_length.chunk(args.gradient_accumulation_steps):
                yield replace(select_rows(batch, micro), denominator=count)

    # Logging

    def record_batch(self, answers: Answers, logged: Mapping[str, Tensor | float]) -> None:
        """Record what docs/metrics.md defines of a rollout batch: the objective's numbers, length and finish rate."""
        mask = answers.answer_mask
        if answers.finished is not None:  # labels have no length of the student's
            self.record(length=mask.sum(1).double().mean(), finish_rate=answers.finished.double().mean())
        if answers.cut_mass is not None:
            self.record_tokens(mask, cut_mass=answers.cut_mass)
        for name, value in logged.items():
            if isinstance(value, Tensor) and value.dim():
                self.record_tokens(mask, **{name: value})
            else:
                self.record(**{name: value})

    def rollout_samples(self) -> list[Sample]:
        if self.newest is None or not self.newest.answers.examples or not isinstance(self.teacher, LocalSource):
            return []
        used, value = self.objective.shown(self.newest.annotations), getattr(self.args, "reward_value", "max")
        return rollout_samples(self.teacher, self.tokenizer, self.newest.answers, value, used)

    # Checkpoints

    def save_extras(self, folder: Path) -> dict[str, Any]:
        # Right after a synchronisation the behaviour policy equals the student and need not be saved.
        lags = self.behaviour is not self.policy and self.rollout_index % self.args.sync_every > 0
        if lags:
            save_model(self.behaviour, str(folder / BEHAVIOUR_FILE))
        return {**super().save_extras(folder), "behaviour_lags": lags}

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        super().load_extras(extras, folder)
        if self.behaviour is not self.policy:
            if extras["behaviour_lags"]:
                load_model(self.behaviour, folder / BEHAVIOUR_FILE)
            else:
                copy_weights(self.policy, self.behaviour)


@dataclass
class ExperienceLoader:
    """What the Trainer iterates over: `length` micro-batches an epoch, less those before the step count on resume."""

    trainer: OnPolicyTrainer
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Minibatch]]:
        done = self.trainer.state.global_step * self.trainer.args.gradient_accumulation_steps % self.length
        yield from islice(self.trainer.experience(), self.length - done)


class _EpochOfStep(TrainerCallback):
    """The Trainer, which skips no data here, would count the micro-batches of a resumed epoch from 0."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step * args.gradient_accumulation_steps / len(kwargs["train_dataloader"])
