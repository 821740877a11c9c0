"""The study of encoder students: its statistics, and that it goes on where it was killed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from rlkd.objectives.encoder import PRESETS

pytest.importorskip("matplotlib")
STUDY = Path(__file__).resolve().parents[1] / "recipes" / "studies"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("tkd_presets", STUDY / "tkd_presets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan():
    plan = yaml.safe_load((STUDY / "tkd_presets.yaml").read_text())
    plan.pop("quick")
    return plan


def fill(out, plan, score):
    for init, presets in plan["inits"].items():
        for task in plan["tasks"]:
            for preset in presets:
                for seed in plan["seeds"]:
                    path = out / task / init / f"{preset}-{seed}.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps({"score": score(task, init, preset, seed), "cpu_seconds": 1.0}))


def test_differences_are_paired_by_seed(study):
    rng = np.random.default_rng(0)
    first, second = rng.normal(80, 1, 5), rng.normal(79, 1, 5)
    tasks = {"one": {"a": dict(enumerate(first)), "b": dict(enumerate(second)) | {9: 0.0}}}
    test = study.compare(tasks, "a", "b")["pooled"]
    oracle = stats.ttest_rel(first, second)
    assert test["n"] == 5
    assert test["p"] == pytest.approx(oracle.pvalue, abs=1e-5)
    assert test["mean"] == pytest.approx((first - second).mean(), abs=1e-3)
    assert (test["low"], test["high"]) == pytest.approx(oracle.confidence_interval(0.95), abs=1e-3)
    assert test["above_0"] == (first > second).sum()


def test_a_pooled_difference_joins_tasks_and_seeds(study):
    tasks = {"one": {"a": {1: 2.0, 2: 3.0}, "b": {1: 1.0, 2: 1.0}}, "two": {"a": {1: 5.0}, "b": {1: 9.0}}}
    record = study.compare(tasks, "a", "b")
    assert record["pooled"]["mean"] == pytest.approx((1 + 2 - 4) / 3, abs=1e-3)
    assert {task: one["mean"] for task, one in record["tasks"].items()} == {"one": 1.5, "two": -4.0}


def test_equal_scores_have_no_p(study):
    assert study.summary([0.0, 0.0]) == {"n": 2, "above_0": 0, "mean": 0.0}
    assert study.summary([]) == {"n": 0, "above_0": 0}


def test_the_report_holds_every_finished_run(study, plan, tmp_path):
    wobble = {preset: np.random.default_rng(i).normal(50, 1, 6) for i, preset in enumerate(PRESETS)}
    fill(tmp_path, plan, lambda task, init, preset, seed: wobble[preset][seed] / 100)
    text = study.report(plan, tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    runs = sum(len(seeds) for tasks in record["scores"].values() for p in tasks.values() for seeds in p.values())
    assert runs == 3 * 5 * (11 + 5) == len(record["cpu_seconds"])
    for preset, values in wobble.items():
        assert f"| {preset} | {values[1:].mean():.2f} ± {values[1:].std(ddof=1):.2f} (5)" in text
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_a_finished_run_is_not_repeated(study, plan, tmp_path, monkeypatch):
    """Runs in the folder are skipped; the one that is missing is made, with the settings of its seed and preset."""
    fill(tmp_path, plan, lambda *_: 0.5)
    (tmp_path / "trec" / "first" / "rand-3.json").unlink()
    made = []

    class Stub:
        def __init__(self, name, plan, model, data, out):
            self.name, self.plan, self.out, self.metric = name, plan, out / name, "accuracy"

        def run(self, init, preset, seed, learning_rate, on_dev=False):
            if on_dev:
                return {"score": learning_rate}  # the larger one is chosen
            made.append((self.name, init, preset, seed, learning_rate))
            return {"score": 0.7, "cpu_seconds": 2.0}

    monkeypatch.setattr(study, "Task", Stub)
    monkeypatch.setattr(study, "plot", lambda *_: None)
    study.study(plan, "model", Path("data"), tmp_path)
    assert made == [("trec", "first", "rand", 3, 1.5e-4)]
    assert json.loads((tmp_path / "results.json").read_text())["scores"]["first"]["trec"]["rand"]["3"] == 70.0
    study.study(plan, "model", Path("data"), tmp_path)
    assert len(made) == 1


def test_rows_of_a_task_do_not_overlap(study, plan, tmp_path, monkeypatch):
    for name, numbers in (("train", range(60)), ("validation_in", range(6)), ("validation_out", range(30, 34))):
        rows = [{"sentence": f"sentence {i}", "label": i % 2} for i in numbers]
        (tmp_path / "cola").mkdir(exist_ok=True)
        (tmp_path / "cola" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(study.AutoTokenizer, "from_pretrained", lambda name: None)
    task = study.Task(
        "cola", plan | {"dev_rows": 10, "teacher": {"rows": 30}, "train_rows": 8}, "m", tmp_path, tmp_path
    )
    parts = [{row["text"] for row in rows} for rows in (task.test, task.dev, task.train)]
    assert [len(rows) for rows in (task.test, task.dev, task.train)] == [10, 10, 30]
    assert len(set.union(*parts)) == 50
    assert {row["text"] for row in task.subset(1)} < parts[2]
    assert task.subset(1) == task.subset(1) != task.subset(2)
