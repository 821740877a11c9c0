"""What a trainer optimises, as arithmetic on records: the trainer runs the models and does not know the formula.

For a batch of answers (from labels or from rollouts), in order:

    evidence     what the objective reads: the teacher's signal, the reference policy, the student before the update
    annotate     evidence -> annotations, once per batch, before the first update on it
    token_loss   the student's numbers and the annotations -> loss per token, once per minibatch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from torch import Tensor

from ..models.heads import TokenFunction
from ..models.signals import check_signal
from ..objectives.closed_form import PolicyTerm, policy_terms
from ..objectives.policy import Reduction, entropy, token_statistics
from ..records import Answers, Distribution, Minibatch, TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about answers before the first update on them; None for what the objective does not read.

    signal           the teacher's
    reference_logps  [B, R] log-probability of each token under the reference policy
    reference        the reference policy's next-token distributions
    values           [B, R] the critic's C(s_t)
    entropy          [B, R] of pi(.|s_t), where the objective reads `expected`
    task_scores      [B] the task's score of each answer
    ending           the teacher's signal for end-of-sequence after each answer that was cut, fields [B, 1]
    extra            [B, R] each: what `Objective.token_function` gives beyond log-probability and entropy
    """

    signal: TeacherSignal | None = None
    reference_logps: Tensor | None = None
    reference: Distribution | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None
    task_scores: Tensor | None = None
    ending: TeacherSignal | None = None
    extra: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTokens:
    """The student on the tokens of a minibatch, with gradient, [B, R] each; 0 at padding.

    logps    log pi(a_t|s_t);  entropy, of pi(.|s_t);  values, the critic's (zeros without one)
    extra    what `Objective.token_function` gives beyond these two
    """

    logps: Tensor
    entropy: Tensor
    values: Tensor
    extra: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """A function of a chunk of the student's logits, for `with_terms`.

    function   (logits [n, V], *what of_chunk returns) -> [n]; those that are a `PolicyTerm` share one softmax
    of_chunk   (the chunk's slices [n, ...] of arguments) -> tensors [n, ...]
    arguments  tensors [B, R, ...]
    """

    function: Callable[..., Tensor]
    of_chunk: Callable[..., tuple[Tensor, ...]]
    arguments: tuple[Tensor, ...]


def with_terms(*terms: Term) -> tuple[TokenFunction, tuple[Tensor, ...]]:
    """Log-probability, entropy and further terms of the same chunk, as `Objective.token_function` returns them."""

    def function(logits: Tensor, ids: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        rest = iter(args)
        calls = [(term.function, term.of_chunk(*islice(rest, len(term.arguments)))) for term in terms]
        shared = [(of, own) for of, own in calls if isinstance(of, PolicyTerm)]
        logps, of_entropy, *values = policy_terms(logits, ids, (entropy, ()), *shared)
        next_shared = iter(values)
        extra = [next(next_shared) if isinstance(of, PolicyTerm) else of(logits, *own) for of, own in calls]
        return logps, of_entropy, *extra

    return function, tuple(argument for term in terms for argument in term.arguments)


class Processes(Protocol):
    """All processes that share a batch."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """The rows [B, R] of every process, padded with 0 to the longest answer."""
        ...


class Objective(ABC):
    """One way to learn from answers. Subclasses give `token_loss`; the defaults are those of plain imitation.

    what, remedy     for errors: the settings that chose it, and what to change if the teacher lacks what it needs
    needs            fields of the teacher's signal that it reads; empty if it needs no teacher
    reads            fields of `Evidence` beyond the signal that the trainer computes for `annotate`
    critic           whether the policy has a value head
    loss_reduction   how token losses are averaged
    """

    what: str = "this objective"
    remedy: str = "choose another objective."
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    critic: bool = False
    loss_reduction: Reduction = "token_mean"

    def check(self, gives: frozenset[str], why: str = "") -> None:
        """Raises ConfigError if a teacher that `gives` these fields of its signal lacks some that it reads; why, as in
        `check_signal`.
        """
        check_signal(self.needs, gives, self.what, self.remedy, why=why)

    def token_function(
        self, signal: TeacherSignal | None, annotations: Any = None
    ) -> tuple[TokenFunction, tuple[Tensor, ...]]:
        """The function of a chunk of the student's logits [n, V] that the loss reads, and its per-token arguments.

        It is called with (logits [n, V], ids [n], *arguments [n, ...]) and returns log-probability and entropy, [n]
        each, and what else `token_loss` finds in `StudentTokens.extra` (see `with_terms`). Without annotations: what
        `annotate` finds in `Evidence.extra`.
        """
        return token_statistics, ()

    def annotate(self, answers: Answers, evidence: Evidence) -> Any:
        """What the loss needs and later updates must not change: a `Batched` record, or None."""
        return None

    def learned(self, answers: Answers) -> Answers:
        """The answers as they enter the loss: the mask may lose tokens."""
        return answers

    def over_batch(
        self, annotations: Any, answers: Answers, evidence: Evidence, processes: Processes
    ) -> tuple[Any, Mapping[str, Tensor | float]]:
        """The annotations after operations on the whole batch of all processes, and the batch's logged numbers.

        Logged tensors [B, R] are means over tokens, scalars means over batches.
        """
        return annotations, {}

    def numbers(self, annotations: Any) -> dict[str, Tensor | None]:
        """The annotations that must be finite, [B, R] each, by their name in errors."""
        return {}

    def shown(self, annotations: Any) -> dict[str, Tensor]:
        """The annotations that views show, [B, R] each: `rewards`, `advantages`, `values`, as far as there are."""
        return {}

    @abstractmethod
    def token_loss(self, student: StudentTokens, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of every token [B, R], and what is logged per token, [B, R] each."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the objective, JSON-able."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most objectives keep nothing)
        """Restore what `state` returned."""
