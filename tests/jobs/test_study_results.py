"""What is said of seeds: spread, paired comparison, table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlkd.jobs.study_results import markdown_table, paired_test, spread, spread_text, spreads


def test_the_spread_is_of_all_seeds():
    values = list(np.random.default_rng(0).normal(3, 1, 5))
    over = spread(values)
    assert (over.lowest, over.highest, over.seeds) == (min(values), max(values), 5)
    assert over.mean == pytest.approx(np.mean(values))
    assert over.deviation == pytest.approx(np.std(values, ddof=1))
    assert spread([2.0]).deviation is None


def test_the_spread_of_numbers_that_all_runs_have():
    runs = [{"loss": 1.0, "steps": 2, "name": "a"}, {"loss": 3.0, "name": "b"}]
    assert spreads(runs) == {"loss": {"mean": 2.0, "lowest": 1.0, "highest": 3.0, "deviation": 2**0.5, "seeds": 2}}
    assert spreads([]) == {}


def test_the_spread_in_words():
    form = "{mean} [{lowest}, {highest}] of {seeds}"
    assert spread_text([1.0, 2.0, 4.5], form, 1) == "2.5 [1.0, 4.5] of 3"
    assert spread_text([0.125], form, 2) == "0.12"
    assert spread_text([], form, 2) == ""


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    first, second = rng.normal(80, 1, 5), rng.normal(79, 1, 5)
    seeds = [3, 1, 2, 5, 4]
    test = paired_test(
        dict(zip(seeds, first, strict=True)) | {8: 0.0}, dict(zip(seeds, second, strict=True)) | {9: 0.0}
    )
    oracle = stats.ttest_rel(first, second)
    assert test["n"] == 5
    assert test["p"] == pytest.approx(oracle.pvalue, abs=1e-5)
    assert test["mean"] == pytest.approx((first - second).mean(), abs=1e-3)
    assert (test["low"], test["high"]) == pytest.approx(oracle.confidence_interval(0.95), abs=1e-3)
    assert test["above_0"] == (first > second).sum()


def test_equal_scores_have_no_p():
    assert paired_test({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}) == {"n": 2, "above_0": 0, "mean": 0.0}
    assert paired_test({1: 2.0}, {2: 2.0}) == {"n": 0, "above_0": 0}


def test_a_table_in_markdown():
    assert markdown_table(["", "a"], [["x", "1"], ["y", "2"]]) == "|  | a |\n|---|---|\n| x | 1 |\n| y | 2 |"
