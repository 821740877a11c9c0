"""Reinforcement learning on the teacher-induced reward. The loop, in order:

    for each rollout batch:                              `experience_loader`
        sample answers from the behaviour policy         `sample`
        score them with the frozen teacher               `teacher.score`  -> A_V per token
        assign credit to each token                      `assign_credit`  -> advantages
        for each epoch, for each minibatch:              `minibatches`
            one optimizer step on the policy loss        `compute_loss`

Rollout batch i is a function of the seed, i and the weights alone: resuming between batches continues the same run, and
the same global batch split over more processes is the same run.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..evaluation.evaluator import TaskMetric
from ..evaluation.recording import rollout_samples
from ..evaluation.samples import Sample
from ..models.teacher import Teacher
from ..objectives.advantages import assign_credit, explained_variance, regret_per_sequence
from ..objectives.policy import (
    adapt_kl_coef,
    kl_k1,
    kl_k3,
    reduce_tokens,
    reduction_count,
    token_statistics,
    value_loss,
)
from ..objectives.rewards import expected_advantage, induced_advantage, state_value, teacher_baseline
from ..records import Example, Minibatch, Rollouts, TeacherScores, select_rows
from ..sampling.decode import row_seed
from ..sampling.rollouts import sample_rollouts
from ..tensors import masked_mean, masked_moments, moments_to_mean_std, whiten
from .arguments import RLArguments
from .base import DistillationTrainer
from .start import StartCheck

BEHAVIOUR_FILE = "behaviour.safetensors"


class RLTrainer(DistillationTrainer):
    """Policy-gradient training of `student` on the reward induced by `teacher`; subclasses give `policy_loss`.

    The student given here is also the reference of the KL leash. Arguments as in `DistillationTrainer`;
    train_examples are the unlabeled inputs.
    """

    args: RLArguments

    def __init__(
        self,
        student: Any,
        args: RLArguments,
        *,
        teacher: Teacher,
        tokenizer: Any,
        train_examples: Sequence[Example],
        eval_examples: Sequence[Example] | None = None,
        task_metric: TaskMetric | None = None,
        settings: Sequence[Any] = (),
        callbacks: list[TrainerCallback] | None = None,
    ):
        super().__init__(
            student,
            args,
            teacher=teacher,
            tokenizer=tokenizer,
            train_dataset=train_examples,
            eval_examples=eval_examples,
            task_metric=task_metric,
            settings=settings,
            critic=args.baseline == "critic",
            callbacks=callbacks,
        )
        # On resume `ExperienceLoader` knows from the step count where it is: the Trainer must not skip anything.
        self.args.ignore_data_skip = True
        self.steps_between_checkpoints = args.updates_per_rollout
        self.teacher: Teacher = teacher
        self.train_examples = train_examples
        self.reference = self.policy.frozen_copy()
        self.behaviour = self.policy if args.sync_every == 1 else self.policy.frozen_copy()
        self.kl_coef = args.kl_coef
        self.newest: Minibatch | None = None
        self.prompts_per_process = args.rows_per_rollout // args.rollouts_per_prompt
        self.prompts_per_rollout = self.prompts_per_process * self.accelerator.num_processes
        if len(train_examples) < self.prompts_per_rollout:
            raise ConfigError(
                f"one rollout batch takes {self.prompts_per_rollout} prompts but the training data have "
                f"{len(train_examples)}: lower per_device_train_batch_size, gradient_accumulation_steps or "
                "minibatches_per_rollout, or raise rollouts_per_prompt"
            )
        self.add_callback(StartCheck(self))
        self.add_callback(_EpochOfStep())

    # The loop

    def get_train_dataloader(self) -> ExperienceLoader:  # type: ignore[override]
        rollouts_per_epoch = len(self.train_examples) // self.prompts_per_rollout
        micro_batches = self.args.updates_per_rollout * self.args.gradient_accumulation_steps
        return ExperienceLoader(self, rollouts_per_epoch * micro_batches)

    def experience(self) -> Iterator[dict[str, Minibatch]]:
        """Minibatches without end, from the rollout batch the step count says is next."""
        while True:
            index = self.rollout_index
            self.synchronise(index)
            started = time.perf_counter()
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
            self.behaviour.load_state_dict(self.policy.state_dict())

    def prompts(self, index: int) -> list[Example]:
        """This process's prompts of rollout batch `index`: each pass over the data in an order of its own."""
        epoch, position = divmod(index, len(self.train_examples) // self.prompts_per_rollout)
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        order = torch.randperm(len(self.train_examples), generator=generator)
        start = position * self.prompts_per_rollout + self.accelerator.process_index * self.prompts_per_process
        return [self.train_examples[i] for i in order[start : start + self.prompts_per_process].tolist()]

    def sample(self, index: int) -> Rollouts:
        """Answers of the behaviour policy to this process's prompts."""
        self.behaviour.eval()
        return sample_rollouts(
            self.behaviour,
            self.tokenizer,
            self.prompts(index),
            rollouts_per_prompt=self.args.rollouts_per_prompt,
            max_input_tokens=self.args.max_input_tokens,
            max_new_tokens=self.args.max_new_tokens,
            seed=(self.args.seed, "rollout", index),
        )

    @torch.no_grad()
    def annotate(self, rollouts: Rollouts) -> Minibatch:
        """Teacher scores, KL, values and credit of a whole rollout batch."""
        args, mask = self.args, rollouts.answer_mask
        needs_vocabulary = args.one_step == "exact" or args.baseline == "closed_form"
        scores = self.score(rollouts, with_hidden=needs_vocabulary)
        advantage = induced_advantage(scores, args.reward_value)
        offset = state_value(scores, args.reward_value)
        statistics, token_args = self.statistics(scores, offset)
        reference_logps = torch.zeros_like(advantage)
        if self.kl_coef > 0:
            (reference_logps, _), _ = self.reference(*_policy_inputs(rollouts))  # type: ignore[misc]
        expected, values = None, torch.zeros_like(advantage)
        if args.baseline in ("critic", "closed_form"):
            (_, _, *more), values = self.policy(*_policy_inputs(rollouts), statistics, token_args)
            expected = more[0] if more else None
        reward = advantage
        kl = (
            kl_k1(rollouts.behaviour_logps, reference_logps) * mask if self.kl_coef > 0 else torch.zeros_like(advantage)
        )
        if args.kl_in == "reward":
            reward = advantage - self.kl_coef * kl
        advantages, returns = assign_credit(
            reward,
            mask,
            baseline=args.baseline,
            gamma=args.gamma,
            lam=args.lam,
            k_step=args.k_step,
            rollouts_per_prompt=args.rollouts_per_prompt,
            immediate=advantage if args.one_step == "exact" else None,
            expected=expected,
            values=values,
            teacher_value=teacher_baseline(scores, args.reward_value, args.gauge),
        )
        self.check_experience(rollouts, reference_logps, values, reward * mask, advantages, returns)
        advantages, scale = self.scale_advantages(advantages, mask)
        rewards = scale * reward * mask
        mean_kl = self.record_experience(rollouts, scores, advantages, values, returns, kl)
        minibatch = Minibatch(
            rollouts,
            scores,
            advantages,
            rewards,
            values,
            returns,
            reference_logps,
            offset,
            reward_scale=scale,
            kl_coef=self.kl_coef,
        )
        self.newest = select_rows(minibatch, torch.arange(min(len(mask), args.sample_table_rows)))
        if args.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, mean_kl, args.kl_target)
        return minibatch

    def check_experience(self, rollouts: Rollouts, *numbers: Tensor) -> None:
        """Raise DivergenceError, on every process, if a number [B, R] of a rollout batch is not finite."""
        names = ["the reference's log-probability", "the critic's value", "the reward", "the advantage", "the return"]
        values = {"the student's log-probability": rollouts.behaviour_logps, **dict(zip(names, numbers, strict=True))}
        self.finite.check(values, [example.id for example in rollouts.examples], rollouts)

    def score(self, rollouts: Rollouts, *, with_hidden: bool) -> TeacherScores:
        """What the teacher says of the answers. Raises DivergenceError on every process if it fails on one."""
        ids = [example.id for example in rollouts.examples]
        with self.finite.together(ids, rollouts):
            prompts = [example.teacher_inputs for example in rollouts.examples]
            return self.teacher.score(
                prompts, rollouts.answer_ids, rollouts.answer_mask, with_hidden=with_hidden, ids=ids
            )

    def statistics(self, scores: TeacherScores, offset: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """The function of the student's logits that the loss needs, and its per-token arguments."""
        if scores.hidden is None:
            return token_statistics, ()
        teacher_head = self.teacher.lm.head()

        def with_expectation(logits: Tensor, ids: Tensor, hidden: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return *token_statistics(logits, ids), expected_advantage(logits, teacher_head.logits(hidden), value)

        return with_expectation, (scores.hidden, offset)

    def scale_advantages(self, advantages: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Whiten over the global batch if asked to; the factor also scales the exact one-step term."""
        if not self.args.whiten_advantages:
            return advantages, 1.0
        moments = self.accelerator.reduce(masked_moments(advantages, mask), reduction="sum")
        return whiten(advantages, mask, moments), 1.0 / moments_to_mean_std(moments)[1]

    def minibatches(self, batch: Minibatch, index: int) -> Iterator[Minibatch]:
        """Every epoch cuts the rollout batch into minibatches anew; each is split into micro-batches by length.

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
        mask = batch.rollouts.answer_mask
        counts = torch.tensor([reduction_count(mask[rows], args.loss_reduction) for rows in plan], device=mask.device)
        counts = self.accelerator.reduce(counts, reduction="sum").tolist()
        lengths = (mask.sum(1) + batch.rollouts.input_mask.sum(1)).cpu()
        for rows, count in zip(plan, counts, strict=True):
            by_length = rows[lengths[rows].argsort(stable=True)]
            for micro in by_length.chunk(args.gradient_accumulation_steps):
                yield replace(select_rows(batch, micro), denominator=count)

    # The loss

    @abstractmethod
    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> Tensor:
        """Loss of the sampled tokens [B, R] from their log-probabilities under the student [B, R]."""

    def state_weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor | float:
        """Weight [B, R] of the exact one-step term at states an older policy reached; 1 unless a subclass corrects."""
        return 1.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """policy loss - exact one-step term - entropy bonus + KL leash + critic loss, over the global minibatch."""
        args = self.args
        minibatch: Minibatch = inputs["minibatch"]
        rollouts, mask = minibatch.rollouts, minibatch.rollouts.answer_mask
        statistics, token_args = self.statistics(minibatch.scores, minibatch.reward_offset)
        (logps, entropy, *exact), values = model(*_policy_inputs(rollouts), statistics, token_args)
        loss = self.policy_loss(logps, minibatch)
        if args.one_step == "exact":
            loss = loss - minibatch.reward_scale * self.state_weights(logps, minibatch) * exact[0]
        loss = loss - args.entropy_coef * entropy
        if minibatch.kl_coef > 0 and args.kl_in == "loss":
            loss = loss + minibatch.kl_coef * kl_k3(logps, minibatch.reference_logps)
        if args.baseline == "critic":
            critic = value_loss(values, minibatch.old_values, minibatch.returns, args.value_clip_range)
            loss = loss + args.value_coef * critic
            self.record_tokens(mask, value_loss=critic)
        total = reduce_tokens(loss, mask, args.loss_reduction, minibatch.denominator)
        log_ratio = (logps.detach() - rollouts.behaviour_logps) * mask
        ids = [example.id for example in rollouts.examples]
        watched = {"the log-ratio": log_ratio, "the loss": torch.where(mask, loss, 0.0), "the summed loss": total}
        self.finite.watch(watched, ids, minibatch)
        ratio = log_ratio.exp()
        self.record_tokens(mask, entropy=entropy, ratio_mean=ratio)
        self.record(ratio_max=ratio.max())
        return self.scale_to_global(total)

    # What is watched

    def record_experience(
        self, rollouts: Rollouts, scores: TeacherScores, advantages: Tensor, values: Tensor, returns: Tensor, kl: Tensor
    ) -> float:
        """Record what docs/metrics.md defines of a rollout batch; returns the mean KL over its tokens everywhere."""
        mask = rollouts.answer_mask
        self.tokens_since_log += int(mask.sum())
        self.record(
            regret=regret_per_sequence(induced_advantage(scores, "max"), mask).mean(),
            teacher_logprob=((scores.chosen - scores.logsumexp) * mask).sum(1).mean(),
            length=mask.sum(1).double().mean(),
            finish_rate=rollouts.finished.double().mean(),
            kl_coef=self.kl_coef,
        )
        self.record_tokens(mask, teacher_entropy=scores.entropy)
        advantages, values, returns, kl, mask = (self.gather(x) for x in (advantages, values, returns, kl, mask))
        mean_kl = masked_mean(kl, mask)
        self.record(kl=mean_kl, advantage_std=moments_to_mean_std(masked_moments(advantages, mask))[1])
        if self.args.baseline == "critic":
            self.record(explained_variance=explained_variance(values, returns, mask))
        return float(mean_kl)

    def rollout_samples(self) -> list[Sample]:
        if self.newest is None or not len(self.newest.advantages):
            return []
        critic = self.args.baseline == "critic"
        return rollout_samples(self.teacher, self.tokenizer, self.newest, self.args.reward_value, critic=critic)

    def gather(self, x: Tensor) -> Tensor:
        """The rows [B, ...] of every process, padded with 0 to the longest answer."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    # What a checkpoint carries beside the student

    def save_extras(self, folder: Path) -> dict[str, Any]:
        lags = self.behaviour is not self.policy and self.rollout_index % self.args.sync_every > 0
        if lags:
            save_model(self.behaviour, str(folder / BEHAVIOUR_FILE))
        return {**super().save_extras(folder), "kl_coef": self.kl_coef, "behaviour_lags": lags}

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        super().load_extras(extras, folder)
        self.kl_coef = extras["kl_coef"]
        if self.behaviour is not self.policy:
            if extras["behaviour_lags"]:
                load_model(self.behaviour, folder / BEHAVIOUR_FILE)
            else:
                self.behaviour.load_state_dict(self.policy.state_dict())


@dataclass
class ExperienceLoader:
    """What the Trainer iterates over: `length` micro-batches an epoch, less those before the step count on resume."""

    trainer: RLTrainer
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Minibatch]]:
        done = self.trainer.state.global_step * self.trainer.args.gradient_accumulation_steps % self.length
        yield from islice(self.trainer.experience(), self.length - done)


class _EpochOfStep(TrainerCallback):
    """The Trainer, which skips no data here, would count the micro-batches of a resumed epoch from its beginning."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step * args.gradient_accumulation_steps / len(kwargs["train_dataloader"])


def _policy_inputs(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rollouts.input_ids, rollouts.input_mask, rollouts.answer_ids, rollouts.answer_mask
