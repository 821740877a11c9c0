import math

import pytest

from rlkd.errors import DataError
from rlkd.metrics import TASK_METRICS, bleu, exact_match, rouge
from rlkd.records import Example


def rows(*references):
    return [Example(f"row {i}", "x", ("x",), r) for i, r in enumerate(references)]


def test_exact_match_strips_ignores_case_and_takes_any_reference():
    got = exact_match([" Yes ", "no", "maybe"], rows(("yes",), ("Yes", "NO"), ("maybe not",)))
    assert got == {"exact_match": pytest.approx(2 / 3)}


def test_rouge_by_hand():
    # Unigrams: 3 of 4 predicted and 3 of 6 wanted. Bigrams: the cat, 1 of 3 and 1 of 5. Longest common: the cat sat.
    got = rouge(["the cat quickly sat"], rows(("the cat on mats sat down",)))
    f1 = lambda p, r: 100 * 2 * p * r / (p + r)  # noqa: E731
    assert got == pytest.approx({"rouge1": f1(3 / 4, 3 / 6), "rouge2": f1(1 / 3, 1 / 5), "rougeL": f1(3 / 4, 3 / 6)})


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
