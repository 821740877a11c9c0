"""The content of the pages for terminals and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import findings, words
from .page import results_table, settings_table
from .reading import Arm


def lines(arms: Sequence[Arm]) -> list[str]:
    """The three answers as lines of text."""
    comparisons = findings.headline_comparisons(arms)
    learns = "reinforcement learning" if any(arm.kind == "rl" for arm in arms) else "training"
    out = [f"Did {learns} help? {words.headline(comparisons, arms)}"]
    out += [f"  {line}" for line in words.helped(arms, comparisons)]
    out += ["At what cost?", *(f"  {words.price(findings.cost(arm))}" for arm in arms if not arm.is_teacher)]
    weak = [line for arm in findings.watched(arms) if (found := findings.failures(arm)) is not None
            for line in words.weak_spots(found)]  # fmt: skip
    return [*out, "Where does it fail?", *(f"  {line}" for line in weak or ["Not known: no held-out rows were kept."])]


def summary(arms: Sequence[Arm]) -> dict[str, Any]:
    """The answers and their numbers as JSON-able values."""
    comparisons = findings.headline_comparisons(arms)
    failed = [found for arm in findings.watched(arms) if (found := findings.failures(arm)) is not None]
    return {
        "helped": words.headline(comparisons, arms),
        "comparisons": [_plain(c) for c in comparisons],
        "unknown": [] if comparisons else words.why_unknown(arms),
        "cost": [asdict(findings.cost(arm)) for arm in arms],
        "failures": [
            {"arm": f.arm, "by": f.by, "mean": f.total, "rows": f.rows, "rows_with_half": f.half,
             "first_token_share": f.first_share, "last_token_share": f.end_share,
             "groups": [asdict(group) for group in f.groups], "worst": [str(row.get("id")) for row in f.worst]}
            for f in failed
        ],
        "scores": _scores(arms),
        "alarms": [alarm for arm in arms for run in arm.runs for alarm in run.alarms],
        "notes": sorted({note for arm in arms for run in arm.runs for note in run.notes}),
    }  # fmt: skip


def differences(arms: Sequence[Arm]) -> dict[str, Any]:
    """A comparison of arms as JSON-able values."""
    settings = settings_table(arms)
    return {
        "runs": [arm.name for arm in arms],
        "settings": {row[0]: dict(zip(settings["arms"], row[1:], strict=True)) for row in settings["differ"]},
        "scores": _scores(arms),
        "differences": [_plain(c) for c in findings.against_first(arms)],
    }


def comparison_tables(arms: Sequence[Arm]) -> None:
    """Print a comparison: differences, scores, settings that differ."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = [[c.one, words.directed(c.score), *words.difference(c), c.difference.interval.over]
             for c in findings.against_first(arms)]  # fmt: skip
    results, settings = results_table(arms), settings_table(arms)
    console = Console(width=None if Console().is_terminal else 200)
    for title, header, rows in (
        (f"differences from {findings.reference(arms).name}, paired by held-out row",
         ["", "score", "difference", "95 % interval", "p", "verdict", "over"], found),
        ("held-out scores (95 % interval)", results["header"], results["rows"]),
        ("settings that differ", ["", *settings["arms"]], settings["differ"]),
    ):  # fmt: skip
        if rows:
            table = Table(title=Text(title), title_justify="left")
            for name in header:
                table.add_column(Text(str(name)), overflow="fold")
            for row in rows:
                table.add_row(*(Text(str(cell)) for cell in row))
            console.print(table)
    for line in words.one_class(arms):
        console.print(Text(line))
    if not found:
        console.print("Differences are not known: the runs share no held-out rows (held_out.jsonl).")


def _plain(comparison: findings.Comparison) -> dict[str, Any]:
    interval = comparison.difference.interval
    return {
        "one": comparison.one,
        "other": comparison.other,
        "score": comparison.score,
        "means": list(comparison.means),
        "difference": interval.value,
        "interval": None if interval.low is None else [interval.low, interval.high],
        "p": comparison.difference.p_value,
        "rows": interval.rows,
        "seeds": interval.seeds,
        "verdict": comparison.verdict,
    }


def _scores(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    names = [*findings.task_names(arms), *findings.COMMON]
    return {
        arm.name: {name: asdict(found) for name in names if (found := findings.interval(arm, name)) is not None}
        for arm in arms
    }
