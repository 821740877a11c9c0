"""Intervals against normal theory and a loop by hand; verdicts."""

import numpy as np
import pytest

from rlkd.report.intervals import Difference, Interval, mean_interval, overall, paired_difference


def test_the_interval_of_a_mean_is_that_of_normal_theory_for_many_rows():
    scores = np.random.default_rng(0).gamma(2.0, 1.0, (1, 2000))
    found = mean_interval(scores)
    half = 1.96 * scores.std() / np.sqrt(2000)
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)
    assert (found.rows, found.seeds) == (2000, 1)


def test_the_interval_is_that_of_a_bootstrap_by_hand():
    """Rows and seeds resampled in a loop, with another generator."""
    random = np.random.default_rng(5)
    scores = random.normal(size=(3, 40)) + np.array([[0.0], [0.5], [1.0]])
    means = []
    for _ in range(3000):
        rows, seeds = random.choice(40, 40), random.choice(3, 3)
        means.append(np.mean([[scores[s, r] for r in rows] for s in seeds]))
    found = mean_interval(scores)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05)
    one_seed = mean_interval(scores.mean(0, keepdims=True))
    assert one_seed.high - one_seed.low < found.high - found.low


def test_coverage_of_the_interval():
    random = np.random.default_rng(1)
    hits = [f.low <= 2.0 <= f.high for f in (mean_interval(random.gamma(2.0, 1.0, (1, 60))) for _ in range(200))]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_pairing_finds_a_shift_that_the_spread_of_rows_hides():
    random = np.random.default_rng(2)
    base = random.normal(0, 5, (1, 300))
    other = base - 0.3 + random.normal(0, 0.5, (1, 300))
    found = paired_difference(base, other)
    assert found.interval.low <= 0.3 <= found.interval.high
    assert found.interval.high - found.interval.low < 0.2
    assert found.p_value < 0.01
    assert found.verdict("accuracy") == "better"
    assert found.verdict("regret") == "worse"
    assert found.verdict("length") == "more"


def test_no_shift_is_noise_and_the_p_value_is_uniform():
    random = np.random.default_rng(3)
    found = [paired_difference(random.normal(size=(1, 50)), random.normal(size=(1, 50))) for _ in range(150)]
    assert np.mean([f.p_value < 0.05 for f in found]) < 0.12
    assert np.mean([f.p_value for f in found]) == pytest.approx(0.5, abs=0.1)
    assert np.mean([f.verdict("accuracy") == "within noise" for f in found]) > 0.85


def test_few_rows_have_no_interval():
    found = paired_difference(np.ones((1, 9)), np.zeros((1, 9)))
    assert (found.interval.value, found.interval.low, found.p_value) == (1.0, None, None)
    assert found.verdict("accuracy") == "not known"


def test_large_sets_are_drawn_in_blocks(monkeypatch):
    scores = np.random.default_rng(0).normal(size=(2, 500))
    whole = mean_interval(scores)
    monkeypatch.setattr("rlkd.report.intervals.CHUNK", 5000)
    parts = mean_interval(scores)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.02)


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        (["better", "better"], "better"),
        (["better", "within noise"], "partly better"),
        (["better", "worse"], "mixed"),
        (["worse"], "worse"),
        (["within noise", "not known"], "within noise"),
        ([], "not known"),
    ],
)
def test_one_answer_of_several(verdicts, answer):
    assert overall(verdicts) == answer


def test_touching_zero_is_noise():
    assert Difference(Interval(0.0, 0.0, 0.0, 20, 1), 1.0).verdict("accuracy") == "within noise"
