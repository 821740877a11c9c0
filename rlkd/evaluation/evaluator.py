"""Evaluation of a policy on held-out inputs: task metric, regret, match with the teacher, length, entropy, KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.policy import Policy
from ..models.signals import LocalSource
from ..models.vocabulary import decode_texts, token_pieces
from ..objectives.advantages import regret_per_sequence
from ..objectives.policy import kl_k3
from ..objectives.rewards import induced_advantage
from ..records import Answers, Example, given
from ..sampling.rollouts import greedy_answers, greedy_writer, sample_rollouts
from .task_metrics import RowMean, RowScore, try_metric

# The numbers of every row, for the greedy and the sampled answer; `rlkd.metrics` defines them.
PER_ANSWER = ("regret", "logprob", "length", "finish_rate", "entropy", "kl")
MEANS = [*(prefix + name for prefix in ("", "sample_") for name in PER_ANSWER), "match"]
# predictions, then the examples they answer -> named scores; a RowMean keeps the score of each row
TaskMetric = Callable[[list[str], list[Example]], dict[str, float]]


@dataclass
class Evaluator:
    """Answers `examples` with a policy and scores the answers with the teacher; its own answers are computed once.

    Both greedy and sampled answers are scored: a user runs the student greedily, training improves its samples. Models
    run in the precision of their weights, as the saved student will, whatever mixed precision the training uses.
    """

    teacher: LocalSource
    tokenizer: Any
    examples: Sequence[Example]
    max_input_tokens: int
    max_new_tokens: int
    task_metric: TaskMetric | None = None
    batch_rows: int = 64
    seed: int = 0
    _teacher_answers: dict[str, list[int]] = field(default_factory=dict, init=False)
    _task_names: list[str] = field(default_factory=list, init=False)
    # Of the newest evaluation: score -> one value per row, to compare evaluations with (`rlkd.runs.paired`).
    per_row: dict[str, list[float]] = field(default_factory=dict, init=False)

    def check(self, limit: int | None) -> None:
        """Try the task metric on the first `limit` rows, before anything is decoded. Raises as `try_metric`."""
        if self.task_metric is not None:
            rows = range(len(self.examples) if limit is None else min(limit, len(self.examples)))
            self._task_names = try_metric(self.task_metric, [self.examples[i] for i in rows])

    def rows(
        self,
        policy: Policy,
        reference: Policy | None,
        indices: Sequence[int],
        advance: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[dict[str, Any]]:
        """One record per index: texts, tokens, regret, length and so on of the greedy and the sampled answer.

        advance is called after every batch with (rows, tokens of their answers).
        """
        out: list[dict[str, Any]] = []
        for start in range(0, len(indices), self.batch_rows):
            examples = [self.examples[i] for i in indices[start : start + self.batch_rows]]
            limits: dict[str, Any] = {"max_input_tokens": self.max_input_tokens, "max_new_tokens": self.max_new_tokens}
            best = greedy_answers(policy, self.tokenizer, examples, **limits)
            drawn = sample_rollouts(
                policy, self.tokenizer, examples, rollouts_per_prompt=1, seed=(self.seed, "evaluation"), **limits
            )
            scored = [self._scored(policy, reference, answers) for answers in (best, drawn)]
            teacher_ids = self._teacher_ids(examples)
            teacher_texts = self.teacher_answers(examples)
            for i, example in enumerate(examples):
                row: dict[str, Any] = {"id": example.id, "input": example.student_input, "teacher": teacher_texts[i]}
                row["teacher_ids"] = teacher_ids[i]
                for prefix, record in zip(("", "sample_"), scored, strict=True):
                    row.update({prefix + name: values[i] for name, values in record.items()})
                row["match"] = float(row["student"] == row["teacher"])
                row["index"] = indices[start + i]
                out.append(row)
            advance(len(examples), int(best.answer_mask.sum() + drawn.answer_mask.sum()))
        return out

    def _scored(self, policy: Policy, reference: Policy | None, answers: Answers) -> dict[str, list[Any]]:
        """Columns of the rows: texts, tokens and numbers of `answers`, one entry per answer."""
        mask = answers.answer_mask
        inputs = [example.teacher_inputs for example in answers.examples]
        scores = self.teacher.score(inputs, answers.answer_ids, mask, ids=[e.id for e in answers.examples])
        regret = induced_advantage(scores, "max")
        with torch.no_grad():
            # `forward` itself: the Trainer's mixed precision is wrapped around the policy's call.
            (logps, entropy), _ = Policy.forward(policy, *answers.policy_inputs)
            kl = torch.zeros_like(logps)
            if reference is not None:
                (reference_logps, _), _ = reference(*answers.policy_inputs)
                kl = kl_k3(logps, reference_logps)
        return {
            "student": self.texts(answers.answer_ids, mask),
            "ids": [row[m].tolist() for row, m in zip(answers.answer_ids, mask, strict=True)],
            "tokens": [
                token_pieces(self.tokenizer, ids[m].tolist()) for ids, m in zip(answers.answer_ids, mask, strict=True)
            ],
            "regret": regret_per_sequence(regret, mask).tolist(),
            "logprob": ((scores.chosen - given(scores.logsumexp)) * mask).sum(1).tolist(),
            "length": mask.sum(1).tolist(),
            "finish_rate": given(answers.finished).float().tolist(),
            "entropy": _row_means(entropy, mask),
            "kl": _row_means(kl, mask),
            "rewards": [r[m].tolist() for r, m in zip(regret, mask, strict=True)],
        }

    def texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Answers as text, special tokens removed."""
        return decode_texts(self.tokenizer, [row[m].tolist() for row, m in zip(ids, mask, strict=True)])

    def teacher_answers(self, examples: Sequence[Example]) -> list[str]:
        """The teacher's greedy answer to each example under its first template."""
        return decode_texts(self.tokenizer, self._teacher_ids(examples))

    def _teacher_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        # By prompt: ids need not be unique in examples made in memory.
        missing = [e for e in examples if e.teacher_inputs[0] not in self._teacher_answers]
        if missing:
            most, inputs = self.max_new_tokens, [e.teacher_inputs for e in missing]
            for example, ids in zip(missing, self.teacher.answer(inputs, greedy_writer(most), most), strict=True):
                self._teacher_answers[example.teacher_inputs[0]] = ids
        return [self._teacher_answers[e.teacher_inputs[0]] for e in examples]

    def names(self) -> list[str]:
        """The names that `summarise` gives, once the metric was tried (`check`)."""
        return [*MEANS, *(prefix + name for prefix in ("", "sample_") for name in self._task_names)]

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Means over rows, and the task metric of greedy and sampled answers, by the names of `rlkd.metrics`.

        Each row also gets its own task score if the metric has one per row (a `RowMean`).
        """
        metrics = {name: sum(row[name] for row in rows) / max(len(rows), 1) for name in MEANS}
        self.per_row = {name: [row[name] for row in rows] for name in ("regret", "sample_regret")}
        if self.task_metric is not None and rows:
            examples = [self.examples[row["index"]] for row in rows]
            for prefix in ("", "sample_"):
                scores = self.task_metric([row[prefix + "student"] for row in rows], examples)
                metrics.update({prefix + name: float(value) for name, value in scores.items()})
                for name, value in scores.items():
                    if isinstance(value, RowScore):
                        self.per_row[prefix + name] = list(value.rows)
                    if isinstance(value, RowMean):
                        for row, score in zip(rows, value.rows, strict=True):
                            row[prefix + name] = float(score)
        return metrics


def _row_means(values: Tensor, mask: Tensor) -> list[float]:
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
