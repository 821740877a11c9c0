"""A policy gradient's task reward: scores of rollouts, and the credit that every token of an answer gets for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..evaluation.samples import Sample
from ..evaluation.task_reward import TaskReward
from ..models.vocabulary import decode_texts
from ..objectives.advantages import sequence_credit
from ..records import Answers, Example

if TYPE_CHECKING:
    from .arguments import RLArguments
    from .policy_gradient import PolicyGradientTrainer


def task_reward_of(args: RLArguments, examples: Sequence[Example]) -> TaskReward | None:
    """The task reward that the settings name, tried on the training data. Raises as `TaskReward` does."""
    if args.task_reward is None:
        return None
    found = TaskReward.of(args.task_reward)
    found.try_on(examples)
    return found


def task_scores(trainer: PolicyGradientTrainer, reward: TaskReward, answers: Answers) -> Tensor:
    """The score of each answer, [B]. Raises the errors of a `TaskReward` on every process."""
    ids = [row[mask].tolist() for row, mask in zip(answers.answer_ids, answers.answer_mask, strict=True)]
    scores: list[float] = []
    with trainer.errors_on_all():
        scores = reward(decode_texts(trainer.tokenizer, ids), answers.examples)
    return torch.tensor(scores, device=answers.answer_ids.device)


def task_credit(scores: Tensor | None, args: RLArguments) -> Tensor | None:
    """[B, 1], task_reward_coef * `sequence_credit`: part of the credit of every token of an answer; None without
    scores [B].
    """
    if scores is None:
        return None
    return args.task_reward_coef * sequence_credit(scores, args.rollouts_per_prompt)[:, None]


def with_scores(samples: list[Sample], annotations: Any) -> list[Sample]:
    """Rollouts to show, with their scores as facts."""
    scores = getattr(annotations, "task_scores", None)
    if scores is None:
        return samples
    pairs = zip(samples, scores.tolist(), strict=True)
    return [replace(sample, facts={**sample.facts, "task_reward": score}) for sample, score in pairs]
