"""The table of metrics: names resolve, its readers agree with it, and the documentation is what it prints."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd import metrics
from rlkd.evaluation.evaluator import MEANS
from rlkd.metrics import METRICS, held_out, metric
from rlkd.report.charts import PANELS
from rlkd.report.findings import COMMON
from rlkd.report.intervals import Difference, Interval
from rlkd.report.reading import TASK_ORDER
from rlkd.runs.guards import Watch
from rlkd.runs.progress import SHOWN
from rlkd.trainers.arguments import ReinforceArguments

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"
OWN = {"eval_mine", "eval_my_loss"}
EVALUATED = sorted({name for row in METRICS for name in row.names if name.startswith("eval_")} | OWN)


def test_every_name_is_in_one_row():
    names = Counter(name for row in METRICS for name in row.names)
    assert set(names.values()) == {1}
    assert len({row.name for row in METRICS}) == len(METRICS)


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_row_is_found_under_all_its_names(row):
    assert [metric(name) for name in row.names] == [row] * len(row.names)
    assert row.meaning.endswith(".")


@pytest.mark.parametrize(
    ("name", "unit", "better"),
    [
        ("eval_sample_regret", "nats per answer", "down"),
        ("start_length", "tokens per answer", "neither"),
        ("weighted_kd", "nats per row", "down"),
        ("eval_kl", "nats per token", "down"),
        ("eval_finish_rate", "share of answers", "up"),
        ("clip_fraction", "share of tokens", "neither"),
        ("eval_sample_rougeL", "", "up"),
        ("eval_sample_accuracy", "share of rows", "up"),  # of a user's metric for generating students
        ("tokens_per_second", "tokens per second", "up"),
        ("eval_seconds", "seconds", "down"),
    ],
)
def test_names_resolve(name, unit, better):
    assert (metric(name).quantity, metric(name).better) == (unit, better)


def test_scores_are_found_with_and_without_eval():
    assert held_out("sample_regret") is held_out("eval_sample_regret") is metric("regret")
    assert held_out("accuracy") is metric("eval_accuracy")


def test_unknown_names_are_scores_of_the_user():
    assert metric("eval_sample_mine").name == metric("eval_mine").name == "mine"
    assert (metric("eval_mine").better, metric("eval_my_loss").better) == ("up", "down")
    assert metric("eval_mine").task
    # `tokens` is logged in training; a score that a user calls so is another number.
    assert held_out("tokens").task
    assert not metric("tokens").task


@pytest.mark.parametrize("name", EVALUATED)
def test_the_readers_agree_on_the_direction(tmp_path, name):
    """The best checkpoint, the report's verdict and the alarm on held-out scores."""
    row, options = metric(name), {"eval_strategy": "steps", "eval_steps": 1}
    args = ReinforceArguments(str(tmp_path), use_cpu=True, metric_for_best_model=name, **options)
    assert args.greater_is_better == (row.better != "down")
    verdict = Difference(Interval(1.0, 0.5, 1.5, 60, 1), 0.01).verdict(name.removeprefix("eval_"))
    assert verdict == {"up": "better", "down": "worse", "neither": "more"}[row.better]
    fires = {}
    for direction, values in (("up", [6.0, 6.2, 6.4, 6.6, 6.8]), ("down", [6.8, 6.6, 6.4, 6.2, 6.0])):
        watch = Watch()
        lines = zip([0.9, 0.8, 0.7, 0.6, 0.5], values, strict=True)
        records = [{"regret": r, "eval_seconds": 1.0} | {name: v} for r, v in lines]
        fires[direction] = "held_out_worse" in {alarm.name for record in records for alarm, _ in watch.add(record)}
    watched = row.task or row.name == "regret"
    assert fires == {"up": watched and row.better == "down", "down": watched and row.better == "up"}


def test_the_evaluator_gives_the_rows_of_evaluations():
    """Apart from task scores and what the trainers add."""
    rows = [row for row in METRICS if metrics.HELD_OUT.items() <= row.logged.items() and not row.task]
    assert {row.name for row in rows} | {"match"} == {name.removeprefix("sample_") for name in MEANS}


def test_names_that_the_report_selects_are_in_the_table():
    """A misspelled one would pass for a user's own score."""
    chosen = [*map(metric, PANELS), *map(held_out, (*COMMON, *TASK_ORDER)), *map(metric, SHOWN)]
    assert [row.name for row in chosen if row not in METRICS] == []


def test_the_documentation_has_the_table(tmp_path, capsys):
    text = DOCS.read_text(encoding="utf-8")
    copy = tmp_path / "metrics.md"
    copy.write_text(text, encoding="utf-8")
    metrics.main([str(copy)])
    assert copy.read_text(encoding="utf-8") == text
    metrics.main([])
    assert metrics.BEGIN + capsys.readouterr().out + metrics.END_OF_TABLES in text


def test_the_documentation_follows_the_table(tmp_path, monkeypatch):
    """One row added: the command writes it, and nothing around the tables changes."""
    new = replace(metric("regret"), name="cosine", meaning="A new number.")
    monkeypatch.setitem(metrics.SECTIONS, "New", (new,))
    copy = tmp_path / "metrics.md"
    copy.write_text(f"before\n{metrics.BEGIN}old\n{metrics.END_OF_TABLES}after\n", encoding="utf-8")
    metrics.main([str(copy)])
    text = copy.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "`cosine`, `start_cosine`, `eval_cosine`, `eval_sample_cosine`" in text
    assert "\nold\n" not in text
