"""The end of `rlkd distill`: report.html, the student's card, and what to read on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.task_metrics import task_metric_of
from ..io.cards import CARD, table
from ..io.files import write_text
from ..io.folders import write_page
from ..report.page import report as page
from ..report.reading import TASK_ORDER, Arm, read_run
from ..runs.card import FOLDER
from ..runs.files import HELD_OUT
from .choice import Helped
from .run import Plan, is_weak, stage_names, trained_folder, weak_words

SHOWN_TEXT = 200  # characters of an input in the snippet
Facts = dict[str, Any]


def finish(plan: Plan) -> list[str]:
    """Write the page and the card; the summary, where everything is, and how to serve the student, as lines."""
    out = Path(plan.args.out)
    rows = _classifier_rows(plan, out) if plan.pair.encoder else _rows(plan, out)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[role, *(_cell(row.get(name)) for name in names)] for role, row in rows.items()]
    said = f"{len(plan.rows.test)} test rows, which nothing was trained on or chosen by"
    source = trained_folder(plan)
    card = (source / CARD).read_text(encoding="utf-8")
    section = f"## Test\n\n{said[0].upper()}{said[1:]}.\n\n{table(('', *names), cells)}\n\n## Training"
    card = card.replace("## Training", section, 1)
    write_text(out / "student" / CARD, card)
    runs = [name for name in ("warm-up", "rl", "training") if name in stage_names(plan)]
    arms = [Arm(name, [read_run(out / name, name)]) for name in runs]
    write_page(out / "report.html", page(arms, out.resolve().name))
    weak = [weak_words(plan.record)] if len(stage_names(plan)) < len(plan.stages) else []
    if not weak and is_weak(plan.record):
        weak = [
            f"RL began weak: {plan.record.readiness()['words']} (docs/distill.md, When the start check does not pass)"
        ]
    if "rl" in runs:
        weak.append(str(Helped.of(out / "rl")))
    return [
        *(["", said, *_aligned(["", *names], cells), *weak, ""]),
        f"student: {out / 'student'}",
        f"report: {out / 'report.html'}",
        f"answers and numbers: {out / ('training' if plan.pair.encoder else 'evaluation')}",
        "",
        snippet(card, out / "student", plan.rows.test[0].student_input),
    ]


def _rows(plan: Plan, out: Path) -> dict[str, Facts]:
    """Role -> the numbers to show of it."""
    roles = [role for role in ("teacher", "warm-up", "rl") if f"evaluation/{role}" in stage_names(plan)]
    found = {role: json.loads((out / "evaluation" / role / "evaluation.json").read_text()) for role in roles}
    scores = {role: one["numbers"] for role, one in found.items()}
    scores["teacher"] = scores["teacher"] | teacher_scores(plan, out) | {"regret": 0.0}
    tasks = set(teacher_scores(plan, out))
    best = sorted(tasks, key=lambda name: (TASK_ORDER.index(name) if name in TASK_ORDER else 9, name))[:1]
    return {
        role: {
            **{name: round(scores[role][name], 2) for name in (*best, "regret", "length")},
            "parameters": one["speed"]["parameters"],
            "MB": round(one["speed"]["megabytes"], 1),
            "tokens/s": round(one["speed"]["tokens_per_second"]),
        }
        for role, one in found.items()
    }


def teacher_scores(plan: Plan, out: Path) -> dict[str, float]:
    """Task scores of the teacher's greedy answers as every other stage reads it: those beside the student's."""
    metric = task_metric_of(plan.args.task_metric)
    if metric is None:
        return {}
    lines = (out / "evaluation/warm-up" / HELD_OUT).read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    found = metric([row["teacher"] for row in answers], [plan.rows.test[row["index"]] for row in answers])
    return {name: float(value) for name, value in found.items()}


def _classifier_rows(plan: Plan, out: Path) -> dict[str, Facts]:
    """Role -> accuracy on the test rows and so on; without references, agreement with the teacher."""
    from ..labels.store import load_pseudolabels

    summary = json.loads((out / "training/summary.json").read_text())
    name = "accuracy" if plan.args.reference_column is not None else "agreement with the teacher"
    rows = load_pseudolabels(out / "labels-test").to_list()
    plain = [
        (row["label"].strip().casefold(), [r.strip().casefold() for r in row["references"] or [row["label"]]])
        for row in rows
    ]
    sizes = plan.pair.sizes()
    student = summary["student"]
    return {
        "teacher": {name: round(sum(a in r for a, r in plain) / len(plain), 3), "parameters": sizes["teacher"]},
        "majority": {name: round(summary["majority"]["scores"]["test"]["accuracy"], 3)},
        "student": {
            name: round(student["scores"]["test"]["accuracy"], 3),
            "parameters": student["parameters"],
            "MB": round(student["megabytes"], 1),
            "ms a text": round(student["ms_per_sentence"]["batch_1"], 2),
        },
    }


def snippet(card: str, folder: Path, text: str) -> str:
    """The code of a card that uses the model, for this folder and this text."""
    found = re.search(r"## Use\n\n```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    shown = text if len(text) <= SHOWN_TEXT else "A text."
    return found[1].replace(FOLDER, str(folder)).replace('"A text."', json.dumps(shown, ensure_ascii=False)).strip()


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _aligned(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, the first on the left and numbers on the right."""
    lines = [list(names), *map(list, cells)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(names))]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
