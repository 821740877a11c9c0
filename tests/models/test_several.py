"""Several teachers as one, against each of them alone."""

import pytest
import torch
from models.test_other_tokenizer import byte_level, seen_by, words
from models.test_other_tokenizer import teacher_of as foreign
from trainers import tiny_runs
from trainers.tiny_runs import assert_same, make, weights

from rlkd.errors import ConfigError, ModelError
from rlkd.models.several import AveragedTeachers, RoutedTeachers
from rlkd.objectives.rewards import REWARDS, induced_advantage
from rlkd.sampling.rollouts import greedy_writer
from rlkd.tensors import pad_rows
from tiny import EOS, tiny_teacher

ANSWERS = pad_rows([[3, 4, 5, EOS], [6, 3], [8, EOS], [7, 7, 7, 7, 7]], 0)
INPUTS = [("copy : a",), ("b c",), ("reverse : 1 2",), ("d",)]
NAMES = ["one", "two", "three"]


@pytest.fixture(scope="module")
def teachers():
    return {name: tiny_teacher(kind, seed=seed) for seed, (name, kind) in
            enumerate(zip(NAMES, ["t5-untied", "bart", "t5"], strict=True))}  # fmt: skip


def route(texts):
    return {"copy : a": "one", "d": "one", "b c": "two"}.get(texts[0], "three")


def of(source, **options):
    return source.score(INPUTS, *ANSWERS, **options)


def expected(student, signal, name):
    """E_{a ~ pi}[r(s, a)] of the exact term, [N]."""
    mask, reward = ANSWERS[1], REWARDS[name]
    logits = signal.distribution.logits(*(arg[mask] for arg in signal.distribution.token_args))
    return reward.expected(student, logits, reward.state_value(signal)[mask])


@pytest.mark.parametrize("name", REWARDS)
def test_averaged_rewards_and_their_exact_expectations_are_weighted_means(teachers, name):
    several = AveragedTeachers(teachers, [1, 2, 5])
    parts = [of(teacher, distribution=True) for teacher in teachers.values()]
    signal = of(several, distribution=True)
    share = [1 / 8, 2 / 8, 5 / 8]
    want = sum(w * induced_advantage(part, name) for w, part in zip(share, parts, strict=True))
    torch.testing.assert_close(induced_advantage(signal, name), want, atol=1e-5, rtol=1e-5)
    student = torch.randn(int(ANSWERS[1].sum()), teachers["one"].lm.valid_vocab)
    want = sum(w * expected(student, part, name) for w, part in zip(share, parts, strict=True))
    torch.testing.assert_close(expected(student, signal, name), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REWARDS)
def test_routed_rows_are_those_of_their_teacher_alone(teachers, name):
    several = RoutedTeachers(teachers, route)
    signal = of(several, distribution=True)
    student = torch.randn(int(ANSWERS[1].sum()), teachers["one"].lm.valid_vocab)
    rows = ANSWERS[1].nonzero()[:, 0]
    for i, texts in enumerate(INPUTS):
        alone = of(teachers[route(texts)], distribution=True)
        torch.testing.assert_close(
            induced_advantage(signal, name)[i], induced_advantage(alone, name)[i], atol=1e-5, rtol=1e-5
        )
        got, want = (expected(student, one, name)[rows == i] for one in (signal, alone))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert several.answers_by(INPUTS) == ["one", "two", "three", "one"]


def test_answers_and_the_cost_of_an_end(teachers):
    routed, averaged = RoutedTeachers(teachers, route), AveragedTeachers(teachers, [1, 3, 2])
    write = greedy_writer(4)
    for i, texts in enumerate(INPUTS):
        assert routed.answer(INPUTS, write, 4)[i] == teachers[route(texts)].answer([texts], write, 4)[0]
    assert averaged.answer(INPUTS, write, 4) == teachers["two"].answer(INPUTS, write, 4)
    assert averaged.answers_by(INPUTS) == ["two"] * 4
    alone = {name: teacher.score_ends(INPUTS, *ANSWERS)[1] for name, teacher in teachers.items()}
    want = sum(w / 6 * alone[name] for w, name in zip([1, 3, 2], NAMES, strict=True))
    torch.testing.assert_close(averaged.score_ends(INPUTS, *ANSWERS)[1], want)
    rows = [
        teachers[route(texts)].score_ends([texts], ids[m][None], m[m][None])[1]
        for texts, ids, m in zip(INPUTS, *ANSWERS, strict=True)
    ]
    torch.testing.assert_close(routed.score_ends(INPUTS, *ANSWERS)[1], sum(rows), atol=1e-4, rtol=1e-4)


def test_one_for_each_template(teachers):
    several = AveragedTeachers(teachers, [2, 1, 1], [(0, 3), (2,), (1,)])
    inputs = [(f"copy : {x}", f"{x} is", f"of {x}", f"answer : {x}") for x in "abcd"]
    signal = several.score(inputs, *ANSWERS, distribution=True)
    one, two, three = (
        teacher.score([tuple(texts[k] for k in own) for texts in inputs], *ANSWERS)
        for teacher, own in zip(teachers.values(), several.reads, strict=True)
    )
    want = (2 * (one.chosen - one.max) + two.chosen - two.max + three.chosen - three.max) / 4
    torch.testing.assert_close(signal.chosen - signal.max, want, atol=1e-5, rtol=1e-5)
    assert "0.5 of one on prompt 1 and 4, 0.25 of two on prompt 3" in several.how
    with pytest.raises(ConfigError, match="an input has 1 prompts, but the teachers are to read 4"):
        of(several)


def test_one_of_them_may_have_another_vocabulary():
    own, other = foreign(words(), seed=1), seen_by(words(), foreign(byte_level(), seed=2))
    several = AveragedTeachers({"own": own, "other": other})
    assert "distribution" not in several.gives
    assert "another vocabulary" in several.lacks
    answers = pad_rows([[3, 4, EOS], [5]], 0)
    parts = [source.score([("hello",), ("x",)], *answers) for source in (own, other)]
    got = several.score([("hello",), ("x",)], *answers, distribution=True)
    want = sum(induced_advantage(part, "softmax") for part in parts) / 2
    torch.testing.assert_close(induced_advantage(got, "softmax"), want, atol=1e-5, rtol=1e-5)
    assert got.distribution is None
    assert several.identity()["teacher other's vocabulary"].startswith("another")


def test_what_does_not_go_together_is_refused(teachers):
    with pytest.raises(ConfigError, match="1 given, at least 2 are needed"):
        AveragedTeachers({"one": teachers["one"]})
    with pytest.raises(ConfigError, match="give one above 0 for each of the 3 teachers"):
        AveragedTeachers(teachers, [1, 0, 2])
    with pytest.raises(ModelError, match="'one' and student 'x' have different vocabularies"):
        AveragedTeachers({"one": teachers["one"], "x": foreign(words())})
    ends = foreign(words(), seed=1)
    ends.lm.model.config.eos_token_id = ends.lm.model.generation_config.eos_token_id = 2
    with pytest.raises(ModelError, match="end answers with"):
        RoutedTeachers({"a": foreign(words()), "b": ends}, route)


@pytest.mark.parametrize("kind", ["reinforce", "gkd"])
def test_a_teacher_beside_itself_is_that_teacher(tmp_path, kind):
    """The exact one-step term, and a divergence: the same weights as the run with one."""
    alone = make(kind, tmp_path / "alone", max_steps=2, optim="sgd")
    alone.train()
    pair = {name: tiny_runs.tiny_teacher() for name in "ab"}
    twice = make(kind, tmp_path / "twice", teacher=AveragedTeachers(pair, [1, 4]), max_steps=2, optim="sgd")
    twice.train()
    assert_same(weights(alone.policy), weights(twice.policy), 1e-4)
    routed = RoutedTeachers(pair, lambda texts: "ab"[len(texts[0]) % 2])
    sent = make(kind, tmp_path / "sent", teacher=routed, max_steps=2, optim="sgd")
    sent.train()
    assert_same(weights(alone.policy), weights(sent.policy), 1e-4)
