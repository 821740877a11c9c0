"""A task metric as a reward, one number per sampled answer: by name, or a function of your own (`module:function`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, DataError, RlkdError, cut, nearest
from ..records import Example
from .functions import FUNCTION, imported
from .task_metrics import FEW, exact_match, rouge, sari, token_f1

# (answers, the examples they answer) -> one number per answer, more is better
AnswerMetric = Callable[[list[str], list[Example]], Sequence[float]]
# Metrics with a score per row; the number is that of docs/metrics.md.
BY_ROW: dict[str, Callable[..., dict[str, Any]]] = {
    "rouge1": rouge, "rouge2": rouge, "rougeL": rouge, "exact_match": exact_match, "token_f1": token_f1, "sari": sari,
}  # fmt: skip
OF_A_CORPUS = {
    "bleu": "rougeL, or module:function with a BLEU of sentences",
    "chrf": "rougeL, or module:function with a chrF of sentences",
}


def check_task_reward(name: str | None, coef: float, rollouts_per_prompt: int) -> None:
    """Raise ConfigError for settings of a task reward that have no effect, or cannot work."""
    if name is None:
        if coef != 1.0:
            raise ConfigError(f"task_reward_coef = {coef}: weighs nothing: name a task_reward")
        return
    _check_name(name)
    if rollouts_per_prompt < 2:
        raise ConfigError(
            f"rollouts_per_prompt = {rollouts_per_prompt}: task_reward compares the answers to a prompt: it needs at "
            "least 2"
        )


def _check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a metric with a score per answer, or has the form module:function."""
    if name in OF_A_CORPUS:
        raise ConfigError(
            f"task_reward = {name!r}: a score of a whole corpus says nothing of one answer. Use {OF_A_CORPUS[name]}"
        )
    if name not in BY_ROW and not FUNCTION.fullmatch(name):
        raise ConfigError(
            f"task_reward = {name!r}: allowed are {', '.join(BY_ROW)} and module:function, a function (answers, "
            f"examples) -> one number per answer.{nearest(name, list(BY_ROW))}"
        )


@dataclass(frozen=True)
class TaskReward:
    """Scores answers; more is better. needs_references: whether the examples must have some.

    Called with B answers and their examples it returns B finite numbers. Raises DataError that names the row for which
    it cannot, ConfigError for a function that does not return one number per answer.
    """

    name: str
    function: AnswerMetric
    needs_references: bool

    @classmethod
    def of(cls, name: str) -> TaskReward:
        """By the value of the setting. Raises ConfigError for another name, and if there is no such function."""
        _check_name(name)
        if name in BY_ROW:
            return cls(name, lambda answers, examples: BY_ROW[name](answers, examples)[name].rows, True)
        return cls(name, imported(name, "task_reward"), False)

    def __call__(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
        missing = [example.id for example in examples if self.needs_references and not example.references]
        if missing:
            raise DataError(
                f"task_reward = {self.name!r}: {len(missing)} of {len(examples)} training rows have no reference "
                f"(first: {missing[0]}). Name a reference_column with a text in each of them, or take a function that "
                "needs none"
            )
        scores = self._scores(answers, examples)
        for score, answer, example in zip(scores, answers, examples, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"task_reward = {self.name!r} gives {score} for row {example.id}, answer {cut(answer)!r}: it must "
                    "give a finite number for every answer, the empty one included"
                )
        return scores

    def try_on(self, examples: Sequence[Example]) -> None:
        """Before training: score the first references (inputs, without any) of some rows. Raises as a call does."""
        rows = [examples[i] for i in range(min(FEW, len(examples)))]
        self([(row.references or (row.student_input,))[0] for row in rows], rows)

    def _scores(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
        try:
            scores = [float(score) for score in self.function(list(answers), list(examples))]
        except RlkdError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"task_reward = {self.name!r} fails{self._where(answers, examples)} ({type(error).__name__}: {error}): "
                "it must take (answers, examples) and return one number per answer"
            ) from error
        if len(scores) != len(answers):
            raise ConfigError(
                f"task_reward = {self.name!r} returned {len(scores)} numbers for {len(answers)} answers: it must "
                "return one per answer"
            )
        return scores

    def _where(self, answers: Sequence[str], examples: Sequence[Example]) -> str:
        """The first row that fails alone, as text."""
        for answer, example in zip(answers, examples, strict=True):
            try:
                self.function([answer], [example])
            except Exception:
                return f" on row {example.id}, answer {cut(answer)!r}"
        return ""
