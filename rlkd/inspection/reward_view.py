"""`RewardView`: scored answers (`rlkd.evaluation.samples`) to look at, grouped by input, ranked and selected.

`build` makes views from models, `saved` and `labels` read them from run and label folders; `markup`, `page` and
`terminal` show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import check_choice
from ..errors import DataError
from ..evaluation.samples import Sample, sample_from
from ..io.files import write_text
from ..io.folders import write_page

# The order in which the answers to one input are shown; other names come last.
SOURCES = ("student", "student before", "student sampled", "rollout", "teacher greedy", "pseudo-label", "reference")
FORMAT = "rlkd reward view 1"


@dataclass(frozen=True)
class Case:
    """All answers to one input, in the order of SOURCES."""

    id: str
    input: str
    samples: list[Sample]

    @property
    def ranked_by(self) -> list[Sample]:
        """The answers by which the case is ranked: the student's, or all if there are none of the student."""
        return [s for s in self.samples if s.source == "student"] or self.samples

    @property
    def regret(self) -> float | None:
        """The largest regret."""
        return _largest(s.regret for s in self.ranked_by)

    @property
    def student_gap(self) -> float | None:
        """The largest disagreement between student and teacher."""
        return _largest(s.student_gap for s in self.ranked_by)

    @property
    def template_gap(self) -> float | None:
        """The largest difference in an answer's total reward between two templates; None without two templates."""
        per_answer: dict[tuple[Any, ...], list[float]] = {}
        for s in self.samples:
            if len(s.prompts) == 1 and s.total_reward is not None:
                per_answer.setdefault((s.source, s.step, *s.ids), []).append(s.total_reward)
        return _largest(max(totals) - min(totals) for totals in per_answer.values() if len(totals) > 1)

    @property
    def length(self) -> int:
        """Tokens of the longest of these answers."""
        return max(map(len, self.ranked_by))


def _largest(numbers: Iterable[float | None]) -> float | None:
    return max((x for x in numbers if x is not None), default=None)


# The rankings of `RewardView.worst`.
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
    Selections (`worst`, `search`, ...) return a smaller view and keep all answers to an input together.
    """

    samples: Sequence[Sample]
    value: str = "max"
    title: str = "Token rewards"

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def cases(self) -> list[Case]:
        """The samples grouped by input, in the order in which the inputs first occur."""
        rank = {source: i for i, source in enumerate(SOURCES)}
        # Training and held-out inputs may have the same ids.
        by_input: dict[tuple[str, str], list[Sample]] = {}
        for sample in self.samples:
            by_input.setdefault((sample.id, sample.input), []).append(sample)
        return [
            Case(*key, sorted(group, key=lambda s: rank.get(s.source, len(rank)))) for key, group in by_input.items()
        ]

    def worst_first(self) -> list[tuple[int, Case]]:
        """(place in `cases()`, case), the largest regret first; those of unknown regret come last, in their order."""
        return sorted(enumerate(self.cases()), key=lambda pair: -(pair[1].regret or 0.0))

    @property
    def above_zero(self) -> bool:
        """Whether any reward is positive: never for `max` and `lse` without a KL term."""
        return any(reward is not None and reward > 0 for s in self.samples for reward in s.rewards or ())

    # Selections

    def keep(self, cases: Iterable[Case]) -> RewardView:
        """The view of these cases, in their order."""
        return replace(self, samples=[sample for case in cases for sample in case.samples])

    def worst(self, n: int, by: str = "regret") -> RewardView:
        """The n inputs with the largest `regret`, disagreement between `templates` or between `student` and teacher, or
        `length`; inputs for which it is unknown are left out. Raises ConfigError for another name.
        """
        check_choice("by", by, RANKINGS)
        ranked = [(RANKINGS[by](case), case) for case in self.cases()]
        known = [(number, case) for number, case in ranked if number is not None]
        return self.keep(case for _, case in sorted(known, key=lambda pair: -pair[0])[:n])

    def with_length(self, shortest: int = 0, longest: int | None = None) -> RewardView:
        """Inputs whose longest answer (of the student, if it has one) has `shortest` to `longest` tokens."""
        limit = float("inf") if longest is None else longest
        return self.keep(case for case in self.cases() if shortest <= case.length <= limit)

    def search(self, text: str) -> RewardView:
        """Inputs with `text` in their id, input or one of their answers, ignoring case."""
        wanted = text.casefold()
        return self.keep(
            case
            for case in self.cases()
            if any(wanted in part.casefold() for part in (case.id, case.input, *(s.text for s in case.samples)))
        )

    # JSON

    def to_json(self, path: str | Path | None = None) -> str:
        """The view as JSON text, also written to `path`; `from_json` restores the view."""
        samples = [{k: v for k, v in asdict(sample).items() if v is not None} for sample in self.samples]
        head = {"format": FORMAT, "value": self.value, "title": self.title}
        text = json.dumps({**head, "samples": samples})
        if path is not None:
            write_text(Path(path), text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> RewardView:
        """The view that `to_json` wrote, from its text or the path of its file (a Path). Raises DataError otherwise."""
        where = str(source) if isinstance(source, Path) else "the text"
        try:
            data = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a reward view: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise DataError(f'{where} is not a reward view: no "format": "{FORMAT}". Write one with to_json().')
        found = data.get("samples")
        if not isinstance(found, list):
            raise DataError(f"{where} is not a reward view: it has no list of samples.")
        samples = [sample_from(row, f"{where}: sample {i}") for i, row in enumerate(found)]
        return cls(samples, str(data.get("value", "max")), str(data.get("title", "Token rewards")))

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
        """Write one HTML file that needs no network and no server. Raises ConfigError as `write_page` does."""
        from .page import page_html

        write_page(Path(path), page_html(self))

    def show(self, console: Any = None) -> None:
        """Print to the terminal or to a rich Console."""
        from .terminal import show

        show(self, console)
