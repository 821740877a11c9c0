"""Answers scored by the teacher token by token, as plain numbers: reading them loads neither torch nor a model."""

from __future__ import annotations

import math
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
        """Sum of the token regrets; without these, what is known of it otherwise (`facts`)."""
        own = _total(self.regrets)
        return own if own is not None or not _is_number(self.facts.get("regret")) else _finite(self.facts["regret"])

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


def sample_from(row: Any, where: str) -> Sample:
    """The sample of a JSON object; numbers that are not finite are unknown. Raises DataError naming `where` if it is no
    object, or a field is missing, unknown or of another type.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(row).__name__}.")
    names = [f.name for f in fields(Sample)]
    if unknown := sorted(set(row) - set(names)):
        raise DataError(f"{where}: unknown field '{unknown[0]}'.{nearest(unknown[0], names)}")
    if missing := [name for name in NEEDED if name not in row]:
        raise DataError(f"{where}: the field '{missing[0]}' is missing.")
    read = {name: _field(name, value, where) for name, value in row.items()}
    try:
        return Sample(**read)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


NEEDED = ("id", "input", "source", "text", "tokens", "ids")


def _field(name: str, value: Any, where: str) -> Any:
    """The value of a field as `Sample` has it. Raises DataError for another type."""
    if name in ("id", "input", "source", "text"):
        fits, allowed = isinstance(value, str), "text"
    elif name == "tokens":
        fits, allowed = isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of texts"
    elif name == "ids":
        fits, allowed = isinstance(value, list) and all(type(x) is int for x in value), "a list of whole numbers"
    elif name == "prompts":
        fits = isinstance(value, dict) and all(isinstance(x, str) for x in value.values())
        allowed = "an object of texts"
    elif name == "facts":
        fits, allowed = isinstance(value, dict), "an object"
    elif value is None:
        return None
    elif name in COLUMNS:
        if isinstance(value, list) and all(x is None or _is_number(x) for x in value):
            return [_finite(x) for x in value]
        fits, allowed = False, "a list of numbers"
    elif name == "top":
        if _is_top(value):
            return [[(text, float(number)) for text, number in best] for best in value]
        fits, allowed = False, "a list of lists of [text, number]"
    else:
        fits = isinstance(value, bool) if name == "finished" else type(value) is int and abs(value) < 2**53
        allowed = "true or false" if name == "finished" else "a whole number"
    if not fits:
        raise DataError(f"{where}: {name} must be {allowed}, not {str(value)[:40]}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _is_top(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(best, list)
        and all(
            isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and _is_number(one[1]) for one in best
        )
        for best in value
    )
