"""The flat loop is the trainer: the same prompts, answers, losses and weights, step by step."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "trainers"))

from rlkd import Policy, language_model
from tiny import tiny_tokenizer
from tiny_runs import WORDS, assert_same, examples, logged, make, student, tiny_teacher, weights

SETTINGS = {"steps": 6, "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_new_tokens": 5, "learning_rate": 1e-2}


@pytest.fixture
def rl_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    import rl_loop

    return rl_loop


@pytest.mark.parametrize(("reward", "lam", "gamma", "kl"), [("max", 0.2, 1.0, 0.05), ("lse", 0.9, 0.9, 0.3)])
def test_the_loop_and_the_trainer_are_the_same_run(tmp_path, rl_loop, reward, lam, gamma, kl):
    own = {"reward": reward, "lam": lam, "gamma": gamma, "kl_coef": kl}
    args = rl_loop.LoopArguments("t", "s", "d", "c", "x", **SETTINGS, **own)
    tokenizer = tiny_tokenizer(WORDS)
    policy = Policy(language_model(student(), tokenizer))
    snapshots, lines = [], []
    for numbers in rl_loop.reinforce(policy, tiny_teacher(), tokenizer, examples(12), args):
        lines.append(numbers)
        snapshots.append(weights(policy.student))

    theirs = {"reward_value": reward, "lam": lam, "gamma": gamma, "kl_coef": kl}
    trainer = make("reinforce", tmp_path, n=12, max_steps=6, save_strategy="steps", save_steps=1, **theirs)
    trainer.train()
    found = [line for line in logged(tmp_path) if "loss" in line]
    for one, other in zip(lines, found, strict=True):
        for name in ("regret", "length", "kl", "loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (one["step"], name)
    for step, own_weights in enumerate(snapshots, start=1):
        saved = type(trainer.policy.student).from_pretrained(tmp_path / f"checkpoint-{step}")
        assert_same(weights(saved), own_weights, 1e-4)
    assert any(not torch.equal(snapshots[0][name], snapshots[-1][name]) for name in snapshots[0])
