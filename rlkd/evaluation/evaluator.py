"""Evaluation of a policy on held-out inputs: task metric, regret, match with the teacher, length, entropy, KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.policy import Policy
from ..models.signals import AnsweringSource, LocalSource, SignalSource
from ..models.vocabulary import decode_texts, token_pieces
from ..objectives.advantages import regret_per_sequence
from ..objectives.policy import kl_k3
from ..objectives.rewards import induced_advantage
from ..records import Answers, Example, given
from ..sampling.rollouts import greedy_answers, greedy_writer, sample_rollouts
from .task_metrics import RowMean, RowScore, try_metric

# The numbers of every row, for the greedy and the sampled answer (`rlkd.metrics` defines them), and the fields of the
# teacher's signal that each needs.
PER_ANSWER: dict[str, set[str]] = {
    "regret": {"chosen", "max"},
    "logprob": {"chosen", "logsumexp"},
    "length": set(),
    "finish_rate": set(),
    "entropy": set(),
    "kl": set(),
}
MEANS = [*(prefix + name for prefix in ("", "sample_") for name in PER_ANSWER), "match"]
# predictions, then the examples they answer -> named scores; a RowMean keeps the score of each row
TaskMetric = Callable[[list[str], list[Example]], dict[str, float]]


@dataclass
class Evaluator:
    """Answers `examples` with a policy and scores the answers with the teacher; its own answers are computed once.

    A teacher that scores no other answers than its own (recorded), or None, leaves out what needs it; one without a
    model here also the comparison with its answers (`missing`).

    Both greedy and sampled answers are scored: a user runs the student greedily, training improves its samples. Models
    run in the precision of their weights, as the saved student will, whatever mixed precision the training uses.
    """

    teacher: SignalSource | None
    tokenizer: Any
    examples: Sequence[Example]
    max_input_tokens: int
    max_new_tokens: int
    task_metric: TaskMetric | None = None
    batch_rows: int = 64
    seed: int = 0
    _teacher_answers: dict[tuple[str, ...], list[int]] = field(default_factory=dict, init=False)
    _task_names: list[str] = field(default_factory=list, init=False)
    # Of the newest evaluation: score -> one value per row, to compare evaluations with (`rlkd.runs.paired`).
    per_row: dict[str, list[float]] = field(default_factory=dict, init=False)

    @property
    def scores(self) -> bool:
        """Whether the teacher scores the answers of others."""
        return self.teacher is not None and "chosen" in self.teacher.gives

    @property
    def missing(self) -> list[str]:
        """What this teacher cannot tell of an answer, by the names of `PER_ANSWER`, and `match`."""
        gives = self.teacher.gives if self.teacher is not None and self.scores else frozenset()
        own = [] if self.answers else ["match"]
        return [*(name for name, needs in PER_ANSWER.items() if not needs <= gives), *own]

    @property
    def answers(self) -> bool:
        """Whether the teacher answers the examples itself."""
        return isinstance(self.teacher, LocalSource | AnsweringSource)

    @property
    def means(self) -> list[str]:
        """The names of the means over rows."""
        missing = self.missing
        return [name for name in MEANS if name.removeprefix("sample_") not in missing]

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
            own = self._own_answers(examples)
            for i, example in enumerate(examples):
                row: dict[str, Any] = {"id": example.id, "input": example.student_input}
                row.update({name: values[i] for name, values in own.items()})
                for prefix, record in zip(("", "sample_"), scored, strict=True):
                    row.update({prefix + name: values[i] for name, values in record.items()})
                if own:
                    row["match"] = float(row["student"] == row["teacher"])
                row["index"] = indices[start + i]
                out.append(row)
            advance(len(examples), int(best.answer_mask.sum() + drawn.answer_mask.sum()))
        return out

    def _scored(self, policy: Policy, reference: Policy | None, answers: Answers) -> dict[str, list[Any]]:
        """Columns of the rows: texts, tokens and numbers of `answers`, one entry per answer."""
        mask = answers.answer_mask
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
            "length": mask.sum(1).tolist(),
            "finish_rate": given(answers.finished).float().tolist(),
            "entropy": _row_means(entropy, mask),
            "kl": _row_means(kl, mask),
            **self._teachers_columns(answers),
        }

    def _teachers_columns(self, answers: Answers) -> dict[str, list[Any]]:
        """Regret, log-probability and rewards under the teacher, as far as it gives them."""
        if self.teacher is None or not self.scores:
            return {}
        mask, columns = answers.answer_mask, {}
        inputs = [example.teacher_inputs for example in answers.examples]
        signal = self.teacher.score(inputs, answers.answer_ids, mask, ids=answers.ids)
        if signal.max is not None:
            regret = induced_advantage(signal, "max")
            columns["regret"] = regret_per_sequence(regret, mask).tolist()
            columns["rewards"] = [r[m].tolist() for r, m in zip(regret, mask, strict=True)]
        if signal.logsumexp is not None:
            columns["logprob"] = ((signal.chosen - signal.logsumexp) * mask).sum(1).tolist()
        return columns

    def texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Answers as text, special tokens removed."""
        return decode_texts(self.tokenizer, [row[m].tolist() for row, m in zip(ids, mask, strict=True)])

    def teacher_answers(self, examples: Sequence[Example]) -> list[str]:
        """The teacher's greedy answer to each example under its first template."""
        return decode_texts(self.tokenizer, self._teacher_ids(examples))

    def _own_answers(self, examples: Sequence[Example]) -> dict[str, list[Any]]:
        """Text and tokens of the teacher's greedy answers, if it gives any; of several, which of them it was."""
        if not self.answers:
            return {}
        own: dict[str, list[Any]] = {"teacher": self.teacher_answers(examples)}
        own["teacher_ids"] = self._teacher_ids(examples)
        if isinstance(self.teacher, LocalSource):
            names = self.teacher.answers_by([example.teacher_inputs for example in examples])
            own |= {} if names is None else {"teacher_name": names}
        return own

    def _teacher_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        # By prompts: ids need not be unique in examples made in memory.
        missing = [e for e in examples if e.teacher_inputs not in self._teacher_answers]
        if missing:
            inputs = [example.teacher_inputs for example in missing]
            self._teacher_answers.update(zip(inputs, self._greedy(inputs), strict=True))
        return [self._teacher_answers[e.teacher_inputs] for e in examples]

    def _greedy(self, inputs: list[tuple[str, ...]]) -> list[list[int]]:
        most = self.max_new_tokens
        if isinstance(self.teacher, LocalSource):
            return self.teacher.answer(inputs, greedy_writer(most), most)
        assert isinstance(self.teacher, AnsweringSource)
        return self.teacher.greedy([texts[0] for texts in inputs], most)

    def names(self) -> list[str]:
        """The names that `summarise` gives, once the metric was tried (`check`)."""
        return [*self.means, *(prefix + name for prefix in ("", "sample_") for name in self._task_names)]

    def summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Means over rows, and the task metric of greedy and sampled answers, by the names of `rlkd.metrics`.

        Each row also gets its own task score if the metric has one per row (a `RowMean`).
        """
        metrics = {name: sum(row[name] for row in rows) / max(len(rows), 1) for name in self.means}
        paired = [name for name in ("regret", "sample_regret") if name in metrics]
        self.per_row = {name: [row[name] for row in rows] for name in paired}
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
