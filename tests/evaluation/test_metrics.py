import logging
import math

import numpy as np
import pytest
from transformers import EvalPrediction

from rlkd.errors import ConfigError, DataError
from rlkd.evaluation.problems import PROBLEMS, classification_metrics, f1, matthews
from rlkd.evaluation.task_metrics import TASK_METRICS, bleu, exact_match, rouge, try_metric
from rlkd.records import Example

SINGLE_LABEL = PROBLEMS["single_label_classification"].scores


def rows(*references):
    return [Example(f"row {i}", "x", ("x",), r) for i, r in enumerate(references)]


def test_exact_match_strips_ignores_case_and_takes_any_reference():
    got = exact_match([" Yes ", "no", "maybe"], rows(("yes",), ("Yes", "NO"), ("maybe not",)))
    assert got == {"exact_match": pytest.approx(2 / 3)}


def test_rouge_by_hand():
    # Unigrams: 3 of 4 predicted and 3 of 6 wanted. Bigrams: the cat, 1 of 3 and 1 of 5. Longest common: the cat sat.
    got = rouge(["the cat quickly sat"], rows(("the cat on mats sat down",)))
    mean = lambda p, r: 100 * 2 * p * r / (p + r)  # noqa: E731
    assert got == pytest.approx(
        {"rouge1": mean(3 / 4, 3 / 6), "rouge2": mean(1 / 3, 1 / 5), "rougeL": mean(3 / 4, 3 / 6)}
    )


def test_rouge_stems_takes_the_best_reference_and_averages_rows():
    got = rouge(["running dogs", "nothing shared"], rows(("something else", "run dog"), ("other words",)))
    assert got == pytest.approx({"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0})


def test_bleu_by_hand():
    # 1- to 4-gram precisions 5/6, 3/5, 2/4, 1/3 against a reference as long as the prediction.
    got = bleu(["the cat sat on a mat"], rows(("the cat sat on the mat",)))
    assert got["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_brevity_and_rows_with_fewer_references():
    text = "one two three four five six"
    assert bleu([text, text], rows((text,), ("other words", text)))["bleu"] == pytest.approx(100)
    short = bleu(["one two three four"], rows((text,)))["bleu"]
    assert short == pytest.approx(100 * math.exp(1 - 6 / 4))


@pytest.mark.parametrize("name", TASK_METRICS)
def test_missing_references_are_named(name):
    with pytest.raises(
        DataError, match=r"2 of 3 evaluation rows have no reference \(first: row 1\).*task_metric: none"
    ):
        TASK_METRICS[name](["a", "b", "c"], rows(("a",), (), ()))


@pytest.mark.parametrize(
    ("metric", "references", "useless"),
    [
        ("rouge", [("the cat sat",), ("on a mat", "a mat")], ""),
        ("rouge", [("кошка сидит",), ("на коврике",)], "rouge1, rouge2, rougeL"),
        ("bleu", [("the cat sat on the mat",)] * 2, ""),
        ("bleu", [("yes",), ("no",)], "bleu"),
        ("exact_match", [("да",), ("нет", "no")], ""),
    ],
)
def test_a_metric_that_cannot_tell_is_named(caplog, metric, references, useless):
    expected = list(TASK_METRICS[metric](["x"] * 2, rows(*references)))
    with caplog.at_level(logging.WARNING):
        assert try_metric(TASK_METRICS[metric], rows(*references)) == expected
    assert [r.message.split(": 0 for the right answers")[0] for r in caplog.records] == ([useless] if useless else [])


def test_a_metric_of_your_own_is_tried_before_it_is_needed():
    def whole(predictions, examples):
        assert len(predictions) >= 100  # not on a few rows
        return {"mine": predictions == [e.references[0] for e in examples]}

    assert try_metric(whole, rows(*[("a",)] * 100)) == ["mine"]
    with pytest.raises(ConfigError, match=r"^task_metric fails on 2 answers .* \(AssertionError: "):
        try_metric(whole, rows(("a",), ("b",)))
    with pytest.raises(ConfigError, match=r"IndexError.* must take \(predictions, examples\)"):
        try_metric(lambda predictions, examples: {"x": len(examples[0].references[0])}, rows((), ()))
    with pytest.raises(ConfigError, match="return a dictionary of numbers"):
        try_metric(lambda predictions, examples: {"x": "high"}, rows(("a",)))


def by_hand(predicted, true):
    """Accuracy, F1 and Matthews correlation of two classes, from the four counts."""
    tp, tn = (int(((predicted == k) & (true == k)).sum()) for k in (1, 0))
    fp, fn = (int(((predicted == k) & (true == 1 - k)).sum()) for k in (1, 0))
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return {
        "accuracy": (tp + tn) / len(true),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "matthews": (tp * tn - fp * fn) / root if root else 0.0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_from_the_four_counts(seed):
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(40, 2)), random.integers(-1, 2, 40)
    kept = labels >= 0
    expected = by_hand(logits.argmax(-1)[kept], labels[kept])
    found = classification_metrics(list(SINGLE_LABEL))(EvalPrediction(logits, labels))
    assert found == pytest.approx(expected)


def test_f1_is_that_of_label_1_among_several():
    predicted, true = np.array([0, 1, 1, 2, 1, 0]), np.array([0, 1, 2, 2, 1, 1])
    assert f1(predicted, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1(np.array([0, 2]), np.array([2, 2])) == 0


def test_matthews_of_several_classes_is_their_correlation():
    """Gorodkin's R_K from the confusion matrix."""
    random = np.random.default_rng(0)
    predicted, true = random.integers(0, 4, (2, 50))
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (true, predicted), 1)
    t, p, n = confusion.sum(1), confusion.sum(0), confusion.sum()
    expected = (n * np.trace(confusion) - t @ p) / np.sqrt((n**2 - p @ p) * (n**2 - t @ t))
    assert matthews(predicted, true) == pytest.approx(expected)


def test_classification_metrics_without_anything_to_score():
    nothing, zeros = np.array([], dtype=int), np.zeros(3, dtype=int)
    assert [score(nothing, nothing) for score in SINGLE_LABEL.values()] == [0, 0, 0]
    assert [score(zeros, zeros) for score in SINGLE_LABEL.values()] == [1, 0, 0]
