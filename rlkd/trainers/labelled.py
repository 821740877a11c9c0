"""Pseudo-labels in on-policy training: batches of them, each a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..labels.tokens import own_generations
from ..models.generation import rules_of
from ..models.policy import Policy
from ..records import Answers, Imitation, Minibatch, select_rows
from .arguments import GKDArguments, OnPolicyArguments
from .supervised import PseudoLabelCollator, check_label_rows

if TYPE_CHECKING:
    from .policy_gradient import PolicyGradientTrainer


class LabelBatches:
    """The rows of a label folder in an endless sequence of shuffled passes, cut into batches of `rows` per process.

    A resumed run needs no position, and the same global batch split over more processes has the same rows. Raises
    DataError as `check_label_rows` does.
    """

    def __init__(self, labels: Any, policy: Policy, tokenizer: Any, args: OnPolicyArguments):
        check_label_rows(labels, "labels", scored=isinstance(args, GKDArguments))
        self.labels, self.seed, self.device = labels, args.seed, policy.lm.device
        own, rules = own_generations(labels, tokenizer), rules_of(policy.lm)
        self.collate = PseudoLabelCollator(tokenizer, args.max_input_tokens, args.max_new_tokens, own, rules)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: int, rows: int, process: int, processes: int) -> Answers:
        """Batch `index`: the labels of this process, of `rows` for each of `processes`; on the policy's device."""
        first = (index * processes + process) * rows
        places = (divmod(i, len(self.labels)) for i in range(first, first + rows))
        batch: dict[str, Any] = self.collate([self.labels[int(self._order(epoch)[i])] for epoch, i in places])
        moved: dict[str, Any] = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return Answers(**moved)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.seed + epoch))


def with_imitation(trainer: PolicyGradientTrainer, minibatches: Iterator[Minibatch], index: int) -> Iterator[Minibatch]:
    """The minibatches of rollout batch `index`, each with its part of the labels that its update imitates.

    An update has as many labels as answers, and labels of its own; its denominator is their tokens over all processes
    and accumulation steps.
    """
    args = trainer.args
    for update in range(index * args.updates_per_rollout, (index + 1) * args.updates_per_rollout):
        labels = trainer.labelled(update, args.rows_per_update)
        own_tokens = labels.answer_mask.sum()
        trainer.tokens_since_log += int(own_tokens)
        tokens = float(trainer.sum(own_tokens))
        lengths = labels.answer_mask.sum(1) + labels.input_mask.sum(1)
        for rows in lengths.argsort(stable=True).chunk(args.gradient_accumulation_steps):
            part = Imitation(labels=select_rows(labels, rows), tokens=tokens, coef=args.imitation_coef)
            yield replace(next(minibatches), imitation=part)
