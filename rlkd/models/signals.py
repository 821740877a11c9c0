"""The interface of teacher signals: here a local model; recorded or served signals have the same one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..records import TeacherSignal

if TYPE_CHECKING:
    from .generation import AnswerRules
    from .language_model import LanguageModel
    from .teacher import Teacher

# All that a local model gives (`top_k` is for those who do not have the whole distribution); `state_value`: its tokens
# are the teacher's own, so that V of a token belongs to the state before it.
SIGNAL = frozenset({*(field.name for field in fields(TeacherSignal)), "state_value"}) - {"top_k"}
# Answers to prompts, given as their states: token ids, end-of-sequence included.
Write = Callable[["LanguageModel", list[Tensor]], list[list[int]]]


class SignalSource(Protocol):
    """A teacher as trainers see it.

    gives  names of `TeacherSignal`'s fields that it can fill, known before anything loads
    model  the transformers model behind it, which also answers held-out inputs; None if there is none here
    """

    @property
    def gives(self) -> frozenset[str]: ...

    @property
    def model(self) -> Any: ...

    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """The teacher's signal for answers [B, R] to B inputs, each under its templates; zeros at padding.

        distribution: whether the next-token distributions are needed, too; ids name the rows in errors.
        Raises DivergenceError if a number is not finite.
        """
        ...


class LocalSource(ABC):
    """A `SignalSource` whose models run here: it also answers, and tells what an early end costs.

    gives, model      as in `SignalSource`; lacks, why it does not give all, as part of a sentence
    tokenizer, rules  of the vocabulary that answers are given in: that of the student
    max_input_tokens  prompts are cut to this
    """

    gives: frozenset[str]
    lacks: str = ""
    tokenizer: Any
    max_input_tokens: int

    @property
    @abstractmethod
    def model(self) -> Any: ...

    @property
    @abstractmethod
    def rules(self) -> AnswerRules: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def teachers(self) -> Mapping[str, Teacher]:
        """The teachers that it asks, by their role in run.json."""

    def identity(self) -> dict[str, str]:
        """What a resumed run must find again, beyond the weights, tokenizers and reading of `teachers`."""
        return {}

    @abstractmethod
    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `SignalSource`; what `gives` does not name is None."""

    @abstractmethod
    def score_ends(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        ids: list[str] | None = None,
    ) -> tuple[TeacherSignal, Tensor]:
        """The signal, and [2]: the cost max_a q(s, a) - q(s, EOS) of an early end, nats, summed over the states at
        which the answers go on, and the number of these states.
        """

    def answers_by(self, teacher_inputs: list[tuple[str, ...]]) -> list[str] | None:
        """The name of the teacher that answers each input and, where inputs are routed, scores answers to it; None if
        there is only one.
        """
        return None

    @abstractmethod
    def answer(self, teacher_inputs: list[tuple[str, ...]], write: Write, max_new_tokens: int) -> list[list[int]]:
        """Its answer to each input under the first template, of at most `max_new_tokens` tokens of `tokenizer`."""


@runtime_checkable
class AnsweringSource(SignalSource, Protocol):
    """A teacher without a model here that also answers held-out inputs."""

    def greedy(self, texts: list[str], max_new_tokens: int) -> list[list[int]]:
        """The token ids of its greedy answer to each text, end-of-sequence included."""
        ...


def check_signal(needs: Iterable[str], gives: Iterable[str], what: str, remedy: str, *, why: str = "") -> None:
    """Raises ConfigError naming what `what` (settings, in words) needs from the teacher and the teacher cannot
    provide; why, of the teacher, as `LocalSource.lacks`.
    """
    missing = sorted(set(needs) - set(gives))
    if missing:
        known = f"{', '.join(sorted(gives))} only" if gives else "nothing"
        raise ConfigError(
            f"{what} needs the teacher's {', '.join(missing)} at every token, but this teacher{why} provides {known}: "
            f"{remedy}"
        )
