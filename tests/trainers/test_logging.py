"""Evaluation inside a run, what is written, and that the table of metrics has every logged name."""

import json
import re
from functools import partial

import pytest
from test_problem_types import rows as rows_of
from test_problem_types import trainer as trainer_of
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from test_token_classification import trainer as trainer_of_words

from rlkd import metrics
from rlkd.evaluation.evaluator import Evaluator
from rlkd.evaluation.problems import PROBLEMS
from rlkd.evaluation.task_metrics import TASK_METRICS
from rlkd.jobs.encoder_data import LabelledData
from rlkd.models.architectures import language_model
from rlkd.models.policy import Policy
from rlkd.trainers.encoders.terms import PRESETS, TERMS
from tiny import tagged_rows, tiny_tokenizer
from tiny_runs import WORDS, assert_same, examples, labels, logged, make, student, tiny_teacher, weights

# The trainers of the table's labels, as this file runs them: PPO with its critic, REINFORCE without one.
REINFORCE, PPO = {"reinforce", "reinforce drop"}, {"ppo", "ppo dual_clip end_price"}
KINDS = {
    metrics.ALL: {"supervised", *REINFORCE, *PPO, "gkd", "tkd"},
    metrics.GENERATING: {"supervised", *REINFORCE, *PPO, "gkd"},
    metrics.ON_POLICY: {*REINFORCE, *PPO, "gkd"},
    metrics.GKD: {"gkd"},
    metrics.RL: {*REINFORCE, *PPO},
    metrics.START_CHECKED: {"supervised", *REINFORCE, *PPO},
    metrics.TASKED: {*REINFORCE, *PPO},
    metrics.CRITIC: PPO,
    metrics.PPO: PPO,
    metrics.DROP: {"reinforce drop"},
    metrics.END_PRICE: {"ppo dual_clip end_price"},
    metrics.DUAL_CLIP: {"ppo dual_clip end_price"},
    metrics.IMITATING: {"reinforce drop"},
    metrics.TRUNCATED: {"reinforce drop"},
    metrics.LAYERS: {"supervised"},
    metrics.TKD: {"tkd"},
}
SETTINGS = {
    "supervised": {"hidden_coef": 1.0, "attention_coef": 1.0},
    "gkd": {"on_policy_fraction": 0.5, "labels": labels()},
    "reinforce drop": {"cut_answers": "drop", "imitation_coef": 0.1, "labels": labels(), "rollout_top_p": 0.9},
    "ppo dual_clip end_price": {"cut_answers": "end_price", "dual_clip": 3.0},
}


def every_metric(predictions, rows):
    return {k: v for metric in TASK_METRICS.values() for k, v in metric(predictions, rows).items()}


def run(kind, folder):
    """The lines of runs that log all that a trainer can log."""
    if kind != "tkd":
        warm_up = {"until_ready": True, "lr_scheduler_type": "linear", "save_strategy": "best"}
        task = {"weak_start": "warn", "task_reward": "rouge1"}
        options = {"supervised": warm_up, "gkd": {}}.get(kind, task) | SETTINGS.get(kind, {})
        make(
            kind.split()[0], folder, max_steps=4, eval_strategy="steps", eval_steps=4, eval_examples=examples(4),
            task_metric=every_metric, **options,
        ).train()  # fmt: skip
        return logged(folder)
    data = LabelledData(
        name="x", train=[], dev={}, labels=("0", "1"), note="",
        metrics=tuple(PROBLEMS["single_label_classification"].scores),
    )  # fmt: skip
    others = {name: 1.0 for name in TERMS if name not in PRESETS["all-t-s-tkd"] + PRESETS["rand"]}
    presets: dict[str, dict] = {"all-t-s-tkd": {}, "rand": {}, "custom": {"terms": others}}
    for preset, options in presets.items():
        dev = {"dev": labelled_rows(4), "eval_strategy": "steps", "eval_steps": 2}
        trainer = make_tkd(folder / preset, preset=preset, **dev, **options)
        trainer.compute_metrics = data.compute_metrics()
        trainer.train()
    for problem in set(PROBLEMS) - {"single_label_classification"}:
        made, held_out = partial(trainer_of, problem), rows_of
        if PROBLEMS[problem].of_words:
            made, held_out = trainer_of_words, lambda _, n: tagged_rows(n)
        made(folder / problem, preset="kd", dev=held_out(problem, 4), eval_strategy="steps", eval_steps=2).train()
    return [line for path in sorted(folder.iterdir()) for line in logged(path)]


def when(line):
    """The occasion of a line, from the name that each kind of line has."""
    if "loss" in line:
        return "log"
    return "end" if "train_runtime" in line else "once" if "start_regret" in line else "evaluation"


@pytest.mark.parametrize("kind", sorted(KINDS[metrics.ALL]))
def test_a_trainer_logs_the_names_of_its_rows_and_no_others(tmp_path, kind):
    seen = {(when(line), name) for line in run(kind, tmp_path) for name in line}
    listed = {
        (occasion.when, occasion.prefix + row.name)
        for row in metrics.METRICS
        for occasion, trainers in row.logged.items()
        if kind in KINDS[trainers]
    }
    of_the_line = {"step", "time", "epoch"}
    assert {pair for pair in seen if pair[1] not in of_the_line} == {p for p in listed if p[1] not in of_the_line}
    assert of_the_line <= {name for _, name in seen}


def test_evaluate_is_the_evaluator_on_the_first_rows(tmp_path):
    trainer = make("reinforce", tmp_path, eval_examples=examples(6), eval_limit=4, per_device_eval_batch_size=3, seed=3)
    found = trainer.evaluate()
    evaluator = Evaluator(tiny_teacher(), tiny_tokenizer(WORDS), examples(6), 512, 5, seed=3)
    policy = Policy(language_model(student(), tiny_tokenizer(WORDS)))
    expected = evaluator.summarise(evaluator.rows(policy, policy, range(4)))
    assert found.pop("eval_seconds") > 0
    found.pop("epoch", None)
    assert found == pytest.approx({f"eval_{k}": v for k, v in expected.items()}, rel=1e-4, abs=1e-5)


def test_samples_are_kept_at_each_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "sample_table_rows": 3}
    make("reinforce", tmp_path, max_steps=4, eval_examples=examples(5), **options).train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 3 + [4] * 3
    for row in rows:
        assert {"id", "input", "teacher", "student", "sample_student", "rewards", "sample_rewards"} <= set(row)
        assert sum(row["rewards"]) == pytest.approx(-row["regret"], abs=1e-4)


def test_held_out_rows_of_the_first_and_the_newest_evaluation_are_kept(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    make(
        "ppo", tmp_path, max_steps=3, eval_examples=examples(5), task_metric=TASK_METRICS["exact_match"], **options
    ).train()
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0] * 5 + [3] * 5
    evaluated = {line["step"]: line for line in logged(tmp_path) if "eval_regret" in line}
    for step in (0, 3):
        mine = [row for row in rows if row["step"] == step]
        assert [row["id"] for row in mine] == [e.id for e in examples(5)]
        for name in ("regret", "sample_regret", "exact_match", "sample_exact_match", "match"):
            assert sum(row[name] for row in mine) / 5 == pytest.approx(evaluated[step][f"eval_{name}"])
        assert all(len(row["tokens"]) == len(row["rewards"]) == row["length"] for row in mine)


def test_tokens_add_up_to_what_was_sampled(tmp_path):
    make("reinforce", tmp_path, max_steps=5, logging_steps=2).train()
    lines = logged(tmp_path)
    each = make("reinforce", tmp_path / "each", max_steps=5, logging_steps=1)
    each.train()
    by_step = [line for line in logged(tmp_path / "each") if "length" in line]
    sampled = sum(line["length"] * 8 for line in by_step)
    assert sum(line.get("tokens", 0) for line in lines) == pytest.approx(sampled)
    assert lines[-1]["train_cpu_seconds"] > 0


def test_the_table_of_samples_is_shown_beside_a_progress_bar(tmp_path, capsys):
    trainer = make("reinforce", tmp_path, eval_examples=examples(5))
    trainer.args.disable_tqdm = False
    trainer.evaluate()
    shown = capsys.readouterr().err
    assert "samples at step 0" in shown
    assert all(f"row {i}" in shown for i in range(4))


@pytest.mark.parametrize("kind", ["ppo", "supervised"])
def test_progress_where_there_is_no_terminal_is_lines(tmp_path, caplog, capfd, monkeypatch, kind):
    """With the pace of lines set to 0 s: one line per step and one per evaluation, and no carriage return."""
    monkeypatch.setattr("rlkd.io.progress.LOG_SECONDS", 0.0)
    trainer = make(kind, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, eval_examples=examples(4))
    trainer.args.disable_tqdm = False
    with caplog.at_level("INFO", logger="rlkd"):
        trainer.train()
    lines = [r.message.split("  ") for r in caplog.records if r.message.startswith(("training", "evaluation"))]
    assert [line[0] for line in lines] == ["training 1/3", "training 2/3", "training 3/3", "evaluation 4/4"]
    assert re.fullmatch(r"[\d.]+ steps/s", lines[0][1])
    assert re.fullmatch(r"\d+ s left", lines[0][2])
    assert any(part.startswith("tokens_per_second ") for part in lines[2])
    assert "tokens/s" in lines[3][2]
    assert "\r" not in "".join(capfd.readouterr())


def test_disable_tqdm_is_silence(tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.setattr("rlkd.io.progress.LOG_SECONDS", 0.0)
    with caplog.at_level("INFO", logger="rlkd"):
        make("reinforce", tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_examples=examples(4)).train()
    assert not [r for r in caplog.records if "steps/s" in r.message or "rows/s" in r.message]
    assert capfd.readouterr().out == ""


def test_evaluating_changes_no_training(tmp_path):
    results = []
    for name, options in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        trainer = make("ppo", tmp_path / name, max_steps=4, eval_examples=examples(4), **options)
        trainer.train()
        results.append(weights(trainer.policy))
    assert_same(*results)


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    make(
        "reinforce", tmp_path / "run", max_steps=2, report_to="wandb", run_name="tiny", eval_strategy="steps",
        eval_steps=1, eval_examples=examples(4),
    ).train()  # fmt: skip
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert "regret" in logged(tmp_path / "run")[0]


def test_held_out_rows_of_a_classifier_average_to_its_accuracy(tmp_path):
    make_tkd(
        tmp_path, preset="kd", dev=labelled_rows(7), eval_strategy="steps", eval_steps=1, eval_on_start=True
    ).train()
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_accuracy"] for line in logged(tmp_path) if "eval_accuracy" in line}
    steps = sorted({row["step"] for row in rows})
    assert steps == [0, max(evaluated)]
    for step in steps:
        mine = [row for row in rows if row["step"] == step]
        assert [row["label"] for row in mine] == [row["label"] for row in labelled_rows(7)]
        assert sum(row["accuracy"] for row in mine) / 7 == pytest.approx(evaluated[step])
