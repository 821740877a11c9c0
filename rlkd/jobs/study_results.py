"""Statistics over the seeds of a study: mean and spread, paired comparison, table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds. deviation: the standard deviation of the sample, None of a single value."""

    mean: float
    lowest: float
    highest: float
    deviation: float | None
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, range and deviation of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), min(values), max(values), deviation, len(values))


def spread_text(values: Sequence[float], form: str, digits: int) -> str:
    """The spread as text: `form` names fields of Spread in {braces}. A single value is shown alone; without values,
    empty.
    """
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    numbers = {k: v if k == "seeds" else f"{v:.{digits}f}" for k, v in asdict(spread(values)).items()}
    return form.format(**numbers)


def spreads(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The spread of every number that all runs have, as JSON."""
    names = [name for name, value in runs[0].items() if isinstance(value, (int, float))] if runs else []
    return {name: asdict(spread([run[name] for run in runs])) for name in names if all(name in run for run in runs)}


def paired_test(first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any]:
    """Differences first - second of the keys (seeds) that both have.

    n, above_0: pairs, and those in which `first` is higher. mean, and with two or more pairs that are not all alike
    low, high (95 % interval of the mean) and p of the two-sided paired t-test.
    """
    differences = [first[key] - second[key] for key in sorted(first.keys() & second.keys())]
    record: dict[str, Any] = {"n": len(differences), "above_0": sum(d > 0 for d in differences)}
    if differences:
        record["mean"] = round(statistics.mean(differences), 3)
    if len(differences) > 1 and statistics.stdev(differences) > 0:
        from scipy import stats

        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        record |= {"low": round(float(low), 3), "high": round(float(high), 3), "p": round(float(test.pvalue), 5)}
    return record


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; every row as long as the head."""
    lines = [list(head), *map(list, rows)]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(head) + "|", *texts[1:]])
