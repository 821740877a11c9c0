"""The report of a run as one HTML page that needs neither a network nor scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..evaluation.classes import class_scores, in_words
from ..evaluation.samples import Sample
from ..inspection.markup import environment, heat_map_html, legend_html, standalone_page
from . import findings, words
from .charts import Chart, Sheet, curves, scatter
from .footprints import footprints
from .forest import forests
from .lines import Row, number
from .reading import Arm

WORST = 5
LATENCY = "ms per sentence (batch size 1)"
RUN_FACTS = ("rlkd", "trainer", "command", "started", "resumed", "git", "processes")


def report(arms: Sequence[Arm], title: str) -> str:
    """The page of a run, or of the arms of one job."""
    sheet = Sheet()
    comparisons = findings.headline_comparisons(arms)
    students = [arm for arm in arms if not arm.is_teacher] or arms
    failed = [found for arm in findings.watched(arms) if (found := findings.failures(arm, WORST)) is not None]
    body = _render(
        "report.html.jinja",
        arms=arms,
        learns="reinforcement learning" if any(arm.kind == "rl" for arm in arms) else "training",
        headline=words.headline(comparisons, arms),
        sentences=words.helped(arms, comparisons),
        prices=[words.price(findings.cost(arm)) for arm in students],
        fair=_fair(arms, comparisons),
        weak=[(found, words.weak_spots(found)) for found in failed],
        worst=[(found, [_cases(found, row) for row in found.worst]) for found in failed],
        heated=any("tokens" in row for found in failed for row in found.worst),
        groups=_groups,
        table=results_table(arms),
        charts=curves(arms, sheet) + _trade_offs(arms, sheet),
        forests=forests(findings.against_imitation(arms) or comparisons, sheet),
        labels=[(arm.name, rows) for arm in arms if (rows := _each_label(arm))],
        pairs=[
            [c.one, c.other, words.directed(c.score), *words.difference(c)] for c in findings.against_imitation(arms)
        ],
        sizes=_sizes(arms),
        latency=LATENCY,
        alarms=[
            [run.title, *(alarm.get(name, "–") for name in ("step", "alarm", "message", "value", "threshold"))]
            for arm in arms for run in arm.runs for alarm in run.alarms
        ],
        settings=settings_table(arms),
        facts=_facts(arms),
        notes=_notes(arms),
        against_imitation=any(c.other not in (findings.START, *findings.constants()) for c in comparisons),
        several=any(len(arm.runs) > 1 for arm in arms),
    )  # fmt: skip
    return _page(f"{title}: report", body, sheet)


def comparison(arms: Sequence[Arm]) -> str:
    """The page of arms side by side, each against the first that is not the teacher."""
    sheet = Sheet()
    title = f"{len(arms)} runs compared"
    differences = [
        [c.one, words.directed(c.score), *words.difference(c), c.difference.interval.over]
        for c in findings.against_first(arms)
    ]
    body = _render(
        "compare.html.jinja", arms=arms, table=results_table(arms), charts=curves(arms, sheet),
        settings=settings_table(arms), differences=differences, base=findings.reference(arms).name,
        forests=forests(findings.against_first(arms), sheet), warnings=words.one_class(arms),
        labels=[(arm.name, rows) for arm in arms if (rows := _each_label(arm))],
    )  # fmt: skip
    return _page(title, body, sheet)


def results_table(arms: Sequence[Arm]) -> dict[str, Any]:
    """Every arm's newest scores with their intervals: header, rows of text, and what was resampled."""
    names = [*findings.task_names(arms), *findings.COMMON]
    names = [n for task in names for n in ((task, f"sample_{task}") if task not in findings.COMMON else (task,))]
    cells = {(arm.name, name): findings.interval(arm, name) for arm in arms for name in names}
    kept = [name for name in names if any(cells[arm.name, name] is not None for arm in arms)]
    over = dict.fromkeys(cell.over for cell in cells.values() if cell is not None and cell.low is not None)
    rows = [[arm.name, *(words.with_interval(name, cells[arm.name, name]) for name in kept)] for arm in arms]
    if (constant := _constant_row(arms, kept)) is not None:
        rows.append(constant)
    header = [f"{words.name_of(name)}, {words.unit(name)}".removesuffix(", ") for name in kept]
    return {"header": ["", *header], "rows": rows, "over": list(over)}


def _constant_row(arms: Sequence[Arm], names: Sequence[str]) -> list[str] | None:
    """The line of classifiers' tables that any classifier should beat."""
    found = next((c for arm in arms if (c := findings.against_constant(arm)) is not None), None)
    if found is None or found.score not in names:
        return None
    base = words.shown(found.score, found.means[1], unit=False)
    return [found.other, *(base if name == found.score else "–" for name in names)]


def _each_label(arm: Arm) -> list[list[str]]:
    """Rows of a table: a label, its rows, how often it is predicted, precision, recall and F1."""
    scores = class_scores(*findings.predictions(arm), arm.runs[0].labels) or findings.summarised_classes(arm)
    return [[c.label, str(c.rows), str(c.predicted), *(f"{x:.3f}" for x in (c.precision, c.recall, c.f1))]
            for c in scores[: findings.LABELS_SHOWN]]  # fmt: skip


def settings_table(arms: Sequence[Arm]) -> dict[str, Any]:
    """The settings in run.json: those that differ between arms (name, value per arm), and those shared by all."""
    own = {arm.name: flat(arm.runs[0].record.get("settings", {})) for arm in arms if arm.runs[0].record}
    names = list(dict.fromkeys(name for settings in own.values() for name in settings))
    values = {name: [settings.get(name, "–") for settings in own.values()] for name in names}
    return {
        "arms": list(own),
        "differ": [[name, *given] for name, given in values.items() if len(set(given)) > 1],
        "same": [(name, given[0]) for name, given in values.items() if len(set(given)) == 1],
    }


def flat(settings: Any) -> dict[str, str]:
    """name -> value as text, for settings as in run.json."""
    if not isinstance(settings, dict):
        return {}
    return {str(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in settings.items()}  # fmt: skip


def jinja_source(name: str) -> str:
    """The text of a file in rlkd/report/assets."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _render(name: str, **values: Any) -> str:
    made = environment().overlay(loader=jinja2.FunctionLoader(jinja_source))
    return made.get_template(name).render(heat_map=heat_map_html, legend=legend_html(), shown=words.shown,
                                          name_of=words.name_of, **values)  # fmt: skip


def _page(title: str, body: str, sheet: Sheet) -> str:
    return standalone_page(title, Markup(body), css=f"{jinja_source('report.css')}\n{sheet.css()}")


def _groups(found: findings.Failures) -> tuple[list[str], list[list[str]]]:
    names = list(found.groups[0].scores)
    rows = [[g.name, str(g.rows), *(words.shown(name, g.scores.get(name)) for name in names)] for g in found.groups]
    return ["", "answers", *map(words.name_of, names)], rows


def _notes(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Each note once, with the runs it concerns."""
    notes: dict[str, list[str]] = {}
    for arm in arms:
        for run in arm.runs:
            for note in run.notes:
                notes.setdefault(note, []).append(run.title)
    return list(notes.items())


def _fair(arms: Sequence[Arm], comparisons: Sequence[findings.Comparison]) -> list[str]:
    by_name = {arm.name: findings.cost(arm) for arm in arms}
    pairs = dict.fromkeys((c.one, c.other) for c in comparisons if c.other in by_name)
    return [said for one, other in pairs if (said := words.fairness(by_name[one], by_name[other]))]


def _cases(found: findings.Failures, row: Row) -> dict[str, Any]:
    """A held-out row for the heat map: the student's greedy and sampled answer."""
    samples = []
    for prefix, source in (("", "student"), ("sample_", "student sampled")):
        tokens, rewards = row.get(f"{prefix}tokens"), row.get(f"{prefix}rewards")
        if isinstance(tokens, list) and isinstance(rewards, list) and len(tokens) == len(rewards):
            samples.append(
                Sample(
                    id=str(row.get("id")),
                    input=str(row.get("input", "")),
                    source=source,
                    text=str(row.get(f"{prefix}student", "")),
                    tokens=[str(token) for token in tokens],
                    ids=[0] * len(tokens),
                    rewards=[number(reward) for reward in rewards],
                    finished=row.get(f"{prefix}finish_rate") != 0,
                )
            )
    row = {key: in_words(value, found.run.labels) if key in ("label", "predicted") else value
           for key, value in row.items()}  # fmt: skip
    return {"row": row, "samples": samples, "score": number(row.get(found.by))}


def _trade_offs(arms: Sequence[Arm], sheet: Sheet) -> list[Chart]:
    """Score against size and latency of teachers and encoder students, if there is a summary.json."""
    found = footprints(arms)
    charts = []
    for title, axis, figure in (
        ("Score against size", "megabytes", "megabytes"),
        ("Score against latency", LATENCY, "ms"),
    ):
        points = [(f.name, x, f.score) for f in found if (x := getattr(f, figure)) is not None and f.score is not None]
        if points:
            charts.append(scatter(title, (axis, "dev score"), points, sheet))
    return charts


def _sizes(arms: Sequence[Arm]) -> list[list[str]]:
    rows = []
    for found in footprints(arms):
        figures = ((found.parameters, 0), (found.megabytes, 2), (found.ms, 3), (found.score, 4))
        rows.append([found.name, *("–" if x is None else f"{x:,.{digits}f}" for x, digits in figures)])
    return rows


def _facts(arms: Sequence[Arm]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per arm: its command, data, templates, models and versions from run.json."""
    out = []
    for arm in arms:
        record = arm.runs[0].record
        sections = {name: record.get(name) for name in RUN_FACTS} | {
            f"{part}: {name}": value
            for part in ("models", "data", "versions")
            for name, value in (record.get(part) or {}).items()
        }
        sections |= {"templates": record.get("templates")}
        lines = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                 for name, value in sections.items() if value]  # fmt: skip
        if lines:
            out.append((arm.name, lines))
    return out
