"""Forest plots: the effect of training on each score with its interval, the better side always on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metrics import held_out
from . import words
from .charts import INK, LINE, SERIES, SOFT, Chart, Sheet, drawing
from .findings import Comparison

LONGEST = 40  # characters of a name


def forests(comparisons: Sequence[Comparison], sheet: Sheet) -> list[Chart]:
    """One chart per score with an interval: a line per comparison, with a point and its 95 % interval."""
    known = [c for c in comparisons if c.difference.interval.low is not None]
    return [
        _forest(score, [c for c in known if c.score == score], sheet) for score in dict.fromkeys(c.score for c in known)
    ]


def _forest(score: str, rows: list[Comparison], sheet: Sheet) -> Chart:
    sign = -1.0 if held_out(score).lower_is_better else 1.0
    scale = 100.0 if words.is_share(score) else 1.0
    name = words.name_of(score)
    unit = "points" if words.is_share(score) else held_out(score).unit
    points = [tuple(sorted(sign * scale * x for x in _ends(c))) for c in rows]
    labels = [f"{_cut(c.one)} against {_cut(c.other)}" for c in rows]
    directed = held_out(score).better in ("up", "down")
    title = f"Effect on {name}"

    def draw(axes: Any) -> None:
        for i, (low, value, high) in enumerate(points):
            axes.plot([0, 0], [-i - 0.35, -i + 0.2], color=SOFT, linewidth=1)  # below the name, which it would cross
            axes.plot([low, high], [-i, -i], color=SERIES[0], linewidth=2)
            axes.plot([value], [-i], "o", color=SERIES[0], markersize=6)
            axes.annotate(labels[i], (0, -i), xycoords=("axes fraction", "data"), xytext=(2, 9),
                          textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
        axes.set_ylim(-len(rows) + 0.5, 0.8)
        axes.set_yticks([])
        axes.spines["left"].set_color(LINE)
        sides = "worse ← 0 → better" if directed else "less ← 0 → more"
        axes.set_xlabel(f"{sides}, {unit}".removesuffix(", "), color=SOFT)

    said = "; ".join(
        f"{label}: {value:.4g} ({low:.4g} to {high:.4g})"
        for label, (low, value, high) in zip(labels, points, strict=True)
    )
    table = [[label, value, low, high] for label, (low, value, high) in zip(labels, points, strict=True)]
    return Chart(title, unit, drawing(draw, title, sheet, height=0.9 + 0.45 * len(rows), left=0.03),
                 f"{title}. {said}", ["", "effect", "from", "to"], table)  # fmt: skip


def _ends(comparison: Comparison) -> tuple[float, float, float]:
    found = comparison.difference.interval
    assert found.low is not None
    assert found.high is not None
    return found.low, found.value, found.high


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."
