"""Evaluations of a run that is killed, resumed, repeated or that keeps its best checkpoint: as many as undisturbed."""

import json
import logging

import pytest
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from transformers import TrainerCallback

from rlkd.inspection.saved import from_run
from rlkd.runs.files import HELD_OUT, SAMPLES, TOKEN_REWARDS
from tiny_runs import assert_same, examples, logged, make, weights

SLOW = pytest.mark.slow
MOST = ["reinforce", pytest.param("ppo", marks=SLOW), pytest.param("supervised", marks=SLOW), "tkd"]
EVERY = {
    "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2,
    "logging_steps": 2, "max_steps": 8, "resume_from_checkpoint": "auto",
}  # fmt: skip
TIMES = {"time", "train_runtime", "train_cpu_seconds"}


class Kill(TrainerCallback):
    """The end of a process, at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def build(kind, folder, **options):
    settings = {**EVERY, **options}
    if kind == "tkd":
        return make_tkd(folder, preset="kd", dev=labelled_rows(7, seed=9), **settings)
    if kind == "ppo":
        settings["epochs_per_rollout"] = 1  # two updates on a rollout batch
    return make(kind, folder, eval_examples=examples(3), learning_rate=1e-3, **settings)


def start(kind, folder, kill=None, scores=None, **options):
    """Run the whole job, or until it is killed. scores: the metric `match` or `accuracy` of each evaluated step."""
    trainer = build(kind, folder, **options)
    if scores is not None and kind == "tkd":
        trainer.compute_metrics = lambda _: {"accuracy": scores[trainer.state.global_step]}
    elif scores is not None:
        summarise = trainer.evaluator.summarise
        trainer.evaluator.summarise = lambda rows: summarise(rows) | {"match": scores[trainer.state.global_step]}
    if kill is None:
        trainer.run()
    else:
        trainer.add_callback(Kill(kill))
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return trainer


def lines(folder, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in TIMES and "second" not in k and k != "eval_runtime"} for row in rows
    ]


def evaluated(folder):
    return [line["step"] for line in logged(folder) if any(name.startswith("eval_") for name in line)]


@pytest.mark.parametrize("patience", [pytest.param(None, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", MOST)
def test_a_run_killed_twice_has_the_evaluations_of_an_undisturbed_one(tmp_path, kind, patience):
    options = {}
    if patience:
        # Without an improvement after step 2 the run ends at step 6.
        metric = "accuracy" if kind == "tkd" else "match"
        options = {"load_best_model_at_end": True, "early_stopping_patience": 2, "metric_for_best_model": metric}
        options["scores"] = {0: 0.5, 2: 0.6, 4: 0.5, 6: 0.5, 8: 0.9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    straight = start(kind, whole, **options)
    start(kind, cut, kill=3, **options)
    start(kind, cut, kill=5, **options)
    resumed = start(kind, cut, **options)
    assert evaluated(whole) == ([0, 2, 4, 6] if patience else [0, 2, 4, 6, 8])
    names = ["metrics.jsonl", HELD_OUT] + ([] if kind == "tkd" else [SAMPLES, TOKEN_REWARDS])
    for name in names:
        one, other = lines(whole, name), lines(cut, name)
        if name == "metrics.jsonl":  # the mean loss since the start of the process
            one, other = ([line for line in side if "train_loss" not in line] for side in (one, other))
        assert one == other, name
    assert_same(weights(straight.trained), weights(resumed.trained))
    assert (whole / "README.md").read_text().split("## Use")[0] == (cut / "README.md").read_text().split("## Use")[0]

    # Repeating the command of a finished run changes nothing either.
    before = lines(cut, HELD_OUT), evaluated(cut)
    again = start(kind, cut, **options)
    assert (lines(cut, HELD_OUT), evaluated(cut)) == before
    assert again.state.global_step == straight.state.global_step
    assert_same(weights(straight.trained), weights(again.trained))


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
@pytest.mark.parametrize("kind", MOST)
def test_the_saved_student_is_evaluated_once(tmp_path, kind, strategy, monkeypatch):
    """Whenever evaluations were due, and before the trackers are closed."""
    steps = {"no": [6], "steps": [4, 6], "epoch": [3, 6] if kind == "tkd" else None}[strategy]
    options = {
        "eval_strategy": strategy,
        "eval_steps": 4,
        "eval_on_start": False,
        "max_steps": 6,
        "save_strategy": "no",
    }
    trainer = build(kind, tmp_path, **options)
    events = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            events.append("evaluation" if any(name.startswith("eval_") for name in logs) else "line")

        def on_train_end(self, *args, **kwargs):
            events.append("end")

    trainer.callback_handler.callbacks.insert(1, Tracker())
    trainer.run()
    found = evaluated(tmp_path)
    assert found[-1] == 6
    assert len(set(found)) == len(found)
    if steps:
        assert found == steps
    assert events[-1] == "end"
    assert events.count("evaluation") == len(found)
    assert trainer.last.metrics["step"] == 6


@pytest.mark.parametrize("kind", ["reinforce", "tkd"])
def test_the_best_student_is_described_by_its_own_evaluation(tmp_path, kind):
    metric = "accuracy" if kind == "tkd" else "match"
    scores = {0: 0.1, 2: 0.2, 4: 0.9, 6: 0.3, 8: 0.4}
    options = {"load_best_model_at_end": True, "metric_for_best_model": metric, "scores": scores}
    trainer = start(kind, tmp_path, **options)
    assert evaluated(tmp_path) == [0, 2, 4, 6, 8]
    assert trainer.last.metrics["step"] == 4
    assert f"| {metric} | share" in (tmp_path / "README.md").read_text()
    assert "| 0.9 |" in (tmp_path / "README.md").read_text()
    # held_out.jsonl has the rows of the student that was saved.
    rows = lines(tmp_path, HELD_OUT)
    assert {row["step"] for row in rows} == {0, 4}
    again = build(kind, tmp_path / "again", max_steps=1, eval_strategy="no", eval_on_start=False, save_strategy="no")
    again.trained.load(tmp_path / "checkpoint-4")
    again.last.best_step = 4
    again.refresh_held_out()
    assert lines(tmp_path / "again", HELD_OUT) == [row for row in rows if row["step"] == 4]


def test_each_card_is_shown_once(tmp_path):
    start("reinforce", tmp_path, sample_table_rows=2)
    keys = [(sample.id, sample.source, sample.text) for sample in from_run(tmp_path).samples]
    assert len(keys) == len(set(keys))
    assert [line["step"] for line in lines(tmp_path, SAMPLES)] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]


def test_evaluations_of_other_data_are_not_reused(tmp_path, caplog):
    start("reinforce", tmp_path)
    options = {**EVERY, "allow_config_change": True, "eval_examples": examples(2), "learning_rate": 1e-3}
    with caplog.at_level(logging.WARNING):
        trainer = make("reinforce", tmp_path, **options)
        trainer.run()
    assert evaluated(tmp_path)[-2:] == [8, 8]
    assert trainer.last.metrics == trainer.last.metrics | {"eval_match": trainer.last.metrics["eval_match"]}
    assert {row["index"] for row in lines(tmp_path, HELD_OUT) if row["step"] == 8} == {0, 1}
