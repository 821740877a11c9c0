"""The quickstart: a checker that accepts every right answer and no other, held-out notes, and the grid of its arms."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd.jobs.study import Done, write_record


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    yield
    sys.path.pop(0)


@pytest.fixture(scope="module")
def task(recipes):
    return importlib.import_module("quickstart_task")


@pytest.fixture(scope="module")
def quickstart(recipes):
    return importlib.import_module("quickstart")


def packed_by_reading(task, note: str) -> set[str]:
    """First names of the things a note packs, read word by word."""
    clauses = [clause.split() for clause in note.split(" ; ")]
    return {words[-1] for words in clauses if words[0] in ("take", "pack", "bring")}


def test_notes_say_what_the_checker_expects(task):
    rng = random.Random(0)
    for _ in range(300):
        note, packed = task.make_note(rng)
        assert {task.THINGS[i][0] for i in packed} == packed_by_reading(task, note)


def test_checker_accepts_every_order_and_wording_and_nothing_else(task):
    packed = frozenset({0, 3, 5})
    right = {
        " and ".join(words)
        for order in itertools.permutations(packed)
        for words in itertools.product(*(task.THINGS[i] for i in order))
    }
    assert len(right) == 6 * 8
    assert all(task.is_right(answer, packed) for answer in right)
    names = [task.THINGS[i][0] for i in sorted(packed)]
    wrong = ["", "nothing", names[0], " ".join(names), " and ".join([*names, names[0]])]
    wrong += [" and ".join([*names, task.THINGS[0][1]]), " and ".join([*names, task.THINGS[7][0]]), "and ".join(names)]
    wrong += [" and ".join(names) + " and", " and ".join([*names[:-1], "unicorn"])]
    assert not [answer for answer in wrong if task.is_right(answer, packed)]
    assert task.is_right("nothing", frozenset())
    assert not task.is_right("cup", frozenset())


def test_gold_answers_are_right_and_vary(task):
    rng = random.Random(0)
    packed = frozenset(range(5))
    answers = {task.write_answer(packed, rng) for _ in range(50)}
    assert len(answers) > 40
    assert all(task.is_right(answer, packed) for answer in answers)


def test_training_never_sees_held_out_notes(task):
    held_out = frozenset(example.student_input for example in task.make_examples(500, seed=3))
    assert len(held_out) == 500
    train = {example.student_input for example in task.make_examples(3000, seed=1001, exclude=held_out)}
    assert len(train) == 3000
    assert not train & held_out
    assert not [row for row in task.teacher_rows(500, 3, held_out) if any(n in row["student_input"] for n in held_out)]


def test_every_word_of_the_task_has_its_own_id(task):
    tokenizer = task.make_tokenizer()
    texts = [row[key] for row in task.teacher_rows(500, seed=1) for key in ("student_input", "label")]
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    assert tokenizer(["cup and mug"])["input_ids"][0][-1] == tokenizer.eos_token_id


def test_students_of_a_seed_start_from_its_warm_up(quickstart, tmp_path):
    grid = quickstart.study(tmp_path, quickstart.QUICK, "test", [1, 2])
    for arm in ("reinforce", "ppo", "seqkd-as-long"):
        needed = grid.needed(grid.cells[f"seed-2/{arm}"])
        assert [needed[name].name for name in ("teacher", "labels", "seqkd-warm-up")] == [
            "teacher",
            "seed-2/labels",
            "seed-2/seqkd-warm-up",
        ]
    assert {cell.settings["split"] for cell in grid.cells.values()} == {"test"}


def test_seqkd_is_trained_on_for_as_long_as_the_longer_rl_arm(quickstart, tmp_path, monkeypatch):
    """The warm-up made 40 steps in 10 CPU seconds; the longer RL arm took 25."""
    grid = quickstart.study(tmp_path, quickstart.QUICK, "test", [1])
    seconds = {"seqkd-warm-up": 10.0, "reinforce": 18.0, "ppo": 25.0}
    inputs = {arm: Done(tmp_path, {"cpu_seconds": value}) for arm, value in seconds.items()}
    monkeypatch.setattr(quickstart, "warm_student", lambda cell: "warm student")
    monkeypatch.setattr(quickstart, "seqkd", lambda cell, student, **arguments: (student, arguments["max_steps"]))
    assert quickstart.seqkd_as_long(replace(grid.cells["seed-1/seqkd-as-long"], inputs=inputs)) == ("warm student", 100)


def test_the_report_compares_arms_seed_by_seed(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    grid = quickstart.study(tmp_path, quickstart.QUICK, "test", [1, 2, 3])
    scores = {"reinforce": (0.4, 0.6, 0.7), "ppo": (0.1, 0.5, 0.9), "seqkd-as-long": (0.5, 0.5, 0.5)}
    for cell in grid.cells.values():
        score = scores.get(cell.arm, (0.2,) * 3)[(cell.seed or 1) - 1]
        result = dict.fromkeys(quickstart.COLUMNS, score) | {"regret": 1 - score}
        write_record(cell, grid.digests(cell), result)
    quickstart.report(grid, quickstart.QUICK, "test")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["seeds_won_against_seqkd_as_long"] == {
        "REINFORCE": {"accuracy": 2, "regret": 2},
        "PPO": {"accuracy": 1, "regret": 1},
    }
    assert [run["accuracy"] for run in record["results"]["PPO"]] == [0.1, 0.5, 0.9]
    assert record["results"].keys() == {*quickstart.TITLES.values()}
    assert record["spread"]["PPO"]["accuracy"] == {
        "mean": 0.5,
        "lowest": 0.1,
        "highest": 0.9,
        "deviation": pytest.approx(0.4),
        "seeds": 3,
    }
    shown = capsys.readouterr().out
    assert "(40.0, 70.0)" in shown
    assert "PPO beats SeqKD trained as long on 1 of 3 seeds in accuracy, 1 in regret" in shown
    assert "missing" not in shown
    grid.cells["seed-2/ppo"].record_file.unlink()  # and with it what SeqKD as long is as long as
    quickstart.report(grid, quickstart.QUICK, "test")
    shown = capsys.readouterr().out
    assert "of 3 seed(s), 2 results missing" in shown
    assert "PPO beats SeqKD trained as long on 1 of 2 seeds in accuracy, 1 in regret" in shown
