"""The study on real text: its splits share nothing, and its metrics are of the right task."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from rlkd import Example

STUDIES = Path(__file__).resolve().parents[1] / "recipes" / "studies"
SIZES = {
    "question_words": 4,
    "news_words": 3,
    "unlabeled": {"quora": 3, "agnews": 2},
    "validation": 2,
    "test": 10,
}


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("quora_agnews_task", STUDIES / "quora_agnews_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert copied["self_bleu"] == pytest.approx(100)
    assert 0 < copied["bleu"] < copied["self_bleu"]
    assert task.task_metric(["", "World"], held_out)["accuracy"] == 0
