"""Several teachers as one: their rewards averaged, or every input sent to one of them.

averaged    r(s, a) = sum_k w_k r_k(s, a),  sum_k w_k = 1     (every reward is linear in the fields of its signal)
routed      r(s, a) = r_k(s, a),  k = route(prompts)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..records import Batched, Distribution, TeacherSignal, select_rows
from .generation import AnswerRules
from .signals import LocalSource, Write
from .teacher import Teacher
from .vocabulary import check_same_vocabulary

Inputs = tuple[str, ...]


class SeveralTeachers(LocalSource):
    """Teachers by name, all in the student's vocabulary (else as `OtherTokenizer`).

    `gives` is what all of them give. Raises ConfigError for fewer than two, ModelError if two have other vocabularies
    or ends of answers.
    """

    def __init__(self, sources: Mapping[str, LocalSource]):
        if len(sources) < 2:
            raise ConfigError(f"several teachers: {len(sources)} given, at least 2 are needed")
        self.sources = dict(sources)
        (name, first), *others = self.sources.items()
        for other, source in others:
            check_same_vocabulary(first.tokenizer, source.tokenizer, name, other)
            if set(first.rules.eos_ids) != set(source.rules.eos_ids):
                raise ModelError(
                    f"teachers '{name}' and '{other}' end answers with {first.rules.eos_ids} and "
                    f"{source.rules.eos_ids}: set eos_token_id alike in generation_config.json"
                )
        self.tokenizer, self.first = first.tokenizer, first
        self.gives = frozenset.intersection(*(source.gives for source in self.sources.values()))
        self.lacks = next((source.lacks for source in self.sources.values() if source.lacks), "")
        self.max_input_tokens = min(source.max_input_tokens for source in self.sources.values())

    @property
    def model(self) -> None:
        """There is no one model: see `teachers`."""
        return None

    @property
    def rules(self) -> AnswerRules:
        return self.first.rules

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def longest_answer(self) -> int | None:
        """As in `Teacher`, of all of them."""
        longest = [getattr(source, "longest_answer", None) for source in self.sources.values()]
        return min((length for length in longest if length is not None), default=None)

    @property
    def teachers(self) -> dict[str, Teacher]:
        return {
            role.replace("teacher", f"teacher {name}", 1): teacher
            for name, source in self.sources.items()
            for role, teacher in source.teachers.items()
        }

    def identity(self) -> dict[str, str]:
        found = {"teachers": self.how}
        for name, source in self.sources.items():
            found |= {key.replace("teacher", f"teacher {name}", 1): value for key, value in source.identity().items()}
        return found

    @property
    @abstractmethod
    def how(self) -> str:
        """How they are combined, in words."""


class AveragedTeachers(SeveralTeachers):
    """The weighted mean of their rewards. The one with the largest weight, the first of several, answers.

    weights  of each, by default equal; they are divided by their sum
    reads    numbers of the prompts that each reads, where an input has one for each template; None: all
    Raises ConfigError for weights that are not one above 0 for each teacher, or prompts that none reads.
    """

    def __init__(
        self,
        sources: Mapping[str, LocalSource],
        weights: Sequence[float] | None = None,
        reads: Sequence[tuple[int, ...]] | None = None,
    ):
        super().__init__(sources)
        given = [1.0] * len(sources) if weights is None else list(weights)
        if len(given) != len(sources) or min(given) <= 0:
            raise ConfigError(f"weights = {given}: give one above 0 for each of the {len(sources)} teachers")
        self.weights = [weight / sum(given) for weight in given]
        self.reads = None if reads is None else list(reads)
        self.prompts = None if reads is None else len({k for own in reads for k in own})

    @property
    def how(self) -> str:
        parts = []
        for i, (name, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
            of = "" if self.reads is None else f" on prompt {' and '.join(str(k + 1) for k in self.reads[i])}"
            parts.append(f"{weight:.3g} of {name}{of}")
        return f"rewards averaged: {', '.join(parts)}"

    def _inputs(self, i: int, inputs: list[Inputs]) -> list[Inputs]:
        """What teacher i reads of the inputs."""
        if self.reads is None:
            return inputs
        if wrong := [len(texts) for texts in inputs if len(texts) != self.prompts]:
            raise ConfigError(f"an input has {wrong[0]} prompts, but the teachers are to read {self.prompts}, one each")
        return [tuple(texts[k] for k in self.reads[i]) for texts in inputs]

    def score(
        self,
        teacher_inputs: list[Inputs],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `LocalSource`; the mean of the logits is that of the rewards, so the distribution is proportional to
        prod_k p_k^w_k.
        """
        signals = [
            source.score(self._inputs(i, teacher_inputs), answer_ids, answer_mask, distribution=distribution, ids=ids)
            for i, source in enumerate(self.sources.values())
        ]
        return self._mean(signals, answer_mask, distribution="distribution" in self.gives and distribution)

    def _mean(self, signals: list[TeacherSignal], mask: Tensor, *, distribution: bool = False) -> TeacherSignal:
        combined = _combined(signals, self.weights)
        if not distribution:
            return combined
        parts = [(signal.distribution, mask * weight) for signal, weight in zip(signals, self.weights, strict=True)]
        return replace(combined, distribution=_mixed(parts))

    def score_ends(
        self, teacher_inputs: list[Inputs], answer_ids: Tensor, answer_mask: Tensor, ids: list[str] | None = None
    ) -> tuple[TeacherSignal, Tensor]:
        """As in `LocalSource`; costs and states are means as well."""
        found = [
            source.score_ends(self._inputs(i, teacher_inputs), answer_ids, answer_mask, ids)
            for i, source in enumerate(self.sources.values())
        ]
        ends = sum(weight * ends for weight, (_, ends) in zip(self.weights, found, strict=True))
        return self._mean([signal for signal, _ in found], answer_mask), torch.as_tensor(ends)

    def answers_by(self, teacher_inputs: list[Inputs]) -> list[str]:
        """As in `LocalSource`."""
        return [list(self.sources)[self._speaker()]] * len(teacher_inputs)

    def _speaker(self) -> int:
        return max(range(len(self.weights)), key=lambda i: self.weights[i])

    def answer(self, teacher_inputs: list[Inputs], write: Write, max_new_tokens: int) -> list[list[int]]:
        """As in `LocalSource`."""
        i = self._speaker()
        return list(self.sources.values())[i].answer(self._inputs(i, teacher_inputs), write, max_new_tokens)


class RoutedTeachers(SeveralTeachers):
    """Each input is scored, and answered, by one of them alone.

    route  (its prompts) -> the teacher's name. Raises DataError or KeyError for an input that has none
    by     what decides the route, in words, for the record of a run
    """

    def __init__(self, sources: Mapping[str, LocalSource], route: Callable[[Inputs], str], by: str = "a function"):
        super().__init__(sources)
        self.route, self.by = route, by

    @property
    def how(self) -> str:
        return f"each input has one of {', '.join(self.sources)}, by {self.by}"

    def score(
        self,
        teacher_inputs: list[Inputs],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `LocalSource`, each row of its own teacher."""
        parts, wanted = [], "distribution" in self.gives and distribution
        for name, rows in self._rows(teacher_inputs).items():
            inputs = [teacher_inputs[i] for i in rows]
            named = None if ids is None else [ids[i] for i in rows]
            answers = answer_ids[rows], answer_mask[rows]
            signal = self.sources[name].score(inputs, *answers, distribution=wanted, ids=named)
            parts.append((signal, rows))
        return self._placed(parts, answer_mask, distribution=wanted)

    def _placed(
        self, parts: list[tuple[TeacherSignal, list[int]]], mask: Tensor, *, distribution: bool = False
    ) -> TeacherSignal:
        """The signals of some rows each, [B, R], as one."""
        total, device = len(mask), mask.device
        spread = [_spread(replace(signal, distribution=None), rows, total, device) for signal, rows in parts]
        combined = _combined(spread, [1.0] * len(spread))
        if not distribution:
            return combined
        weighted = []
        for signal, rows in parts:
            own = torch.zeros(total, 1, device=device).index_fill(0, torch.tensor(rows, device=device), 1.0)
            weighted.append((_spread(signal.distribution, rows, total, device), mask * own))
        return replace(combined, distribution=_mixed(weighted))

    def score_ends(
        self, teacher_inputs: list[Inputs], answer_ids: Tensor, answer_mask: Tensor, ids: list[str] | None = None
    ) -> tuple[TeacherSignal, Tensor]:
        """As in `LocalSource`."""
        parts, total = [], torch.zeros(2, dtype=torch.float64, device=self.device)
        for name, rows in self._rows(teacher_inputs).items():
            inputs = [teacher_inputs[i] for i in rows]
            named = None if ids is None else [ids[i] for i in rows]
            signal, ends = self.sources[name].score_ends(inputs, answer_ids[rows], answer_mask[rows], named)
            parts.append((signal, rows))
            total = total + ends
        return self._placed(parts, answer_mask), total

    def answers_by(self, teacher_inputs: list[Inputs]) -> list[str]:
        """As in `LocalSource`."""
        return [self.route(texts) for texts in teacher_inputs]

    def answer(self, teacher_inputs: list[Inputs], write: Write, max_new_tokens: int) -> list[list[int]]:
        """As in `LocalSource`."""
        answers: list[list[int]] = [[] for _ in teacher_inputs]
        for name, rows in self._rows(teacher_inputs).items():
            own = self.sources[name].answer([teacher_inputs[i] for i in rows], write, max_new_tokens)
            for i, ids in zip(rows, own, strict=True):
                answers[i] = ids
        return answers

    def _rows(self, teacher_inputs: list[Inputs]) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.answers_by(teacher_inputs)):
            rows.setdefault(name, []).append(i)
        return rows


def _combined(signals: list[TeacherSignal], weights: list[float]) -> TeacherSignal:
    """sum_k w_k signal_k, as far as all of them have a field, [B, R]; no distribution."""
    names = [f.name for f in fields(TeacherSignal) if f.name != "distribution"]
    known = [name for name in names if all(getattr(signal, name) is not None for signal in signals)]
    sums: dict[str, Any] = {
        name: sum(w * getattr(signal, name) for w, signal in zip(weights, signals, strict=True)) for name in known
    }
    return TeacherSignal(**sums)


def _spread(record: Any, rows: list[int], total: int, device: torch.device) -> Any:
    """A record of the rows `rows` as one of `total` rows, the others 0: what `select_rows` undoes."""
    place = torch.full((total,), len(rows), device=device)
    place[rows] = torch.arange(len(rows), device=device)
    padded = _with_row_of_zeros(record)
    return select_rows(padded, place)


def _with_row_of_zeros(record: Any) -> Any:
    def pad(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value, value.new_zeros(1, *value.shape[1:])])
        return _with_row_of_zeros(value) if isinstance(value, Batched) else value

    return replace(record, **{f.name: pad(getattr(record, f.name)) for f in fields(record)})


def _mixed(parts: Sequence[tuple[Any, Tensor]]) -> Distribution:
    """sum_k w_k logits_k of (distribution, w [B, R]) pairs."""

    def add(one: tuple[Any, Tensor], other: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
        return MixedLogits(one[0], other[0], torch.stack([one[1], other[1]], -1)), (one[1] + other[1] > 0).float()

    if len(parts) == 1:
        return parts[0][0]
    return reduce(add, parts)[0]


@dataclass(frozen=True)
class MixedLogits(Batched):
    """logits = w_0 logits_0 + w_1 logits_1, the weights [B, R, 2] of every token; one of weight 0 is not computed."""

    one: Any
    other: Any
    weights: Tensor

    @property
    def token_args(self) -> tuple[Tensor, ...]:
        return (self.weights, *self.one.token_args, *self.other.token_args)

    def logits(self, weights: Tensor, *args: Tensor) -> Tensor:
        """[n, V] from slices [n, ...] of `token_args`."""
        split = len(self.one.token_args)
        total = None
        for k, (part, own) in enumerate(((self.one, args[:split]), (self.other, args[split:]))):
            rows = weights[:, k] != 0
            logits = part.logits(*(arg[rows] for arg in own))
            if total is None:
                total = logits.new_zeros(len(weights), logits.shape[-1])
            total[rows] += weights[rows, k, None].to(logits.dtype) * logits
        assert total is not None
        return total
