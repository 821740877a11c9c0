"""Evaluation inside a run, what is written, and that every written name is explained."""

import json
import re
from pathlib import Path

import pytest
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows

from rlkd.evaluation.evaluator import Evaluator
from rlkd.evaluation.task_metrics import TASK_METRICS
from rlkd.models.architectures import language_model
from rlkd.models.policy import Policy
from tiny import tiny_tokenizer
from tiny_runs import WORDS, assert_same, examples, logged, make, student, teacher, weights

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    """Names between backticks in the first column of the table, as patterns."""
    names = set()
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return names


def is_documented(name, names):
    tasks = {"rouge1", "rouge2", "rougeL", "bleu", "exact_match"}
    if name in names or name in {"step", "time"}:
        return True
    if name.startswith("eval_sample_"):
        rest = name.removeprefix("eval_sample_")
        return rest in tasks or f"eval_{rest}" in names
    return name.removeprefix("eval_") in tasks and "eval_<task metric>" in names


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
def test_every_logged_name_is_explained(tmp_path, kind):
    def every_metric(predictions, rows):
        return {k: v for metric in TASK_METRICS.values() for k, v in metric(predictions, rows).items()}

    options = {} if kind == "supervised" else {"weak_start": "warn"}
    make(
        kind, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=4, eval_examples=examples(4),
        task_metric=every_metric, **options,
    ).train()  # fmt: skip
    names, seen = documented(), {name for line in logged(tmp_path) for name in line}
    assert {name for name in seen if not is_documented(name, names)} == set()
    assert {"loss", "entropy", "grad_norm", "eval_regret", "eval_sample_bleu", "eval_seconds"} <= seen


def tkd_names(folder):
    """Every name that runs with all terms between them write."""
    for preset in ("all-t-s-tkd", "rand"):
        make_tkd(folder / preset, preset=preset, dev=labelled_rows(4), eval_strategy="steps", eval_steps=2).train()
    return {name for preset in ("all-t-s-tkd", "rand") for line in logged(folder / preset) for name in line}


def test_every_name_of_tkd_is_explained(tmp_path):
    names = documented()
    assert {name for name in tkd_names(tmp_path) if not is_documented(name, names)} == set()


def test_every_explained_name_is_logged(tmp_path):
    seen = tkd_names(tmp_path)
    for kind, options in (("ppo", {"weak_start": "warn"}), ("reinforce", {})):
        make(
            kind,
            tmp_path / kind,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=4,
            eval_examples=examples(4),
            **options,
        ).train()
        seen |= {name for line in logged(tmp_path / kind) for name in line}
    assert {name for name in documented() if "<" not in name and "*" not in name} <= seen


def test_evaluate_is_the_evaluator_on_the_first_rows(tmp_path):
    trainer = make("reinforce", tmp_path, eval_examples=examples(6), eval_limit=4, per_device_eval_batch_size=3, seed=3)
    metrics = trainer.evaluate()
    judge = Evaluator(teacher(), tiny_tokenizer(WORDS), examples(6), 512, 5, seed=3)
    policy = Policy(language_model(student(), tiny_tokenizer(WORDS)))
    expected = judge.summarise(judge.rows(policy, policy, range(4)))
    assert metrics.pop("eval_seconds") > 0
    metrics.pop("epoch", None)
    assert metrics == pytest.approx({f"eval_{k}": v for k, v in expected.items()}, rel=1e-4, abs=1e-5)


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
