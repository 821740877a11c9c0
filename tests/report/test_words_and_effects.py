"""What a reader takes from a page is true: classifiers, the reference, signs, warm-ups, effects."""

from __future__ import annotations

import json
import re

import pytest
from test_page import Page

from rlkd.cli.main import app
from rlkd.report import findings, words
from rlkd.report.charts import Sheet
from rlkd.report.forest import forests
from rlkd.report.page import comparison, report
from rlkd.report.reading import read_arms, read_side_by_side
from runs import arms, held_out, lines, write_run


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    from markupsafe import Markup

    for module in ("charts", "forest"):
        monkeypatch.setattr(f"rlkd.report.{module}.drawing", lambda *_, **__: Markup("<svg></svg>"))


def classifier(folder, predicted, true, *, names=("no", "yes")):
    """A run of the encoder recipe whose first evaluation was after training began."""
    rows = [
        {"step": step, "id": str(i), "label": k, "predicted": guess, "accuracy": float(guess == k), "input": "a"}
        for step in (14, 28) for i, (guess, k) in enumerate(zip(predicted, true, strict=True))
    ]  # fmt: skip
    lines(folder / "held_out.jsonl", rows)
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    logged = [{"step": s, "eval_score": accuracy, "eval_accuracy": accuracy, "eval_loss": 0.5} for s in (14, 28)]
    lines(folder / "metrics.jsonl", [{"step": 10, "loss": 1.0, "weighted_ce": 1.0}, *logged])
    (folder / "run.json").write_text(
        json.dumps({"trainer": "TKDTrainer", "settings": {"metric_for_best_model": "score"}})
    )
    (folder / "summary.json").write_text(json.dumps({"labels": list(names)}))
    return folder


TRUE = [0] * 14 + [1] * 16


def test_a_classifiers_rows_are_seen(tmp_path):
    guesses = [0] * 12 + [1] * 2 + [1] * 15 + [0]
    found = read_arms(classifier(tmp_path / "tkd", guesses, TRUE))
    page = Page(report(found, "tkd"))
    assert "no held-out rows" not in page.text
    said = words.helped(found, findings.headline_comparisons(found))
    assert "accuracy 90.0 % against 53.3 %, better by 36.7 points" in said[0]
    assert "the commonest label for every row" in said[0]
    assert words.headline(findings.headline_comparisons(found), found) == "Yes"
    assert page.tables["Each label, tkd"][1:] == [
        ["no", "14", "13", "0.923", "0.857", "0.889"], ["yes", "16", "17", "0.882", "0.938", "0.909"],
    ]  # fmt: skip
    assert ["the commonest label for every row", "–", "53.3"] in page.tables["Results"]
    assert "It is worst on rows labelled no (14 rows): accuracy 85.7 %." in page.text
    assert "label: no; predicted: yes" in " ".join(page.text.split())


def other_classifier(folder, score, rows):
    """As `classifier`, of rows (label, predicted, value of the score)."""
    made = [{"step": 28, "id": str(i), "input": "a " * (i + 1), "label": label, "predicted": guess, score: value}
            for i, (label, guess, value) in enumerate(rows)]  # fmt: skip
    lines(folder / "held_out.jsonl", made)
    mean = sum(row[score] for row in made) / len(made)
    lines(folder / "metrics.jsonl", [{"step": 28, f"eval_{score}": mean}])
    (folder / "run.json").write_text(json.dumps({"trainer": "TKDTrainer", "settings": {}}))
    (folder / "summary.json").write_text(json.dumps({"labels": ["no", "yes"]}))
    return read_arms(folder)


def test_rows_with_several_labels_are_seen(tmp_path):
    sets = [[0], [0, 1], [], [0, 1]] * 5
    guesses = [[0], [0, 1], [1], [1]] * 5
    rows = [(label, guess, float(label == guess)) for label, guess in zip(sets, guesses, strict=True)]
    found = other_classifier(tmp_path / "tkd", "subset_accuracy", rows)
    page = Page(report(found, "tkd"))
    comparison = findings.against_constant(found[0])
    assert comparison.means == (0.5, 0.5)  # [0, 1] for every row
    assert comparison.other == "the commonest set of labels for every row"
    assert page.tables["Each label, tkd"][1:] == [
        ["no", "15", "10", "1.000", "0.667", "0.800"], ["yes", "10", "15", "0.667", "1.000", "0.800"],
    ]  # fmt: skip
    text = " ".join(page.text.split())
    assert "label: no, yes; predicted: yes" in text
    assert "label: none of the labels; predicted: yes" in text
    assert "It is worst on rows labelled yes (10 rows)" in text


def test_rows_with_numbers_are_seen(tmp_path):
    numbers = [float(i % 5) for i in range(20)]
    rows = [(number, number + 0.5, 0.25) for number in numbers]
    found = other_classifier(tmp_path / "tkd", "mean_squared_error", rows)
    page = Page(report(found, "tkd"))
    comparison = findings.against_constant(found[0])
    assert comparison.means == (0.25, 2.0)  # the variance of 0 to 4
    assert (comparison.other, comparison.verdict) == ("the mean for every row", "better")
    assert not [name for name in page.tables if name.startswith("Each label")]
    assert "label: 3; predicted: 3.5" in " ".join(page.text.split())


def test_a_classifier_of_one_class_is_called_that(tmp_path, capsys):
    found = read_arms(classifier(tmp_path / "tkd", [1] * 30, TRUE))
    said = words.helped(found, findings.headline_comparisons(found))
    assert said[0].startswith("Warning: tkd predicts 'yes' for all 30 held-out rows")
    assert words.headline(findings.headline_comparisons(found), found) == "Within noise"
    classifier(tmp_path / "other", [1] * 30, TRUE)
    both = read_side_by_side([tmp_path / "tkd", tmp_path / "other"])
    assert comparison(both).count("tells no classes apart") == 2
    with pytest.raises(SystemExit):
        app(["compare", str(tmp_path / "tkd"), str(tmp_path / "other")])
    assert capsys.readouterr().out.count("tells no classes apart") == 2


def test_the_teachers_training_is_shown_and_is_no_reference(tmp_path):
    run = classifier(tmp_path / "tkd", [0] * 14 + [1] * 10 + [0] * 6, TRUE)
    classifier(run / "teacher", TRUE, TRUE)
    found = read_arms(run)
    assert [(arm.name, arm.is_teacher) for arm in found] == [("tkd", False), ("teacher", True)]
    assert findings.reference(found).name == "tkd"
    (effect,) = findings.against_first(found)
    assert (effect.one, effect.other, effect.verdict) == ("teacher", "tkd", "better")
    assert "Differences from tkd" in " ".join(Page(comparison(found)).text.split())
    # Named first, or in a folder of arms, it is none either.
    assert findings.reference(read_side_by_side([run / "teacher", run])).runs[0].folder == run
    assert len(read_side_by_side([run, run / "teacher"])) == 2
    alone = read_side_by_side([run / "teacher", classifier(tmp_path / "b" / "teacher", TRUE, TRUE)])
    assert findings.reference(alone) is alone[0]


@pytest.mark.parametrize("shift", [1.0, -1.0, 0.0])
def test_signs_fit_the_words(tmp_path, shift):
    found = [c for c in findings.headline_comparisons(read_arms(arms(tmp_path, shift=shift))) if c.score == "regret"]
    said = words.verdict(found[0])
    low, high = re.search(r"interval (\S+) to (\S+);", said).groups()
    if shift:
        size = float(re.search(r"(better|worse) by ([\d.]+) nats", said)[2])
        assert 0 < float(low) < size < float(high)
        assert "−" not in said.split(", ", 1)[1]
    else:
        assert "is within noise" in said
        assert (low, high) == ("+0.00", "+0.00")


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_the_better_side_of_a_forest_plot_is_the_right(tmp_path, shift):
    comparisons = findings.headline_comparisons(read_arms(arms(tmp_path, shift=shift)))
    charts = forests(comparisons, Sheet())
    assert [chart.title for chart in charts] == ["Effect on accuracy", "Effect on regret"]
    for chart, c in zip(charts, comparisons, strict=True):
        ((label, value, low, high),) = chart.rows
        assert label == "ppo against seqkd"
        assert low < value < high
        assert (value > 0) == (c.verdict == "better") == (shift > 0)
    assert abs(charts[1].rows[0][1]) == pytest.approx(abs(comparisons[1].difference.interval.value))
    few = findings.compare(*reversed(read_arms(few_rows(tmp_path / "few"))), "regret")
    assert forests([few], Sheet()) == []


def few_rows(folder):
    write_run(folder / "seqkd", "SupervisedTrainer", held_out(100, [1.0] * 4, [1.0] * 4))
    write_run(folder / "ppo", "PPOTrainer", held_out(100, [1.0] * 4, [2.0] * 4))
    return folder


def test_an_ordinary_warm_up_is_no_failure(tmp_path):
    rows = [*held_out(50, [0.0] * 30, [4.0] * 30), *held_out(100, [1.0] * 30, [2.0] * 30)]
    found = read_arms(write_run(tmp_path / "seqkd", "SupervisedTrainer", rows))
    assert words.headline(findings.headline_comparisons(found), found) == "Not compared: a warm-up"
    said = words.helped(found, [])
    assert "start that later runs are compared with" in said[0]
    assert "Not known" not in report(found, "x").split("At what cost?")[0]


def test_nothing_on_a_page_scrolls_by_itself(tmp_path):
    folder = arms(tmp_path, shift=1.0)
    for text in (report(read_arms(folder), "x"), comparison(read_side_by_side([folder]))):
        assert not re.search(r"overflow(-[xy])?: *(auto|scroll)|max-height: *\d", text.split("</style>")[0])
        cells = [given for tag, given in Page(text).elements if tag == "td" and given]
        assert all(given.get("data-label") for given in cells)
