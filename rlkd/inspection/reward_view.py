"""Answers with what the teacher says of each of their tokens, as plain numbers: `Sample` and `RewardView`.

No tensors here: `build` makes views from models, `saved` reads them from run and label folders, `html` and `terminal`
show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checks import check_choice
from ..errors import DataError, nearest

# In the order in which the answers to one input are shown; any other name may be used and comes last.
SOURCES = ("student", "student before", "student sampled", "rollout", "teacher greedy", "pseudo-label", "reference")
Numbers = list[float | None]
# Column of a sample -> what one number of it is called.
COLUMNS = {
    "rewards": "reward",
    "logprobs": "teacher log-prob",
    "max_logprobs": "largest log-prob",
    "entropies": "teacher entropy",
    "student_logprobs": "student log-prob",
    "values": "value",
    "advantages": "advantage",
}
FORMAT = "rlkd reward view 1"


@dataclass(frozen=True)
class Sample:
    """One answer and its T tokens. A column is None where it is not known, or holds None at single tokens. Nats.

    id, input         name and raw text of the input; answers to one input share the id
    source            whose answer: one of SOURCES, or another name
    text              the answer, special tokens left out
    tokens, ids       [T] pieces of text that join to the answer, and their ids; end-of-sequence included. None of
                      them where only the text is known
    rewards           [T] A_V(s_t, a_t) for the view's V, which training sums (see `rlkd.objectives.rewards`)
    logprobs          [T] log p(a_t|s_t) of the teacher; max_logprobs [T] the largest there; entropies [T] of p(.|s_t)
    student_logprobs  [T] log-probability of the token under the student
    values            [T] the critic's C(s_t); advantages [T] the credit that weighted the token in the loss
    top               [T] the teacher's most probable tokens there, [text, log-probability] each, best first
    prompts           template name -> what the teacher read; with several, all numbers but `top` are means over them
                      and `top` is of their renormalised mean log-probability (under `pool` all are of that)
    finished          False if the answer was cut before its end-of-sequence
    step              optimizer steps the student had taken, in a training run
    facts             whatever else is known, shown beside the sums
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
        """[T] max_a log p(a|s_t) - log p(a_t|s_t) >= 0: what each token costs against the teacher's greedy one."""
        if self.logprobs is None or self.max_logprobs is None:
            return None
        pairs = zip(self.max_logprobs, self.logprobs, strict=True)
        return [None if best is None or given is None else best - given for best, given in pairs]

    @property
    def total_reward(self) -> float | None:
        """Sum of the token rewards: the undiscounted return of the answer less V(s_0), as training sums it."""
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
        """sum_t |log-probability under the student - under the teacher|: how far the two disagree on this answer."""
        if self.student_logprobs is None or self.logprobs is None:
            return None
        pairs = zip(self.student_logprobs, self.logprobs, strict=True)
        return _total([None if a is None or b is None else abs(a - b) for a, b in pairs])


def _total(column: Numbers | None) -> float | None:
    known = [x for x in column if x is not None] if column is not None else None
    return None if known is None or len(known) < len(column or ()) else sum(known, 0.0)


@dataclass(frozen=True)
class Case:
    """All answers to one input, in the order of SOURCES."""

    id: str
    input: str
    samples: list[Sample]

    @property
    def judged(self) -> list[Sample]:
        """The student's answers, or all of them if it has none here: what a case is ranked by."""
        return [s for s in self.samples if s.source == "student"] or self.samples

    @property
    def regret(self) -> float | None:
        """The largest regret."""
        return _largest(s.regret for s in self.judged)

    @property
    def student_gap(self) -> float | None:
        """The largest disagreement of student and teacher."""
        return _largest(s.student_gap for s in self.judged)

    @property
    def template_gap(self) -> float | None:
        """The largest difference of an answer's total reward between two templates; None if none has two."""
        per_answer: dict[tuple[Any, ...], list[float]] = {}
        for s in self.samples:
            if len(s.prompts) == 1 and s.total_reward is not None:
                per_answer.setdefault((s.source, s.step, *s.ids), []).append(s.total_reward)
        return _largest(max(totals) - min(totals) for totals in per_answer.values() if len(totals) > 1)

    @property
    def length(self) -> int:
        """Tokens of the longest answer judged."""
        return max(map(len, self.judged))


def _largest(numbers: Iterable[float | None]) -> float | None:
    return max((x for x in numbers if x is not None), default=None)


# What `RewardView.worst` ranks by.
RANKINGS: dict[str, Callable[[Case], float | None]] = {
    "regret": lambda case: case.regret,
    "templates": lambda case: case.template_gap,
    "student": lambda case: case.student_gap,
    "length": lambda case: case.length,
}


@dataclass(frozen=True)
class RewardView:
    """Samples to look at, with the V (`max`, `lse` or `softmax`) of their rewards.

    A notebook shows it as a heat map; `show()` prints it, `to_html(path)` writes a page, `to_json(path)` the numbers.
    Selections (`worst`, `search`, ...) give a smaller view and keep all answers to an input together.
    """

    samples: Sequence[Sample]
    value: str = "max"
    title: str = "Token rewards"

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def cases(self) -> list[Case]:
        """The samples by input, inputs in the order in which they first come."""
        rank = {source: i for i, source in enumerate(SOURCES)}
        # Training and held-out inputs may have the same ids.
        by_input: dict[tuple[str, str], list[Sample]] = {}
        for sample in self.samples:
            by_input.setdefault((sample.id, sample.input), []).append(sample)
        return [
            Case(*key, sorted(group, key=lambda s: rank.get(s.source, len(rank)))) for key, group in by_input.items()
        ]

    @property
    def above_zero(self) -> bool:
        """Whether some reward is positive: never under `max` and `lse` without a KL term."""
        return any(reward is not None and reward > 0 for s in self.samples for reward in s.rewards or ())

    # Selections

    def keep(self, cases: Iterable[Case]) -> RewardView:
        """The view of these cases, in their order."""
        return replace(self, samples=[sample for case in cases for sample in case.samples])

    def worst(self, n: int, by: str = "regret") -> RewardView:
        """The n inputs with the largest `regret`, disagreement between `templates`, between `student` and teacher, or
        `length`; inputs for which it is not known are left out. Raises ConfigError for another name.
        """
        check_choice("by", by, RANKINGS)
        ranked = [(RANKINGS[by](case), case) for case in self.cases()]
        known = [(number, case) for number, case in ranked if number is not None]
        return self.keep(case for _, case in sorted(known, key=lambda pair: -pair[0])[:n])

    def with_length(self, shortest: int = 0, longest: int | None = None) -> RewardView:
        """Inputs whose longest judged answer has so many tokens."""
        limit = float("inf") if longest is None else longest
        return self.keep(case for case in self.cases() if shortest <= case.length <= limit)

    def search(self, text: str) -> RewardView:
        """Inputs that have `text` in their id, input or one of their answers, whatever its case."""
        wanted = text.casefold()
        return self.keep(
            case
            for case in self.cases()
            if any(wanted in part.casefold() for part in (case.id, case.input, *(s.text for s in case.samples)))
        )

    # JSON

    def to_json(self, path: str | Path | None = None) -> str:
        """The view as JSON text, also written to `path`; `from_json` gives the same view back."""
        samples = [{k: v for k, v in asdict(sample).items() if v is not None} for sample in self.samples]
        head = {"format": FORMAT, "value": self.value, "title": self.title}
        text = json.dumps({**head, "samples": samples})
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> RewardView:
        """The view that `to_json` wrote: its text, or the path of its file (a Path). Raises DataError otherwise."""
        where = str(source) if isinstance(source, Path) else "the text"
        try:
            data = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        except (OSError, ValueError) as error:
            raise DataError(f"{where} holds no reward view: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise DataError(f'{where} holds no reward view: no "format": "{FORMAT}". Write one with to_json().')
        samples = [sample_from(row, f"{where}: sample {i}") for i, row in enumerate(data["samples"])]
        return cls(samples, data["value"], data["title"])

    # Reading

    @classmethod
    def from_run(cls, folder: str | Path, *, step: int | None = None) -> RewardView:
        """What a trainer saved in its run folder, at the last evaluation or that of `step`."""
        from .saved import from_run

        return from_run(Path(folder), step=step)

    @classmethod
    def from_labels(cls, folder: str | Path, tokenizer: Any, **options: Any) -> RewardView:
        """Pseudo-labels of a folder; options as in `rlkd.inspection.labels.from_labels`."""
        from .labels import from_labels

        return from_labels(Path(folder), tokenizer, **options)

    # Showing

    def _repr_html_(self) -> str:
        from .markup import notebook_html

        return notebook_html(self)

    def to_html(self, path: str | Path) -> None:
        """Write one HTML file that needs no network and no server."""
        from .page import page_html

        Path(path).write_text(page_html(self), encoding="utf-8")

    def show(self, console: Any = None) -> None:
        """Print to the terminal, or to a rich Console."""
        from .terminal import show

        show(self, console)


def sample_from(row: dict[str, Any], where: str) -> Sample:
    """A sample from its JSON object. Raises DataError naming `where` for what is missing or not known."""
    names = [f.name for f in fields(Sample)]
    if unknown := sorted(set(row) - set(names)):
        raise DataError(f"{where}: unknown field '{unknown[0]}'.{nearest(unknown[0], names)}")
    try:
        top = row.get("top")
        pairs = None if top is None else [[(str(text), float(number)) for text, number in best] for best in top]
        return Sample(**{**row, "top": pairs})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error
