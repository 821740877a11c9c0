"""Run folders as they are found: several arms, files missing, cut off or not what they should be."""

import json

import pytest

from rlkd.errors import DataError
from rlkd.report.reading import FILES, read_arms, read_run, read_side_by_side
from runs import arms, held_out, write_run


def test_arms_and_seeds_are_found(tmp_path):
    arms(tmp_path, shift=1.0)
    (tmp_path / "seed-1" / "ppo" / "checkpoint-5").mkdir()
    write_run(tmp_path / "teacher", "SupervisedTrainer", held_out(10, [1.0] * 12, [0.0] * 12))
    found = read_arms(tmp_path)
    assert [(arm.name, arm.kind, [run.seed for run in arm.runs]) for arm in found] == [
        ("seqkd", "supervised", [1, 2]),
        ("ppo", "rl", [1, 2]),
        ("teacher", "supervised", [None]),
    ]
    assert [arm.is_teacher for arm in found] == [False, False, True]


def test_one_run(tmp_path):
    rows = [*held_out(0, [0.0] * 12, [4.0] * 12), *held_out(100, [1.0] * 12, [2.0] * 12)]
    (arm,) = read_arms(write_run(tmp_path / "mine", "PPOTrainer", rows))
    (run,) = arm.runs
    assert (arm.name, run.steps, run.tokens, run.task_names) == ("mine", 100, 405, ["accuracy"])
    assert sorted(run.held_out) == [0, 100]
    assert [row["regret"] for row in run.newest] == [2.0] * 12
    assert run.end["train_cpu_seconds"] == 50.0


@pytest.mark.parametrize("missing", FILES)
def test_any_file_may_be_missing(tmp_path, missing):
    write_run(tmp_path, "PPOTrainer", held_out(100, [1.0] * 12, [2.0] * 12))
    (tmp_path / missing).unlink(missing_ok=True)
    run = read_run(tmp_path, "x")
    assert run.kind == "rl" or missing in ("metrics.jsonl", "run.json")
    assert any(missing in note for note in run.notes) == (missing != "alarms.jsonl")


def test_lines_that_are_not_records_are_skipped_and_noted(tmp_path):
    write_run(tmp_path, "PPOTrainer", held_out(100, [1.0] * 12, [2.0] * 12))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'[1]\n{"loss": 3}\n\xff\xfe\n{"step": 100, "loss"')
    (tmp_path / "run.json").write_text("{")
    run = read_run(tmp_path, "x")
    assert len(run.train) == 10
    assert any("3 lines are not JSON objects" in note and "line 13" in note for note in run.notes)
    assert any("1 lines without a step" in note for note in run.notes)
    assert any("run.json is not JSON" in note for note in run.notes)


def test_what_a_resumed_run_did_again_counts_once(tmp_path):
    write_run(tmp_path, "PPOTrainer", held_out(100, [1.0] * 12, [2.0] * 12))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, "loss": 9.0, "tokens": 40.0}) + "\n")
    run = read_run(tmp_path, "x")
    assert run.tokens == 405
    assert run.train[-1]["loss"] == 9.0


def test_numbers_that_are_not_finite_or_of_another_type_do_not_break_it(tmp_path):
    write_run(tmp_path, "PPOTrainer", held_out(100, [float("nan")] * 12, [2.0] * 12))
    from rlkd.report.findings import interval

    (arm,) = read_arms(tmp_path)
    assert interval(arm, "regret").value == 2.0
    found = interval(arm, "accuracy")
    assert found is None


def test_no_run_is_an_error_that_says_what_is_wanted(tmp_path):
    with pytest.raises(DataError, match=r"no run in it or up to .*metrics\.jsonl"):
        read_arms(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_arms(tmp_path / "nowhere")


def test_runs_side_by_side_have_names_that_differ(tmp_path):
    arms(tmp_path / "a", shift=0.5)
    arms(tmp_path / "b", shift=0.5)
    rows = held_out(100, [1.0] * 12, [2.0] * 12)
    one, two = (write_run(tmp_path / name / "same", "PPOTrainer", rows) for name in ("c", "d"))
    assert [arm.name for arm in read_side_by_side([tmp_path / "a"])] == ["seqkd", "ppo"]
    named = [arm.name for arm in read_side_by_side([tmp_path / "a", tmp_path / "b"])]
    assert named == ["a/seqkd", "a/ppo", "b/seqkd", "b/ppo"]
    assert len({arm.name for arm in read_side_by_side([one, two])}) == 2
    with pytest.raises(DataError, match="give two runs"):
        read_side_by_side([one])
    with pytest.raises(DataError, match="given twice"):
        read_side_by_side([one, one])
