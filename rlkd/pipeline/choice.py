"""Whether RL helped on the validation rows: the better one of the two students is the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..metrics import held_out
from ..report.reading import read_run


@dataclass(frozen=True)
class Helped:
    """The score that decides, before RL and after it: of the answers that a user gets, the greedy ones."""

    score: str
    before: float
    after: float

    @classmethod
    def of(cls, rl: Path) -> Helped:
        """From the run folder of RL, which is evaluated before its first update and at its end: the first task score,
        or regret without references.
        """
        run = read_run(rl, "rl")
        score = (*run.task_names, "regret")[0]
        first, last = (line[f"eval_{score}"] for line in (run.evaluations[0], run.evaluations[-1]))
        return cls(score, first, last)

    def __bool__(self) -> bool:
        worse = self.after > self.before if held_out(self.score).lower_is_better else self.after < self.before
        return not worse

    def __str__(self) -> str:
        who = "rl" if self else "warm-up"
        return (
            f"the student is that of {who}: greedy {self.score} on the validation rows was {self.before:.4g} before RL "
            f"and is {self.after:.4g} after it"
        )
