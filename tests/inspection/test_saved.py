"""What trainers save of token rewards, and how it is read again."""

from __future__ import annotations

import json

import pytest
from trainers.tiny_runs import examples, make

from rlkd import RewardView
from rlkd.errors import DataError

SETTINGS = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "sample_table_rows": 3}


@pytest.mark.parametrize("value", ["max", "lse", "softmax"])
def test_a_run_shows_the_rewards_it_trained_on(tmp_path, value):
    seen = []
    trainer = make("ppo", tmp_path, eval_examples=examples(5), reward_value=value, **SETTINGS)
    annotate = trainer.annotate
    trainer.annotate = lambda rollouts: seen.append(annotate(rollouts)) or seen[-1]
    trainer.train()
    view = RewardView.from_run(tmp_path)
    assert view.value == value
    rollouts = [s for s in view if s.source == "rollout"]
    assert len(rollouts) == 3
    batch = seen[-1]
    for i, sample in enumerate(rollouts):
        kept = batch.answers.answer_mask[i]
        assert sample.ids == batch.answers.answer_ids[i][kept].tolist()
        assert sample.total_reward == pytest.approx(float(batch.annotations.rewards[i].sum()), abs=1e-5)
        for shown, used in (
            (sample.rewards, batch.annotations.rewards),
            (sample.values, batch.annotations.values),
            (sample.advantages, batch.annotations.advantages),
            (sample.student_logprobs, batch.answers.behaviour_logps),
        ):
            assert shown == pytest.approx(used[i][kept].tolist(), abs=1e-5)


def test_held_out_answers_are_those_of_the_evaluation(tmp_path):
    make("reinforce", tmp_path, eval_examples=examples(5), **SETTINGS).train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    view = RewardView.from_run(tmp_path)
    for row in rows:
        shown = {s.source: s for s in view if (s.id, s.input) == (row["id"], row["input"])}
        names = ("student", "student sampled") if row["step"] == 4 else ("student before",)
        for name, prefix in zip(names, ("", "sample_"), strict=False):
            assert shown[name].text == row[prefix + "student"]
            assert shown[name].step == row["step"]
            assert shown[name].regret == pytest.approx(row[prefix + "regret"], abs=1e-4)
            assert shown[name].rewards == pytest.approx(row[prefix + "rewards"], abs=1e-5)
        assert shown["teacher greedy"].text == row["teacher"]
        assert shown["teacher greedy"].regret == pytest.approx(0, abs=1e-4)
    first = RewardView.from_run(tmp_path, step=2)
    assert {s.source for s in first} == {"student", "student sampled", "teacher greedy", "rollout"}
    assert all(s.values is None for s in first)


def test_a_supervised_run_is_saved_too(tmp_path):
    make("supervised", tmp_path, eval_examples=examples(5)).evaluate()
    view = RewardView.from_run(tmp_path)
    assert {s.source for s in view} == {"student", "student sampled", "teacher greedy"}
    assert len(view.cases()) == 5  # four with all numbers, the fifth from held_out.jsonl


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no token_rewards\.jsonl"),
        ("", "is empty"),
        ('{"value": "max", "id"', r"token_rewards\.jsonl:1 is not a sample"),
        ('{"id": "1"}', r":1: value must be one of max, lse, softmax, not None"),
        ("[]", ":1 is not a sample"),
        ('{"value": "max", "id": "1"}', r"token_rewards\.jsonl:1: .*missing"),
        ('{"value": "max", "reward": 1}', r":1: unknown field 'reward'. Did you mean 'rewards'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "token_rewards.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        RewardView.from_run(tmp_path)


def test_an_unknown_step_names_those_there_are(tmp_path):
    make("supervised", tmp_path, eval_examples=examples(5)).evaluate()
    with pytest.raises(DataError, match="no step 7: allowed are 0"):
        RewardView.from_run(tmp_path, step=7)
