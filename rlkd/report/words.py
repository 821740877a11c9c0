"""Findings as sentences. Their numbers come from the run's files; what the files do not show is reported as unknown."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.classes import in_words, one_class_warning, only_prediction
from ..metrics import held_out
from .findings import LABELLED, TRUNCATED, Comparison, Cost, Failures, answer
from .intervals import Interval
from .lines import number
from .reading import Arm

HEADLINES = {
    "better": "Yes",
    "worse": "No, results got worse",
    "within noise": "Within noise",
    "mixed": "Mixed: one arm is better, another worse",
    "partly better": "In part: not all arms are better",
    "partly worse": "No: one arm is worse, the others are within noise",
    "not known": "Not known",
}


def is_share(score: str) -> bool:
    """Whether a score is shown as a percentage."""
    return held_out(score).unit == "share"


def unit(score: str) -> str:
    """The unit in which a score is shown; empty if it has none."""
    return "%" if is_share(score) else held_out(score).unit


def name_of(score: str) -> str:
    """The name of a score in words."""
    base = score.removeprefix("sample_").replace("_", " ")
    return f"{base} of samples" if score.startswith("sample_") else base


def directed(score: str) -> str:
    """The name of a score, and which way is better where that is down."""
    return name_of(score) + (" (lower is better)" if held_out(score).lower_is_better else "")


def shown(score: str, value: float | None, *, sign: bool = False, unit: bool = True) -> str:
    """A value of a score as it is printed: shares in %, differences of shares (`sign`) in percentage points."""
    if value is None:
        return "–"
    if is_share(score):
        text, after = f"{100 * value:{'+' if sign else ''}.1f}", "points" if sign else "%"
    else:
        text, after = f"{value:{'+' if sign else ''}.{2 if abs(value) < 1000 else 0}f}", held_out(score).unit
    return text.replace("-", "−") + (f" {after}" if unit and after else "")


def with_interval(score: str, interval: Interval | None) -> str:
    """`93.1 (92.0 to 94.1)`; the value alone where there is no interval, a dash where there is no value."""
    if interval is None:
        return "–"
    text = shown(score, interval.value, unit=False)
    if interval.low is None:
        return text
    return f"{text} ({shown(score, interval.low, unit=False)} to {shown(score, interval.high, unit=False)})"


def verdict(comparison: Comparison) -> str:
    """One comparison in one sentence: both means, the verdict, the size of the difference and its interval."""
    score, both = comparison.score, comparison.difference.interval
    one, other = (shown(score, mean) for mean in comparison.means)
    said = f"{comparison.one} against {comparison.other}: {name_of(score)} {one} against {other}"
    if both.low is None or both.high is None:
        return f"{said}; {both.rows} rows are too few for an interval."
    if comparison.verdict == "within noise":
        value, low, high = (shown(score, end, sign=True, unit=False) for end in (both.value, both.low, both.high))
        return f"{said}, the difference {value} is within noise (95 % interval {low} to {high}; {both.over})."
    # "better by" and "worse by" are followed by sizes, whatever the direction of the score.
    near, far = sorted((abs(both.low), abs(both.high)))
    low, high = (shown(score, end, unit=False) for end in (near, far))
    size = f"{100 * abs(both.value):.1f} points" if is_share(score) else shown(score, abs(both.value))
    return f"{said}, {comparison.verdict} by {size} (95 % interval {low} to {high}; {both.over})."


def difference(comparison: Comparison) -> tuple[str, str, str, str]:
    """Size, interval, p and verdict of a comparison."""
    found, score = comparison.difference, comparison.score
    size = shown(score, found.interval.value, sign=True)
    if found.interval.low is None or found.p_value is None:
        return size, "–", "–", "not known: too few rows"
    low, high = (shown(score, end, sign=True, unit=False) for end in (found.interval.low, found.interval.high))
    p = f"{found.p_value:.4f}" if found.p_value >= 1e-3 else "< 0.001"
    return size, f"{low} to {high}", p, comparison.verdict


def headline(comparisons: Sequence[Comparison], arms: Sequence[Arm] = ()) -> str:
    """The answer to "did it help?": one if all scores agree, else one per score."""
    if not comparisons and is_warm_up(arms):
        return "Not compared: a warm-up"
    answers = {
        score: answer([c for c in comparisons if c.score == score])
        for score in dict.fromkeys(c.score for c in comparisons)
    }
    if len(set(answers.values())) > 1:
        return "; ".join(f"{name_of(score)}: {said}" for score, said in answers.items())
    return HEADLINES[next(iter(answers.values()), "not known")]


def is_warm_up(arms: Sequence[Arm]) -> bool:
    """Whether all that was trained was trained by imitation: what later runs are compared with, not a failure."""
    students = [arm for arm in arms if not arm.is_teacher]
    evaluated = all(run.held_out or run.evaluations for arm in students for run in arm.runs)
    return bool(students) and evaluated and all(arm.kind == "supervised" for arm in students)


def why_unknown(arms: Sequence[Arm]) -> list[str]:
    """What is missing for an answer, and what the logged evaluations show nevertheless."""
    students = [arm for arm in arms if not arm.is_teacher]
    lines = []
    learners = [arm for arm in students if arm.kind == "rl"] or students
    without = [run.title for arm in learners for run in arm.runs if not run.held_out]
    if is_warm_up(arms):
        lines.append(
            "Training by imitation is the start that later runs are compared with: give both folders to rlkd compare, "
            "or a folder that holds both to rlkd report."
        )
    elif without:
        lines.append(
            f"There are no held-out rows (held_out.jsonl) for {'; '.join(without)}, so nothing can be compared row by "
            "row. The first evaluation writes them."
        )
    else:
        lines.append(
            "There is neither an arm trained by imitation to compare with, nor an evaluation before the first step "
            "(set eval_on_start: true)."
        )
    for arm in students:
        for run in arm.runs:
            for name in run.task_names[:1] or ["regret"]:
                known = [(line["step"], value) for line in run.evaluations
                         if (value := number(line.get(f"eval_{name}"))) is not None]  # fmt: skip
                if len(known) > 1:
                    (first, then), (last, now) = known[0], known[-1]
                    lines.append(
                        f"{run.title}: the logged {name_of(name)} went from {shown(name, then)} at step {first} to "
                        f"{shown(name, now)} at step {last}; the uncertainty of the difference is not known."
                    )
    return lines


def helped(arms: Sequence[Arm], comparisons: Sequence[Comparison]) -> list[str]:
    """The sentences below the headline."""
    said = [verdict(comparison) for comparison in comparisons]
    return [*one_class(arms), *([*said, *left_out(arms)] if said else why_unknown(arms))]


def one_class(arms: Sequence[Arm]) -> list[str]:
    """A warning for each classifier that predicts one label for every held-out row."""
    lines = []
    for arm in arms:
        for run in arm.runs:
            predicted = [row["predicted"] for row in run.newest if type(row.get("predicted")) in (int, list)]
            if (label := only_prediction(predicted)) is not None:
                said = in_words(label, run.labels)
                lines.append("Warning: " + one_class_warning(run.title, said, len(predicted)))
    return lines


def left_out(arms: Sequence[Arm]) -> list[str]:
    """The seeds without held-out rows of arms that have some: the answers leave them out."""
    return [
        f"Left out: {run.title}, which has no held-out rows."
        for arm in arms
        for run in arm.runs
        if not run.held_out and any(other.held_out for other in arm.runs)
    ]


def price(cost: Cost) -> str:
    """The cost of an arm, as far as it was logged."""
    parts = []
    if cost.steps is not None:
        parts.append(f"{cost.steps:,.0f} steps")
    if cost.cpu_seconds is not None:
        parts.append(f"{cost.cpu_seconds:,.1f} s of CPU time")
    if cost.seconds is not None:
        parts.append(f"{cost.seconds:,.1f} s of wall-clock time")
    if cost.tokens is not None:
        parts.append(f"{cost.tokens:,.0f} answer tokens")
    ended = f" ({cost.unfinished} unfinished)" if cost.unfinished and parts else ""
    return f"{cost.arm}: {', '.join(parts) or 'not logged'}{ended}"


def fairness(one: Cost, other: Cost) -> str | None:
    """How the costs of two arms compare; None if no cost is known for both."""
    for name, unit in (("cpu_seconds", "CPU time"), ("seconds", "wall-clock time"), ("steps", "steps")):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine and theirs:
            return f"{one.arm} took {mine / theirs:.2f} times the {unit} of {other.arm}."
    return None


def weak_spots(failures: Failures) -> list[str]:
    """Where an arm's students fail."""
    lines = []
    if failures.half is not None:
        lines.append(
            f"{failures.arm}: {failures.half} of {failures.rows} held-out rows account for half of the regret "
            f"(mean {failures.total:.2f} nats)."
        )
        if failures.first_share is not None and failures.end_share is not None:
            lines.append(
                f"{100 * failures.first_share:.0f} % of it is in the first token of an answer, "
                f"{100 * failures.end_share:.0f} % in the last."
            )
    by_input = [group for group in failures.groups if group.name.startswith("inputs")]
    scored = [(group.scores[failures.by], group) for group in by_input if failures.by in group.scores]
    if len(scored) > 1:
        pick = max if held_out(failures.by).lower_is_better else min
        value, group = pick(scored, key=lambda pair: pair[0])
        lines.append(f"It is worst on {group.name}: {name_of(failures.by)} {shown(failures.by, value)}.")
    labelled = [group for group in failures.groups if group.name.startswith(LABELLED) and failures.by in group.scores]
    if len(labelled) > 1:
        pick = max if held_out(failures.by).lower_is_better else min
        group = pick(labelled, key=lambda group: group.scores[failures.by])
        mean = shown(failures.by, group.scores[failures.by])
        lines.append(f"It is worst on {group.name} ({group.rows} rows): {name_of(failures.by)} {mean}.")
    cut = [group.rows for group in failures.groups if group.name == TRUNCATED]
    if cut:
        of = f" of {sum(group.rows for group in by_input)}" if by_input else ""
        lines.append(f"{cut[0]}{of} answers were truncated.")
    return lines
