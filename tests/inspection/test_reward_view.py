"""Samples add up, selections keep whole cases, JSON comes back the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd import RewardView
from rlkd.errors import ConfigError, DataError
from views import HOSTILE, sample, view


def test_sums_are_of_the_shown_numbers():
    one = sample(["a", "b", "c"], seed=3)
    assert one.total_reward == pytest.approx(sum(one.rewards))
    assert one.regret == pytest.approx(-one.total_reward)  # V = max
    assert one.logprob == pytest.approx(sum(one.max_logprobs) - one.regret)
    assert one.student_gap == pytest.approx(
        sum(abs(a - b) for a, b in zip(one.student_logprobs, one.logprobs, strict=True))
    )


def test_a_sum_with_an_unknown_number_is_unknown():
    one = sample(["a", "b"])
    assert replace(one, rewards=[-1.0, None]).total_reward is None
    assert replace(one, logprobs=None).regret is None
    assert replace(one, max_logprobs=[0.0, None]).regrets[1] is None
    assert sample([]).total_reward == 0


def test_columns_of_another_length_are_refused():
    with pytest.raises(DataError, match="sample '1': entropies has 1 entries for 2 tokens"):
        replace(sample(["a", "b"]), entropies=[0.0])


@pytest.mark.parametrize("by", ["regret", "student", "length"])
def test_worst_keeps_whole_cases_in_order(by):
    whole = view(6)
    found = whole.worst(4, by)
    assert len(found.cases()) == 4
    assert all(len(case.samples) == 2 for case in found.cases())
    rank = {"regret": "regret", "student": "student_gap", "length": "length"}[by]
    numbers = [getattr(case, rank) for case in found.cases()]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == max(getattr(case, rank) for case in whole.cases())


def test_worst_by_templates_compares_the_same_answer():
    a, b = sample(["x"], prompts={"p": ""}), sample(["x"], seed=7, prompts={"q": ""})
    other = sample(["y"], id="2", prompts={"p": ""})
    found = RewardView([a, b, other]).worst(5, "templates")
    assert [s.id for s in found] == ["1", "1"]
    assert found.cases()[0].template_gap == pytest.approx(abs(a.total_reward - b.total_reward))


def test_an_unknown_ranking_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"allowed are 'regret', 'templates', 'student', 'length'. Did you mean 'templates'"
    ):
        view().worst(1, "template")


def test_search_and_length():
    long = sample(["word"] * 9, id="long", input="Straße")
    whole = RewardView([*view(3), long])
    assert [s.id for s in whole.search("STRASSE")] == ["long"]
    assert {s.id for s in whole.search("number 1")} == {"row 1"}
    assert {s.id for s in whole.with_length(7)} == {"long"}
    assert {s.id for s in whole.with_length(0, 6)} == {"row 0", "row 1", "row 2"}


def test_json_comes_back_the_same(tmp_path):
    odd = sample([HOSTILE, "\u202e", "👩‍👩‍👧", "\ud800", ""], facts={"kind": "odd", "n": 2}, finished=False, step=3)
    whole = RewardView([*view(2), odd, sample([], id="empty", scored=False)], "lse", "Mine")
    whole.to_json(tmp_path / "view.json")
    assert RewardView.from_json(tmp_path / "view.json") == whole
    assert RewardView.from_json(whole.to_json()) == whole


def test_json_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a reward view"):
        RewardView.from_json("[1]")
    with pytest.raises(DataError, match="is not a reward view"):
        RewardView.from_json("{")
    with pytest.raises(DataError, match=r"gone\.json is not a reward view"):
        RewardView.from_json(Path(tmp_path / "gone.json"))
    data = json.loads(view(1).to_json())
    data["samples"][1]["reward"] = data["samples"][1].pop("rewards")
    with pytest.raises(DataError, match=r"sample 1: unknown field 'reward'. Did you mean 'rewards'"):
        RewardView.from_json(json.dumps(data))
    del data["samples"][1]["reward"], data["samples"][0]["tokens"]
    with pytest.raises(DataError, match="sample 0"):
        RewardView.from_json(json.dumps(data))
