"""The interface of teacher signals: here a local model; recorded or served signals have the same one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..errors import ConfigError
from ..records import TeacherSignal

# All that a local model gives: `top_k` is for those who do not have the whole distribution.
SIGNAL = frozenset(field.name for field in fields(TeacherSignal)) - {"top_k"}


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


@runtime_checkable
class AnsweringSource(SignalSource, Protocol):
    """A teacher without a model here that also answers held-out inputs."""

    def greedy(self, texts: list[str], max_new_tokens: int) -> list[list[int]]:
        """The token ids of its greedy answer to each text, end-of-sequence included."""
        ...


def check_signal(needs: Iterable[str], gives: Iterable[str], what: str, remedy: str) -> None:
    """Raises ConfigError naming what `what` (settings, in words) needs from the teacher and the teacher cannot
    provide.
    """
    missing = sorted(set(needs) - set(gives))
    if missing:
        known = f"{', '.join(sorted(gives))} only" if gives else "nothing"
        raise ConfigError(
            f"{what} needs the teacher's {', '.join(missing)} at every token, but this teacher provides {known}: "
            f"{remedy}"
        )
