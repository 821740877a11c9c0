"""Charts as inline SVG, drawn by matplotlib.

Colours become CSS properties of the page, so that one drawing serves light and dark; styles become classes, so that the
page's content security policy need not allow `style` attributes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from .. import metrics
from .lines import number
from .reading import Arm, RunData

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
INK, SOFT, LINE = "#010101", "#020202", "#030303"  # placeholders for the page's own colours
SERIES = [f"#0{i}0a0b" for i in range(8)]
COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(SERIES)
}
# Wong 2011 (Nature Methods 8:441), distinguishable with all common forms of colour vision; lighter in the dark scheme.
PALETTE = (
    ("#0072b2", "#56b4e9"), ("#b35900", "#f0a13c"), ("#00795a", "#3fc79a"), ("#a8487f", "#e08fc0"),
    ("#6a5d00", "#e6da52"), ("#3d5a80", "#9fb8d9"), ("#8a2d2d", "#e88a8a"), ("#4a4a4a", "#c0c0c0"),
)  # fmt: skip
DRAWN = 400  # points of a line; longer lines are thinned
# The charts after those of the task scores; heading, unit and what is logged come from `rlkd.metrics`.
PANELS = (
    "regret", "loss", "kl", "entropy", "length", "finish_rate", "clip_fraction", "explained_variance",
    "tokens_per_second",
)  # fmt: skip
TRAIN, GREEDY, SAMPLED = "training", "held out, greedy", "held out, sampled"
LINES = {metrics.LOG: TRAIN, metrics.GREEDY: GREEDY, metrics.SAMPLED: SAMPLED}
STYLES: dict[str, dict[str, Any]] = {
    TRAIN: {"linewidth": 1.3},
    GREEDY: {"linewidth": 1.3, "marker": "o", "markersize": 5, "linestyle": "--"},
    SAMPLED: {"linewidth": 1.0, "marker": "D", "markersize": 5, "fillstyle": "none", "linestyle": ":"},
}


@dataclass(frozen=True)
class Series:
    """A line of a chart: points (x, y); `what` is TRAIN, GREEDY or SAMPLED; colour is an index of the palette."""

    name: str
    what: str
    colour: int
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing and its numbers: `header` and `rows` of a table."""

    title: str
    unit: str
    svg: Markup
    description: str
    header: list[str]
    rows: list[list[Any]]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [["" if x is None else x if isinstance(x, str) else f"{x:.5g}" for x in row] for row in self.rows]


@dataclass
class Sheet:
    """The CSS classes of the charts of one page; every style is written once."""

    names: dict[str, str] = field(default_factory=dict)

    def name(self, style: str) -> str:
        """The class of a style attribute."""
        return self.names.setdefault(style, f"x{len(self.names)}")

    def css(self) -> str:
        """The rules of the classes and the colours of the series."""
        colours = "".join(f"--s{i}: light-dark({light}, {dark}); " for i, (light, dark) in enumerate(PALETTE))
        rules = [f".rlkd svg .{name} {{ {style} }}" for style, name in self.names.items()]
        swatches = [f".rlkd .swatch.s{i} {{ background: var(--s{i}); }}" for i in range(len(PALETTE))]
        return "\n".join([f".rlkd {{ {colours}}}", *swatches, *rules])


def curves(arms: Sequence[Arm], sheet: Sheet) -> list[Chart]:
    """One chart per metric that has data: one line per run, one colour per arm."""
    tasks = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.task_names)
    rows = [*map(metrics.held_out, tasks), *map(metrics.metric, PANELS)]
    charts = []
    for row in rows:
        occasions = (metrics.GREEDY, metrics.SAMPLED) if row.task else [o for o in row.logged if o in LINES]
        series = [
            Series(name=run.title, what=LINES[occasion], colour=colour, points=points)
            for colour, arm in enumerate(arms)
            for run in arm.runs
            for occasion in occasions
            if (points := _points(run, occasion.prefix + row.name))
        ]
        if series:
            title = row.title or row.name
            unit = "" if row.quantity.casefold() == title.casefold() else row.quantity
            charts.append(_line_chart(title, unit, series, sheet))
    return charts


def scatter(title: str, names: tuple[str, str], points: Sequence[tuple[str, float, float]], sheet: Sheet) -> Chart:
    """A chart of named points (name, x, y), all in the colour of text: they bear their names, and the colours of the
    page are those of its arms. `names` are those of the axes.
    """

    def draw(axes: Any) -> None:
        for label, x, y in points:
            axes.plot([x], [y], "o", color=INK, markersize=6)
            right = len(points) > 1 and x == max(p[1] for p in points)
            axes.annotate(label, (x, y), xytext=(-6 if right else 6, 4), textcoords="offset points", color=INK,
                          fontsize=9, ha="right" if right else "left")  # fmt: skip
        axes.margins(0.2)
        axes.set_xlabel(names[0], color=SOFT)

    said = "; ".join(f"{label}: {x:.4g}, {y:.4g}" for label, x, y in points)
    svg = drawing(draw, title, sheet)
    return Chart(title, names[1], svg, f"{title}. {said}", ["", *names], [list(point) for point in points])


def _points(run: RunData, name: str) -> list[tuple[float, float]]:
    lines = run.evaluations if name.startswith("eval_") else run.train
    pairs = ((line["step"], number(line.get(name))) for line in lines)
    return [(step, value) for step, value in pairs if value is not None]


def _line_chart(title: str, unit: str, series: list[Series], sheet: Sheet) -> Chart:
    def draw(axes: Any) -> None:
        for line in series:
            x, y = zip(*thinned(line.points), strict=True)
            style = STYLES[line.what] | ({"marker": "o", "markersize": 4} if len(x) == 1 and line.what == TRAIN else {})
            axes.plot(x, y, color=SERIES[line.colour % len(SERIES)], **style)
        axes.set_xlabel("step", color=SOFT)

    names = [f"{line.name}, {line.what}" for line in series]
    values = [dict(thinned(line.points)) for line in series]
    steps = sorted({x for own in values for x in own})
    rows = [[x, *(own.get(x) for own in values)] for x in steps]
    said = "; ".join(
        f"{name}: {line.points[0][1]:.4g} at step {line.points[0][0]:g}"
        + (f" to {line.points[-1][1]:.4g} at step {line.points[-1][0]:g}" if len(line.points) > 1 else "")
        for name, line in zip(names, series, strict=True)
    )
    return Chart(title, unit, drawing(draw, title, sheet), f"{title}. {said}", ["step", *names], rows)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """About `DRAWN` of the points at most, the first and the last included."""
    every = -(-len(points) // DRAWN)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def drawing(
    draw: Callable[[Any], None], title: str, sheet: Sheet, *, height: float = 2.7, left: float = 0.14
) -> Markup:
    """A chart as inline SVG, 4.6 inches wide; `left` is the share of the width for labels of the axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif"}
    with rc_context(settings):
        figure = Figure(figsize=(4.6, height))
        figure.subplots_adjust(left=left, right=0.98, top=1 - 0.11 / height, bottom=0.49 / height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(colors=SOFT)
        axes.grid(visible=True, color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _tidy(text.getvalue(), title, sheet)


def _tidy(text: str, title: str, sheet: Sheet) -> Markup:
    """matplotlib's SVG as part of a page: classes for styles, ids that are unique, no metadata."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text)
    prefix = re.sub(r"\W+", "-", title.lower())
    used = set(re.findall(r"#([\w-]+)", " ".join(
        value for e in root.iter() for name, value in e.attrib.items() if name in (XLINK, "clip-path")
    )))  # fmt: skip
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if (style := element.attrib.pop("style", None)) is not None:
            element.set("class", sheet.name(_themed(style)))
        if (name := element.attrib.pop("id", None)) in used:
            element.set("id", f"{prefix}-{name}")
        if (link := element.attrib.pop(XLINK, None)) is not None:
            element.set("href", link.replace("#", f"#{prefix}-"))
        if (clip := element.get("clip-path")) is not None:
            element.set("clip-path", clip.replace("#", f"#{prefix}-"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _themed(style: str) -> str:
    """A style with the page's colours and fonts in place of matplotlib's."""
    for stand_in, colour in COLOURS.items():
        style = style.replace(stand_in, colour)
    style = re.sub(r"font-family: [^;]*", "font-family: inherit", style)
    return style.strip().rstrip(";")
