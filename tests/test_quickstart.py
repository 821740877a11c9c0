"""The quickstart's task: its checker accepts every right answer and no other, and nothing trains on held-out notes."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def task():
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    yield importlib.import_module("quickstart_task")
    sys.path.pop(0)


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
