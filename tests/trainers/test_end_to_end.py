"""METHOD check 11 on a tiny pair whose teacher copies words and after most of them adds a filler, ":" and any letter.

Its greedy answers have the filler (.7 against .3); its most probable ones have not (.7 / 3 against .3).
"""

import random

import pytest
import torch

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.teacher import Teacher
from rlkd.records import Example
from rlkd.sampling.decode import decode, sampler
from tiny import tiny_t5, tiny_tokenizer
from tiny_runs import VALID, WORDS, make, tiny_teacher

LONG = {"max_new_tokens": 8, "per_device_train_batch_size": 32, "logging_steps": 1000, "lr_scheduler_type": "constant"}


def sentences(n, seed):
    rng = random.Random(seed)
    return [[rng.choice("abc") for _ in range(rng.randint(1, 2))] for _ in range(n)]


def fit(folder, model, pairs, steps, learning_rate):
    rows = [{"student_input": x, "label": y} for x, y in pairs]
    make(
        "supervised", folder, model=model, data=rows, max_steps=steps, **{**LONG, "learning_rate": learning_rate}
    ).train()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A trained teacher, and the weights of a student warmed on its sampled answers."""
    folder, rng = tmp_path_factory.mktemp("pair"), random.Random(0)
    gold = []
    for words in sentences(600, 1):
        answer = " ".join(f"{w} : {rng.choice('abc')}" if rng.random() < 0.7 else w for w in words)
        gold.append((" ".join(words), answer))
    model = tiny_t5(tied=False, seed=0, width=32, vocab=VALID)
    fit(folder / "teacher", model, gold, 400, 5e-3)
    teacher = Teacher(EncoderDecoder(model, VALID), tiny_tokenizer(WORDS))
    inputs = [x for x, _ in gold]
    answers = decode(
        teacher.lm, teacher.prompt_states(inputs), sampler([*range(600)], 8, torch.device("cpu")), max_new_tokens=8
    )
    texts = teacher.tokenizer.batch_decode(
        [row[mask].tolist() for row, mask in zip(answers.ids, answers.mask, strict=True)], skip_special_tokens=True
    )
    student = tiny_t5(tied=False, seed=1, width=16, vocab=VALID)
    # Until its regret is about 1 nat: from a weaker start the full return teaches it to end early.
    fit(folder / "student", student, list(zip(inputs, texts, strict=True)), 400, 1e-2)
    return teacher, student.state_dict()


def run(pair, folder, **options):
    """Evaluations of sampled answers before and after reinforcement learning."""
    teacher, state = pair
    model = tiny_t5(tied=False, seed=1, width=16, vocab=VALID)
    model.load_state_dict(state)
    texts = [" ".join(words) for words in sentences(550, 2)]
    data = [Example(f"train {i}", x, (x,)) for i, x in enumerate(texts[:150])]
    held_out = [Example(f"test {i}", x, (x,)) for i, x in enumerate(texts[150:])]
    trainer = make(
        "reinforce", folder, model=model, teacher=teacher, data=data, eval_examples=held_out,
        **{
            **LONG, "max_steps": 60, "rollouts_per_prompt": 4, "lam": 1.0, "kl_coef": 0.0, "entropy_coef": 0.1,
            "learning_rate": 1e-3, "eval_limit": None, **options,
        },
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """Reward -> (before, after) of every seed: a single run of sixty steps hangs on rounding."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        value: [run(pair, folder / f"{value}-{seed}", seed=seed, reward_value=value) for seed in SEEDS]
        for value in ("max", "lse")
    }


def lengthening(runs):
    return sum(after["eval_sample_length"] - before["eval_sample_length"] for before, after in runs) / len(runs)


@pytest.mark.slow
def test_max_reward_lowers_regret_and_keeps_the_length(runs):
    for before, after in runs["max"]:
        assert before["eval_sample_regret"] > 0.3
        assert after["eval_sample_regret"] < 0.5 * before["eval_sample_regret"]
        assert after["eval_sample_finish_rate"] > 0.9
    assert lengthening(runs["max"]) > -0.3


@pytest.mark.slow
def test_lse_reward_shortens_answers(runs):
    # The entropy bonus keeps the student exploring until the price of the filler's random letter has been felt.
    for before, after in runs["lse"]:
        assert after["eval_sample_logprob"] > before["eval_sample_logprob"]
        assert after["eval_sample_length"] < before["eval_sample_length"]
    assert lengthening(runs["lse"]) < lengthening(runs["max"]) - 0.4


def test_the_random_pair_of_the_other_tests_learns_too(tmp_path):
    """A few steps on the tiny random pair lower the regret per token of samples: a sign error would raise it. From such
    a weak start answers run on, so that a sequence's regret may not fall.
    """
    for kind in ("ppo", "reinforce"):
        trainer = make(
            kind, tmp_path / kind, teacher=tiny_teacher(), max_steps=16, n=16, per_device_train_batch_size=16,
            learning_rate=1e-2, kl_coef=0.0,
        )  # fmt: skip
        start = trainer.annotate(trainer.sample(99))
        trainer.train()
        end = trainer.annotate(trainer.sample(99))
        masks = [b.answers.answer_mask for b in (start, end)]
        regret = [
            ((b.signal.max - b.signal.chosen) * m).sum() / m.sum() for b, m in zip((start, end), masks, strict=True)
        ]
        assert regret[1] < 0.85 * regret[0]
