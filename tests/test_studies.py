"""The study on real text: its splits share nothing, its metrics are of the right task, and its grid."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd import Example, read_plan
from rlkd.jobs.study import Done, write_record

STUDIES = Path(__file__).resolve().parents[1] / "recipes" / "studies"
SIZES = {
    "question_words": 4,
    "news_words": 3,
    "unlabeled": {"quora": 3, "agnews": 2},
    "validation": 2,
    "test": 10,
}


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(STUDIES))
    yield
    sys.path.pop(0)


@pytest.fixture(scope="module")
def task(recipes):
    return importlib.import_module("quora_agnews_task")


@pytest.fixture(scope="module")
def study(recipes):
    return importlib.import_module("quora_agnews")


@pytest.fixture
def plan(study, monkeypatch):
    monkeypatch.setattr(study, "file_digests", lambda folder, names: dict.fromkeys(names, "digest"))
    return read_plan(STUDIES / "quora_agnews.yaml", quick=False)


@pytest.fixture
def data(tmp_path):
    """Ten questions with two paraphrases each, one long; test holds a known, a long-known and a new question."""
    pairs = [{"source": f"question {i} ?", "target": f"asked {i} {j}"} for i in range(10) for j in range(2)]
    pairs.append({"source": "short ?", "target": "a target that is too long"})
    known = [pairs[0], {"source": "short ?", "target": "brief"}, {"source": "new ?", "target": "really new ?"}]
    news = [{"text": f"story {i} goes on and on", "label": "World"} for i in range(8)]
    for name, part, rows in (
        ("quora_para", "train", pairs),
        ("quora_para", "test", known),
        ("agnews", "train", news),
        ("agnews", "test", [{"text": "fresh story", "label": "Sports"}]),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_splits_share_no_input(task, data):
    splits = task.load_splits(data, SIZES)
    for name, parts in splits.items():
        texts = {part: [row[task.INPUT[name]] for row in rows] for part, rows in parts.items()}
        for part, other in (("teacher", "unlabeled"), ("teacher", "validation"), ("unlabeled", "validation")):
            assert not set(texts[part]) & set(texts[other])
        assert not set(texts["test"]) & {text for part in ("teacher", "unlabeled") for text in texts[part]}
        assert len(texts["unlabeled"]) == len(set(texts["unlabeled"])) == SIZES["unlabeled"][name]
    # A question stays with the teacher under all its paraphrases.
    assert len(splits["quora"]["teacher"]) == 2 * (10 - 3 - 2)


def test_known_and_long_questions_leave_the_test_rows(task, data):
    splits = task.load_splits(data, SIZES)
    assert [row["source"] for row in splits["quora"]["test"]] == ["new ?"]
    assert splits["agnews"]["teacher"][0]["text"].split()[2:] == ["goes"]


def test_metrics_read_the_rows_of_their_task(task):
    held_out = [
        Example("quora-1", "how do i learn to cook ?", ("",), ("what is a way to learn to cook ?",)),
        Example("agnews-1", "a match was won", ("",), ("Sports",)),
    ]
    copied = task.task_metric(["how do i learn to cook ?", "sports"], held_out)
    assert copied["copies"] == copied["accuracy"] == 1
    assert {type(value) for value in copied.values()} == {float}  # scores of some rows are not scores of each row
    assert copied["self_bleu"] == pytest.approx(100)
    assert 0 < copied["bleu"] < copied["self_bleu"]
    assert task.task_metric(["", "World"], held_out)["accuracy"] == 0


def test_candidates_are_tried_on_validation_rows_of_the_first_seed(study, plan, tmp_path):
    grid = study.study(plan, tmp_path, tmp_path / "out")
    trials = [cell for cell in grid.cells.values() if "-trial-" in cell.arm]
    assert len(trials) == len(plan["arms"]["seqkd"]) + len(plan["arms"]["rl"])
    assert {(cell.seed, cell.settings["split"], cell.settings["seconds"]) for cell in trials} == {(1, "validation", 50)}
    needed = grid.needed(grid.cells["seed-3/ppo"])
    assert [name for name in needed if "trial" in name] == [f"reinforce-trial-{i}" for i in range(4)]
    assert needed["warm-up"].seed == 3
    assert (grid.cells["seed-3/ppo"].settings["split"], grid.cells["seed-3/ppo"].settings["seconds"]) == ("test", 100)


def test_the_best_candidate_has_answers_of_the_teachers_length(study, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "warm_student", lambda cell: "warm student")
    monkeypatch.setattr(study, "train_student", lambda cell, method, model, training: (method, model, training))
    cell = study.study(plan, tmp_path, tmp_path / "out").cells["seed-2/ppo"]
    scores = {0: (9.0, 4.0, 4.0), 1: (12.0, 5.0, 6.0), 2: (10.0, 9.0, 1.0), 3: (7.0, 0.1, 0.1)}  # 3 is too short
    inputs = {
        f"reinforce-trial-{i}": {"quora_length": length, "regret": a, "sample_regret": b, "training": {"lam": i}}
        for i, (length, a, b) in scores.items()
    } | {"teacher-validation": {"quora_length": 10.0}, "warm-up": {"regret": 0.0, "training": {}}}
    cell = replace(cell, inputs={arm: Done(tmp_path, result) for arm, result in inputs.items()})
    assert study.main_arm(cell) == ("ppo", "warm student", {"lam": 0})


def test_the_table_is_of_what_is_finished(study, plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    grid = study.study(plan, tmp_path, tmp_path / "out")
    for cell in grid.cells.values():
        if cell.arm == "ppo" or cell.seed == 3:
            continue
        result = dict.fromkeys(study.COLUMNS, 0.5) | {"bleu": 10.0 + (cell.seed or 0)}
        write_record(cell, grid.digests(cell), result)
    study.report(grid, plan)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| SeqKD, as long | 11.5 [11.0, 12.0] | 0.5 [0.5, 0.5] |" in table
    assert "PPO" not in table
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["bleu"] for run in record["results"]["REINFORCE"]] == [11.0, 12.0]
    assert len(record["validation"]["reinforce-trial-3"]) == 1
