"""What the data of a run show: did it help, at what cost, where does it fail. What the files do not
show is reported as unknown, with the missing file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.classes import ClassScore
from ..metrics import held_out
from .intervals import Difference, Interval, mean_interval, overall, paired_difference
from .lines import Row, number
from .reading import Arm, RunData

# Shown after the task scores, in this order.
COMMON = ("regret", "sample_regret", "match", "length", "finish_rate")
START = "its start"
# A score of classifiers -> what they are compared with, and the type of a row's label.
CONSTANTS: dict[str, tuple[str, type]] = {
    "accuracy": ("the commonest label for every row", int),
    "subset_accuracy": ("the commonest set of labels for every row", list),
    "mean_squared_error": ("the mean for every row", float),
}
TRUNCATED = "truncated answers"
LABELLED = "rows labelled"
LABELS_SHOWN = 50


@dataclass(frozen=True)
class Comparison:
    """`one` against `other` on a score: the means of both, and of the difference."""

    one: str
    other: str
    score: str
    means: tuple[float, float]
    difference: Difference

    @property
    def verdict(self) -> str:
        """better, worse, within noise or not known."""
        return self.difference.verdict(self.score)


@dataclass(frozen=True)
class Cost:
    """Means over an arm's seeds; None for what no run logged. unfinished: number of runs that did not log their end."""

    arm: str
    steps: float | None
    cpu_seconds: float | None
    seconds: float | None
    tokens: float | None
    unfinished: int = 0


@dataclass(frozen=True)
class Group:
    """Held-out rows that have something in common: their number and their mean scores."""

    name: str
    rows: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Failures:
    """Where the student of an arm is worst, by regret of greedy answers (else by the task score).

    total       mean of that score over `rows` rows
    half        the smallest number of rows that account for half of the regret; None without regret
    end_share   share of the regret in the last token of each answer; first_share, in the first
    worst       the worst rows of the first seed's run, the worst first
    """

    arm: str
    run: RunData
    by: str
    total: float
    rows: int
    half: int | None
    first_share: float | None
    end_share: float | None
    groups: list[Group]
    worst: list[Row]


def evaluated(runs: Sequence[RunData]) -> list[RunData]:
    """The runs that have held-out rows; one that is running or was interrupted may have none yet."""
    return [run for run in runs if run.held_out]


def score_table(runs: Sequence[RunData], name: str) -> tuple[list[str], np.ndarray] | None:
    """ids [N] and scores [S, N] of the newest evaluations, for the rows that all runs share; None if there are none."""
    runs = evaluated(runs)
    tables = [_scores(run.newest, name) for run in runs]
    ids = [key for key in tables[0] if all(key in table for table in tables)] if tables else []
    return (ids, np.array([[table[key] for key in ids] for table in tables])) if ids else None


def interval(arm: Arm, name: str) -> Interval | None:
    """The mean of a score over an arm's rows and seeds; without rows, the logged number and no interval."""
    if found := score_table(arm.runs, name):
        return mean_interval(found[1])
    logged = [number(run.evaluations[-1].get(f"eval_{name}")) for run in arm.runs if run.evaluations]
    known = [value for value in logged if value is not None]
    return Interval(float(np.mean(known)), None, None, 0, len(known)) if known else None


def compare(one: Arm, other: Arm, name: str) -> Comparison | None:
    """The newest evaluations of two arms, paired by row and by the seeds that both have; if they share no seed, means
    over the seeds of each are paired by row.
    """
    both = [{run.seed: run for run in evaluated(arm.runs)} for arm in (one, other)]
    if not all(both):
        return None
    shared = both[0].keys() & both[1].keys()
    runs = [[run for seed, run in own.items() if seed in shared or not shared] for own in both]
    found = score_table([*runs[0], *runs[1]], name)
    if found is None:
        return None
    mine, theirs = found[1][: len(runs[0])], found[1][len(runs[0]) :]
    if not shared:
        mine, theirs = mine.mean(0, keepdims=True), theirs.mean(0, keepdims=True)
    means = (float(mine.mean()), float(theirs.mean()))
    difference = paired_difference(mine, theirs)
    return Comparison(one=one.name, other=other.name, score=name, means=means, difference=difference)


def since_start(arm: Arm, name: str) -> Comparison | None:
    """The newest evaluation against the first of the same runs; None unless the first was before training."""
    runs = [run for run in arm.runs if len(run.held_out) > 1 and min(run.held_out) == 0]
    before = [_scores(run.held_out[0], name) for run in runs]
    found = score_table(runs, name)
    ids = [key for key in (found[0] if found else []) if all(key in table for table in before)]
    if found is None or not ids:
        return None
    place = {key: i for i, key in enumerate(found[0])}
    now = found[1][:, [place[key] for key in ids]]
    then = np.array([[table[key] for key in ids] for table in before])
    means = (float(now.mean()), float(then.mean()))
    difference = paired_difference(now, then)
    return Comparison(one=arm.name, other=START, score=name, means=means, difference=difference)


def headline_scores(arms: Sequence[Arm]) -> list[str]:
    """The scores of the headline: the first task score that all students' rows have, then regret."""
    students = [arm for arm in arms if not arm.is_teacher]
    tasks = [name for name in task_names(students) if all(score_table(arm.runs, name) for arm in students)]
    return [*tasks[:1], *(["regret"] if any(score_table(arm.runs, "regret") for arm in students) else [])]


def task_names(arms: Sequence[Arm]) -> list[str]:
    """Task scores of all runs, that of the headline first."""
    return list(dict.fromkeys(name for arm in arms for run in arm.runs for name in run.task_names))


def strongest_imitation(arms: Sequence[Arm], name: str) -> Arm | None:
    """The arm trained by imitation that is best on a score."""
    others = [(mean, arm) for arm in arms if arm.kind == "supervised" and not arm.is_teacher
              if (mean := _mean(arm, name)) is not None]  # fmt: skip
    best = min if held_out(name).lower_is_better else max
    return best(others, key=lambda pair: pair[0])[1] if others else None


def headline_comparisons(arms: Sequence[Arm]) -> list[Comparison]:
    """The comparisons that answer whether training helped: each RL arm against the strongest imitation arm; without
    one, every arm against its own start.
    """
    scores = headline_scores(arms)
    learners = [arm for arm in arms if arm.kind == "rl"]
    found = [
        compare(arm, other, name) for arm in learners for name in scores if (other := strongest_imitation(arms, name))
    ]
    students = [arm for arm in arms if not arm.is_teacher]
    found = found or [since_start(arm, name) for arm in students for name in scores]
    if not any(found):
        found = [against_constant(arm) for arm in students]
    return [comparison for comparison in found if comparison is not None]


def constants() -> list[str]:
    """What classifiers are compared with."""
    return [name for name, _ in CONSTANTS.values()]


def against_constant(arm: Arm) -> Comparison | None:
    """A classifier against one answer for every held-out row: their commonest label or labels, or their mean number."""
    name = next((name for name in CONSTANTS if score_table(arm.runs, name)), "")
    found = score_table(arm.runs, name)
    labels = {str(row.get("id")): row.get("label") for run in evaluated(arm.runs) for row in run.newest}
    true: list[Any] = [labels.get(key) for key in found[0]] if found else []
    if found is None or not all(type(label) is CONSTANTS[name][1] for label in true):
        return None
    if name == "mean_squared_error":
        scores = np.square(true - np.mean(true))
    else:
        answer, _ = Counter(map(str, true)).most_common(1)[0]
        scores = np.array([float(str(label) == answer) for label in true])
    constant = np.tile(scores, (len(found[1]), 1))
    means = (float(found[1].mean()), float(constant.mean()))
    return Comparison(arm.name, CONSTANTS[name][0], name, means, paired_difference(found[1], constant))


def predictions(arm: Arm) -> tuple[list[Any], list[Any]]:
    """(predicted, true) labels of a classifier's held-out rows, indices or lists of them, pooled over its seeds."""
    rows = [row for run in arm.runs for row in run.newest]
    pairs = [
        (row["predicted"], row["label"])
        for row in rows
        if type(row.get("predicted")) in (int, list) and type(row.get("predicted")) is type(row.get("label"))
    ]
    return [guess for guess, _ in pairs], [label for _, label in pairs]


def summarised_classes(arm: Arm) -> list[ClassScore]:
    """Scores of each type of entity on the dev rows, as the first run's comparison with its teacher has them."""
    student = arm.runs[0].summary.get("student")
    classes = student.get("classes") if isinstance(student, dict) else None
    try:
        return [ClassScore(**one) for one in next(iter(dict(classes or {}).values()), [])]
    except (TypeError, ValueError):  # of another version, or edited
        return []


def reference(arms: Sequence[Arm]) -> Arm:
    """The arm that the others are compared with: the first that is not the teacher's own training."""
    return next((arm for arm in arms if not arm.is_teacher), arms[0])


def against_first(arms: Sequence[Arm]) -> list[Comparison]:
    """Every arm against the reference, on all task scores and on those common to generating students."""
    names, base = [*task_names(arms), *COMMON], reference(arms)
    found = [compare(arm, base, name) for arm in arms if arm is not base for name in names]
    return [comparison for comparison in found if comparison is not None]


def against_imitation(arms: Sequence[Arm]) -> list[Comparison]:
    """Each RL arm against each arm trained by imitation: the headline's scores, of greedy and of sampled answers."""
    names = [name for score in headline_scores(arms) for name in (score, f"sample_{score}")]
    others = [arm for arm in arms if arm.kind == "supervised" and not arm.is_teacher]
    found = [compare(one, two, name) for one in arms if one.kind == "rl" for two in others for name in names]
    return [comparison for comparison in found if comparison is not None]


def answer(comparisons: Sequence[Comparison]) -> str:
    """One answer for comparisons on one score: better, worse, within noise, mixed, partly better / worse, not known."""
    return overall([comparison.verdict for comparison in comparisons])


def cost(arm: Arm) -> Cost:
    """Steps, CPU seconds, wall-clock seconds and answer tokens of an arm's training, means over its seeds."""
    return Cost(
        arm=arm.name,
        steps=average([run.steps for run in arm.runs]),
        cpu_seconds=average([number(run.end.get("train_cpu_seconds")) for run in arm.runs]),
        seconds=average([number(run.end.get("train_runtime")) for run in arm.runs]),
        tokens=average([run.tokens for run in arm.runs]),
        unfinished=sum(not run.end for run in arm.runs),
    )


def watched(arms: Sequence[Arm]) -> list[Arm]:
    """The arms whose failures are shown: those trained by RL, or all students if there are none."""
    students = [arm for arm in arms if not arm.is_teacher] or list(arms)
    return [arm for arm in students if arm.kind == "rl"] or students


def failures(arm: Arm, worst: int = 5) -> Failures | None:
    """Where the students of an arm are worst in the newest evaluation; None without rows."""
    by = next((name for name in ("regret", *arm.runs[0].task_names) if score_table(arm.runs, name)), "")
    found = score_table(arm.runs, by)
    if found is None:
        return None
    ids, scores = found
    first = evaluated(arm.runs)[0]
    rows = {str(row["id"]): row for row in first.newest}
    mean = scores.mean(0)
    order = np.argsort(-mean if held_out(by).lower_is_better else mean, kind="stable")
    half = None
    if by == "regret" and mean.sum() > 0:
        half = int(np.searchsorted(np.cumsum(mean[order]), mean.sum() / 2)) + 1
    first_share, end_share = _where([row for run in arm.runs for row in run.newest])
    names = [name for name in (by, *arm.runs[0].task_names) if score_table(arm.runs, name)]
    return Failures(
        arm=arm.name,
        run=first,
        by=by,
        total=float(mean.mean()),
        rows=len(ids),
        half=half,
        first_share=first_share,
        end_share=end_share,
        groups=_groups(arm, list(dict.fromkeys(names))),
        worst=[first.whole(rows[ids[i]]) for i in order[:worst]],
    )


def _where(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Shares of the regret of greedy answers in their first and in their last token."""
    ends = [row["reward_ends"] for row in rows if "reward_ends" in row]
    total = sum(of_all for _, _, of_all in ends)
    if not total:
        return None, None
    return sum(first for first, _, _ in ends) / total, sum(last for _, last, _ in ends) / total


def _groups(arm: Arm, names: Sequence[str]) -> list[Group]:
    """Rows by length of the input (terciles), label, and whether the answer ended and equals the teacher's."""
    rows = [row for run in arm.runs for row in run.newest]
    words = np.array([row.get("words", 0) for row in rows])
    low, high = np.quantile(words, [1 / 3, 2 / 3])
    by_length = (
        []
        if not words.any()
        else [
            (f"inputs of up to {low:.0f} words", words <= low),
            (f"inputs of {low:.0f} to {high:.0f} words", (words > low) & (words <= high)),
            (f"inputs of more than {high:.0f} words", words > high),
        ]
    )
    labels = sorted({label for row in rows for label in _labels_of(row)})[:LABELS_SHOWN]
    called = {label: _label(arm, label) for label in labels}
    conditions = [
        *by_length,
        *(
            (f"{LABELLED} {name}", np.array([label in _labels_of(row) for row in rows]))
            for label, name in called.items()
        ),
        (TRUNCATED, np.array([row.get("finish_rate") == 0 for row in rows])),
        ("answers equal to the teacher's", np.array([row.get("match") == 1 for row in rows])),
        ("answers that differ from the teacher's", np.array([row.get("match") == 0 for row in rows])),
    ]
    groups = []
    for label, chosen in conditions:
        mine = [row for row, is_in in zip(rows, chosen, strict=True) if is_in]
        means = {name: average([number(row.get(name)) for row in mine]) for name in names}
        if mine:
            groups.append(Group(label, len(mine), {name: mean for name, mean in means.items() if mean is not None}))
    return groups


def _labels_of(row: Row) -> list[int]:
    """The indices of a row's label, or of several."""
    label = row.get("label")
    return label if isinstance(label, list) else [label] if type(label) is int else []


def _label(arm: Arm, label: int) -> str:
    names = arm.runs[0].labels
    return names[label] if 0 <= label < len(names) else str(label)


def _scores(rows: Sequence[Row], name: str) -> dict[str, float]:
    """id -> score, for the rows that have it."""
    pairs = ((str(row.get("id")), number(row.get(name))) for row in rows)
    return {key: value for key, value in pairs if value is not None}


def _mean(arm: Arm, name: str) -> float | None:
    found = score_table(arm.runs, name)
    return None if found is None else float(found[1].mean())


def average(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
