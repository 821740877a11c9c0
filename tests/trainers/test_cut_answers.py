"""Answers that max_new_tokens cut: kept, left out, or charged for the end they lack."""

from dataclasses import replace

import pytest
import torch
from test_losses import full_logits, perturb, prompt_ids

from rlkd.errors import ConfigError
from rlkd.models.architectures import language_model
from rlkd.models.teacher import Teacher
from rlkd.records import select_rows
from rlkd.trainers.cut_answers import cut_rows, end_price
from tiny import tiny_bart, tiny_tokenizer
from tiny_runs import EOS, PADDED, WORDS, assert_same, logged, make, weights

MIXED = {"max_new_tokens": 3, "n": 16, "per_device_train_batch_size": 16}  # some answers end, some are cut


def annotated(folder, kind="reinforce", **options):
    trainer = make(kind, folder, **{**MIXED, **options})
    trainer.current_gradient_accumulation_steps = 1
    answers = trainer.sample(0)
    cut = ~answers.finished
    assert cut.any()
    assert not cut.all()
    return trainer, answers, trainer.annotate(answers)


@pytest.mark.parametrize("reward", ["max", "lse", "softmax"])
@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_a_cut_answer_is_charged_what_ending_there_would_have_cost(tmp_path, reward, lam):
    options = {"reward_value": reward, "baseline": "teacher", "lam": lam}
    trainer, answers, batch = annotated(tmp_path, cut_answers="end_price", **options)
    _, _, kept = annotated(tmp_path, cut_answers="keep", **options)
    prices = torch.zeros(len(answers.examples))
    for i in (~answers.finished).nonzero().flatten().tolist():
        answer = answers.answer_ids[i, answers.answer_mask[i]].tolist()
        prompt = prompt_ids(answers.examples[i].teacher_inputs[0])
        with torch.no_grad():  # the state after the cut is that before one more token
            q = full_logits(trainer.teacher.lm.model, prompt, [*answer, EOS])[0][-1].log_softmax(-1)
        value = {"max": q.max(), "lse": q.logsumexp(0), "softmax": (q.exp() * q).sum()}[reward]
        prices[i] = q[EOS] - value
    assert (prices < -0.1).any()
    charged, advantages = (
        getattr(batch.annotations, name) - getattr(kept.annotations, name) for name in ("rewards", "advantages")
    )
    for i, n in enumerate(answers.answer_mask.sum(1).tolist()):
        for t in range(answers.answer_mask.shape[1]):
            assert float(charged[i, t]) == pytest.approx(float(prices[i]) if t == n - 1 else 0.0, abs=1e-5)
            decayed = lam ** (n - 1 - t) if t < n else 0.0
            assert float(advantages[i, t]) == pytest.approx(float(prices[i]) * decayed, abs=1e-5)
    (total, count) = torch.stack(trainer._recorded["end_price"]).sum(0).tolist()
    assert total / count == pytest.approx(-float(prices.mean()), rel=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("whiten", [False, True])
def test_answers_that_are_dropped_might_as_well_not_have_been_sampled(tmp_path, reduction, whiten):
    options = {"baseline": "teacher", "loss_reduction": reduction, "whiten_advantages": whiten, "kl_coef": 0.5}
    trainer, answers, dropped = annotated(tmp_path, cut_answers="drop", **options)
    logged_std = torch.stack(trainer._recorded["advantage_std"])[0, 0]
    rest = select_rows(answers, answers.finished.nonzero().flatten())
    kept = trainer.annotate(rest)
    assert float(torch.stack(trainer._recorded["advantage_std"])[1, 0]) == pytest.approx(float(logged_std), rel=1e-5)
    assert float(torch.stack(trainer._recorded["dropped"])[0, 0]) == pytest.approx(
        float(cut_rows(answers).float().mean())
    )
    perturb(trainer.policy, 0.05)
    results = []
    for minibatch in (next(iter(trainer.minibatches(dropped, 0))), kept):
        trainer.policy.zero_grad()
        loss = trainer.compute_loss(trainer.policy, {"minibatch": minibatch})
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in trainer.policy.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_a_batch_of_cut_answers_alone_teaches_nothing(tmp_path, kind):
    trainer = make(kind, tmp_path, cut_answers="drop", max_steps=4, whiten_advantages=True)
    sample, before = trainer.sample, weights(trainer.policy)

    def unfinished(index):
        answers = sample(index)
        return replace(answers, finished=torch.zeros_like(answers.finished))

    trainer.sample = unfinished
    trainer.train()
    assert_same(before, weights(trainer.policy))
    lines = [line for line in logged(tmp_path) if "loss" in line]
    assert {line["dropped"] for line in lines if "dropped" in line} == {1.0}
    assert all(line["loss"] == 0 for line in lines)


def test_only_the_last_token_of_a_cut_answer_is_charged(tmp_path):
    """Whatever a reward makes of answers that ended: here 1."""
    _, answers, _ = annotated(tmp_path)
    charged = end_price(torch.ones(len(answers.examples), 1), answers)
    for row, mask, ended in zip(charged.tolist(), answers.answer_mask, answers.finished.tolist(), strict=True):
        assert row == [float(not ended and t == int(mask.sum()) - 1) for t in range(len(row))]


def test_labels_were_not_cut(tmp_path):
    answers = make("reinforce", tmp_path).sample(0)
    assert not cut_rows(replace(answers, finished=None)).any()


def test_the_end_must_have_a_position_in_the_teacher(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    teacher = Teacher(language_model(tiny_bart(seed=2, vocab=PADDED), tokenizer), tokenizer)
    options = {"teacher": teacher, "cut_answers": "end_price"}
    with pytest.raises(ConfigError, match="64 positions for an answer and its end: set max_new_tokens to at most 63"):
        make("reinforce", tmp_path, max_new_tokens=64, **options)
    make("reinforce", tmp_path, max_new_tokens=63, **options)
    make("reinforce", tmp_path, max_new_tokens=64, teacher=teacher)
