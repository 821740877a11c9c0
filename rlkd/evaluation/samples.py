"""Answers scored by the teacher token by token, as plain numbers: reading them loads neither torch nor a model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import DataError, nearest

Numbers = list[float | None]
# Column of a sample -> name of its numbers.
COLUMNS = {
    "rewards": "reward",
    "logprobs": "teacher log-prob",
    "max_logprobs": "largest log-prob",
    "entropies": "teacher entropy",
    "student_logprobs": "student log-prob",
    "values": "value",
    "advantages": "advantage",
}


@dataclass(frozen=True)
class Sample:
    """One answer and its T tokens, numbers in nats. A column, or its entry for a token, is None if unknown.

    id, input         name and raw text of the input; answers to one input share the id
    source            where the answer comes from (`rlkd.inspection.reward_view.SOURCES`, or another name)
    text              the answer without special tokens
    tokens, ids       [T] pieces of text that join to the answer, and their ids, end-of-sequence included; empty if only
                      the text is known
    rewards           [T] A_V(s_t, a_t) for the view's V, which training sums (see `rlkd.objectives.rewards`)
    logprobs          [T] log p(a_t|s_t) of the teacher
    max_logprobs      [T] max_a log p(a|s_t)
    entropies         [T] entropy of p(.|s_t)
    student_logprobs  [T] log-probability of the token under the student
    values            [T] the critic's C(s_t)
    advantages        [T] the credit that weighted the token in the loss
    top               [T] the teacher's most probable tokens, [text, log-probability] each, best first
    prompts           template name -> input of the teacher; with several, all numbers but `top` are means over them and
                      `top` is of their renormalised mean log-probability (under `pool` all are of that)
    finished          False if the answer was cut before its end-of-sequence
    step              optimizer steps the student had taken, in a training run
    facts             anything else, shown next to the sums
    """

    id: str
    input: str
    source: str
    text: str
    tokens: list[str]
    ids: list[int]
    rewards: Numbers | None = None
    logprobs: Numbers | None = None
    max_logprobs: Numbers | None = None
    entropies: Numbers | None = None
    student_logprobs: Numbers | None = None
    values: Numbers | None = None
    advantages: Numbers | None = None
    top: list[list[tuple[str, float]]] | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    finished: bool | None = None
    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("ids", *COLUMNS, "top"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.tokens):
                raise DataError(f"sample '{self.id}': {name} has {len(column)} entries for {len(self.tokens)} tokens.")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def template(self) -> str:
        """Names of the templates, joined."""
        return " + ".join(self.prompts)

    @property
    def regrets(self) -> Numbers | None:
        """[T] max_a log p(a|s_t) - log p(a_t|s_t) >= 0: the cost of each token relative to the teacher's greedy
        token.
        """
        if self.logprobs is None or self.max_logprobs is None:
            return None
        pairs = zip(self.max_logprobs, self.logprobs, strict=True)
        return [None if best is None or given is None else best - given for best, given in pairs]

    @property
    def total_reward(self) -> float | None:
        """Sum of the token rewards: the undiscounted return of the answer minus V(s_0), as training sums it."""
        return _total(self.rewards)

    @property
    def regret(self) -> float | None:
        """Sum of the token regrets."""
        return _total(self.regrets)

    @property
    def logprob(self) -> float | None:
        """Log-probability of the whole answer under the teacher."""
        return _total(self.logprobs)

    @property
    def student_gap(self) -> float | None:
        """sum_t |student's - teacher's log-probability|: how much the two disagree on this answer."""
        if self.student_logprobs is None or self.logprobs is None:
            return None
        pairs = zip(self.student_logprobs, self.logprobs, strict=True)
        return _total([None if a is None or b is None else abs(a - b) for a, b in pairs])


def _total(column: Numbers | None) -> float | None:
    known = [x for x in column if x is not None] if column is not None else None
    return None if known is None or len(known) < len(column or ()) else sum(known, 0.0)


def sample_from(row: dict[str, Any], where: str) -> Sample:
    """The sample of a JSON object. Raises DataError naming `where` if a field is missing or unknown."""
    names = [f.name for f in fields(Sample)]
    if unknown := sorted(set(row) - set(names)):
        raise DataError(f"{where}: unknown field '{unknown[0]}'.{nearest(unknown[0], names)}")
    try:
        top = row.get("top")
        pairs = None if top is None else [[(str(text), float(number)) for text, number in best] for best in top]
        return Sample(**{**row, "top": pairs})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error
