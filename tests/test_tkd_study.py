"""The study of encoder students: its statistics, its grid, and the rows of its parts."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlkd.jobs.study import Done, write_record

pytest.importorskip("matplotlib")
STUDY = Path(__file__).resolve().parents[1] / "recipes" / "studies"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    yield importlib.import_module("tkd_presets")
    sys.path.pop(0)


@pytest.fixture(autouse=True)
def _no_files(study, monkeypatch):
    monkeypatch.setattr(study, "file_digests", lambda folder, names: dict.fromkeys(names, "digest"))


@pytest.fixture
def plan():
    plan = yaml.safe_load((STUDY / "tkd_presets.yaml").read_text())
    plan.pop("quick")
    return plan


def filled(study, plan, out, score):
    """The study with every result finished; a student's score is that of (task, init, preset, seed)."""
    grid = study.study(plan, "model", Path("data"), out)
    for cell in grid.cells.values():
        if cell.arm == "teacher":
            result = {"score": 0.9}
        elif cell.arm.endswith("learning-rate"):
            result = {"chosen": 5e-5}
        else:
            own = score(cell.task, cell.settings["init"], cell.settings["preset"], cell.seed)
            result = {"score": own, "cpu_seconds": 1.0}
        write_record(cell, grid.digests(cell), result)
    return grid


def test_a_pooled_difference_joins_tasks_and_seeds(study):
    tasks = {"one": {"a": {1: 2.0, 2: 3.0}, "b": {1: 1.0, 2: 1.0}}, "two": {"a": {1: 5.0}, "b": {1: 9.0, 2: 0.0}}}
    record = study.compare(tasks | {"three": {"a": {1: 1.0}}}, "a", "b")
    assert record["pooled"]["mean"] == pytest.approx((1 + 2 - 4) / 3, abs=1e-3)
    assert record["pooled"]["n"] == 3
    assert {task: one["mean"] for task, one in record["tasks"].items()} == {"one": 1.5, "two": -4.0}


def test_the_report_holds_every_finished_run(study, plan, tmp_path, monkeypatch):
    wobble = {preset: np.random.default_rng(i).normal(50, 1, 6) for i, preset in enumerate(plan["inits"]["mapped"])}
    monkeypatch.setattr(os, "fsync", lambda _: None)
    grid = filled(study, plan, tmp_path, lambda task, init, preset, seed: wobble[preset][seed] / 100)
    text = study.report(grid, plan)
    record = json.loads((tmp_path / "results.json").read_text())
    runs = sum(len(seeds) for tasks in record["scores"].values() for p in tasks.values() for seeds in p.values())
    assert runs == 3 * 5 * (11 + 5)
    assert record["cpu_seconds"]["first"]["trec"]["rand"] == dict.fromkeys("12345", 1.0)
    assert record["teachers"].keys() == plan["tasks"].keys()
    assert record["learning_rates"]["cola first"] == {"chosen": 5e-5}
    assert len(record["tests"]["mapped"]) == len(plan["compared"])
    for preset, values in wobble.items():
        assert f"| {preset} | {values[1:].mean():.2f} ± {values[1:].std(ddof=1):.2f} (5)" in text
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_a_report_needs_no_more_than_a_teacher(study, plan, tmp_path):
    grid = study.study(plan, "model", Path("data"), tmp_path)
    write_record(grid.cells["trec/teacher"], {}, {"score": 0.9})
    assert "| teacher |" in study.report(grid, plan)
    assert json.loads((tmp_path / "results.json").read_text())["teachers"] == {"trec": {"score": 0.9}}


class Stub:
    """Remembers what is asked of `Runs`; the larger learning rate scores higher."""

    asked: list

    def __init__(self, cell):
        self.data = type("Data", (), {"dev": "dev rows", "test": "test rows"})

    def student(self, init, preset, seed, learning_rate, held_out):
        self.asked.append((init, preset, seed, learning_rate, held_out))
        return {"score": learning_rate}


def test_a_student_is_of_its_cell_and_takes_the_learning_rate_found(study, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "Runs", Stub)
    monkeypatch.setattr(Stub, "asked", [], raising=False)
    grid = study.study(plan, "model", Path("data"), tmp_path)
    search, cell = grid.cells["trec/first-learning-rate"], grid.cells["trec/seed-3/first-rand"]
    found = grid.arms[search.arm].run(search)
    assert found == {"chosen": 1.5e-4, "dev_scores": {"5e-05": 5e-5, "0.00015": 1.5e-4}}
    assert Stub.asked == [("first", "kd", 1, rate, "dev rows") for rate in (5e-5, 1.5e-4)]
    assert search in grid.needed(cell).values()
    Stub.asked.clear()
    grid.arms[cell.arm].run(replace(cell, inputs={search.arm: Done(search.folder, found)}))
    assert Stub.asked == [("first", "rand", 3, 1.5e-4, "test rows")]


def test_rows_of_a_task_do_not_overlap(study, plan, tmp_path):
    for name, numbers in (("train", range(60)), ("validation_in", range(6)), ("validation_out", range(30, 34))):
        rows = [{"sentence": f"sentence {i}", "label": i % 2} for i in numbers]
        (tmp_path / "cola").mkdir(exist_ok=True)
        (tmp_path / "cola" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"dev_rows": 10, "teacher": {"rows": 30}, "train_rows": 8}
    grid = study.study(plan | sizes, "model", tmp_path, tmp_path / "out")
    data = importlib.import_module("tkd_presets_task").Data(grid.cells["cola/seed-1/mapped-kd"].settings)
    parts = [{row["text"] for row in rows} for rows in (data.test, data.dev, data.train)]
    assert [len(rows) for rows in (data.test, data.dev, data.train)] == [10, 10, 30]
    assert len(set.union(*parts)) == 50
    assert {row["text"] for row in data.subset(1)} < parts[2]
    assert data.subset(1) == data.subset(1) != data.subset(2)
