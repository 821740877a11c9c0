"""Rollouts that the student did not draw from itself: the weights of the losses, what is logged of them, refusals."""

from itertools import product

import numpy as np
import pytest
import torch
from test_losses import full_logits, perturb, prompt_ids

from rlkd.errors import ConfigError
from rlkd.models.signals import SIGNAL
from rlkd.records import Answers, Example, given
from rlkd.trainers.objective import StudentTokens
from rlkd.trainers.off_policy import weighted
from tiny_runs import EOS, VALID, logged, make, tiny_teacher

MIXED = {"teacher_mix": 0.3}


class Enumerated:
    """Every answer of at most two tokens to one input: its chance under the proposal, and the true policy gradient."""

    def __init__(self, trainer):
        example, args = Example("x", "a b", ("copy : a b",)), trainer.args
        prompt, question = prompt_ids(example.student_input), prompt_ids(example.teacher_inputs[0])
        words = [a for a in range(VALID) if a != EOS]
        ids = torch.tensor([(EOS, 0), *product(words, range(VALID))])
        mask = torch.stack([torch.ones(len(ids)).bool(), ids[:, 0] != EOS], 1)

        def logits(model, text):
            """[W, 2, V]: of the first token, and of the second after each word."""
            decoder = torch.tensor([[model.config.decoder_start_token_id, word] for word in words])
            return model(input_ids=torch.tensor([text] * len(words)), decoder_input_ids=decoder).logits[..., :VALID]

        def along(table):
            """[Y, 2] of every answer's tokens from a table [W, 2, V]."""
            second = [table[words.index(a), 1, b] if a != EOS else torch.tensor(0.0) for a, b in ids.tolist()]
            return torch.stack([table[0, 0][ids[:, 0]], torch.stack(second)], 1)

        def own(model):
            return along(logits(model, prompt).log_softmax(-1))

        with torch.no_grad():
            q, f = logits(trainer.teacher.lm.model, question), logits(trainer.behaviour.student, prompt)
            share, heat = args.teacher_mix, args.rollout_temperature
            mu = along(((1 - share) * (f / heat).softmax(-1) + share * q.softmax(-1)).log())
            returns, old = along(q - q.amax(-1, keepdim=True)).sum(1), own(trainer.behaviour.student)
        self.chance = mu.sum(1).exp()
        assert float(self.chance.sum()) == pytest.approx(1, abs=1e-5)
        (own(trainer.policy.student).sum(1).exp() * -returns).sum().backward()
        self.truth = self.gradient(trainer)
        inputs = torch.tensor([prompt] * len(ids))
        finished = (ids[:, 0] == EOS) | (ids[:, 1] == EOS)
        self.answers = Answers([example] * len(ids), inputs, inputs >= 0, ids, mask, mu, finished, old)

    @staticmethod
    def gradient(trainer):
        out = torch.cat([p.grad.flatten().clone() for p in trainer.policy.parameters() if p.grad is not None])
        trainer.policy.zero_grad()
        return out

    def of_the_loss(self, trainer):
        """The expectation, over the proposal, of the gradient of the trainer's loss of one answer."""
        minibatch = trainer.annotate(self.answers)
        function, token_args = trainer.objective.token_function(minibatch.signal, minibatch.annotations)
        (logps, entropy, *extra), values = trainer.policy(*self.answers.policy_inputs, function, token_args)
        student = StudentTokens(logps=logps, entropy=entropy, values=values, extra=tuple(extra))
        loss = trainer.objective.token_loss(student, minibatch)[0] * self.answers.answer_mask
        (self.chance * loss.sum(1)).sum().backward()
        return self.gradient(trainer)


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
@pytest.mark.parametrize("one_step", ["exact", "sampled"])
@pytest.mark.parametrize("settings", [MIXED, {"rollout_temperature": 2.0}, {"rollout_temperature": 0.7, **MIXED}])
def test_the_expected_gradient_is_that_of_the_policys_own_answers(tmp_path, kind, one_step, settings):
    """With cumulative weights that no cap truncates; PPO at its first update, REINFORCE for a policy that lags, too."""
    options = {"baseline": "teacher", "lam": 1.0, "kl_coef": 0.0, "max_new_tokens": 2, "one_step": one_step, **settings}
    options |= {"sync_every": 2} if kind == "reinforce" else {}

    def error(**more):
        trainer = make(kind, tmp_path, **options, **more)
        if kind == "reinforce":
            perturb(trainer.policy, 0.2)
        every = Enumerated(trainer)
        return float((every.of_the_loss(trainer) - every.truth).abs().max() / every.truth.abs().max())

    assert error(importance_cap=1e9) < 2e-4
    assert error(importance_weight="none") > 1e-2


def test_ppo_clips_about_the_policy_that_sampled(tmp_path):
    """The clipped ratio starts at 1 whatever answers were drawn from; the weights multiply the clipped term."""
    trainer = make("ppo", tmp_path, one_step="sampled", kl_coef=0.0, **MIXED)
    minibatch = next(trainer.experience())["minibatch"]
    answers, credit = minibatch.answers, minibatch.annotations
    assert float((answers.policy_logps - answers.behaviour_logps).abs().max()) > 0.1
    weights = torch.where(answers.answer_mask, (answers.policy_logps - answers.behaviour_logps).exp(), 1)
    products = weights.cumprod(1).clamp(max=2.0)
    for move in (0.0, 0.5, -0.5):
        moved = answers.policy_logps + move
        advantages = weighted(trainer.args, trainer.objective.stands_for(moved, answers), minibatch).advantages
        loss, said = trainer.objective.policy_loss(moved, advantages, answers)
        for i, t in answers.answer_mask.nonzero().tolist():
            n = int(answers.answer_mask[i].sum())
            discount = trainer.args.gamma * trainer.args.lam
            later = sum(discount ** (k - t) * products[i, k] * credit.rewards[i, k] for k in range(t, n))
            unweighted = sum(discount ** (k - t) * credit.rewards[i, k] for k in range(t, n))
            a = later - products[i, t] * (unweighted - credit.advantages[i, t])
            rho = np.exp(move)
            want = -min(rho * a, min(max(rho, 0.8), 1.2) * a)
            assert float(loss[i, t]) == pytest.approx(float(want), abs=1e-4)
        assert bool(said["clip_fraction"][answers.answer_mask].all()) == (move != 0)


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_weights_are_those_of_the_answers(tmp_path, kind, accumulation):
    """By NumPy from what was recorded while sampling; splitting the batch changes none of them."""
    trainer = make(
        kind, tmp_path, max_steps=1, epochs_per_rollout=1, minibatches_per_rollout=1, importance_cap=1.2,
        sample_table_rows=8, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        rollout_temperature=1.5, rollout_top_p=0.8, **MIXED,
    )  # fmt: skip
    trainer.train()
    (line,) = [line for line in logged(tmp_path) if "loss" in line]
    answers = trainer.newest.answers
    log_ratio = (given(answers.policy_logps) - given(answers.behaviour_logps)).double().numpy()
    mask = answers.answer_mask.numpy()
    whole = np.exp(np.cumsum(log_ratio, 1))[mask]
    w = np.minimum(whole, 1.2)
    want = {
        "weight_mean": w.mean(),
        "weight_max": whole.max(),
        "weight_truncated": (whole > 1.2).mean(),
        "effective_sample_size": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "cut_mass": answers.cut_mass.numpy()[mask].mean(),
    }
    assert want["weight_max"] > 1.3
    assert 0 < want["weight_truncated"] < 1
    assert want["cut_mass"] > 0.05
    assert {name: line[name] for name in want} == pytest.approx(want, rel=1e-4)
    assert line["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert line["kl"] == pytest.approx(0, abs=1e-6)  # of the student's own probabilities
    assert "weight_square" not in line


def test_the_logged_kl_is_that_of_the_students_own_tokens(tmp_path):
    """2,000 first tokens of a mixture against the KL of the whole distribution; without its weight it is far off."""
    k = 2000
    trainer = make("reinforce", tmp_path, n=1, per_device_train_batch_size=k, rollouts_per_prompt=k, max_new_tokens=1,
                   teacher_mix=0.5)  # fmt: skip
    perturb(trainer.policy, 0.2)
    answers = trainer.sample(0)
    evidence = trainer.evidence(answers)
    _, said = trainer.objective.over_batch(trainer.objective.annotate(answers, evidence), answers, evidence, trainer)
    prompt = prompt_ids(answers.examples[0].student_input)
    with torch.no_grad():
        pi, reference = (
            full_logits(policy.student, prompt, [0])[0][0].log_softmax(-1)
            for policy in (trainer.policy, trainer.reference)
        )
    kl = float((pi.exp() * (pi - reference)).sum())
    assert float(said["kl"]) == pytest.approx(kl, abs=0.05)
    assert abs(float(trainer.objective.kl(answers, evidence).mean()) - kl) > 0.2


def test_plain_rollouts_have_weight_1(tmp_path):
    make("ppo", tmp_path, max_steps=4).train()
    for line in (line for line in logged(tmp_path) if "loss" in line):
        assert [line["weight_mean"], line["weight_max"], line["effective_sample_size"]] == [1, 1, 1]
        assert line["weight_truncated"] == 0
        assert "cut_mass" not in line


def test_the_start_check_is_about_the_student_itself(tmp_path):
    """A teacher's share would lower the regret that is measured; lengths are of what later lines are compared with."""
    lines = []
    for share in (0.0, 0.9):
        folder = tmp_path / str(share)
        trainer = make("reinforce", folder, max_steps=1, weak_start="warn", teacher_mix=share, learning_rate=0.0)
        trainer.train()
        lines.append(next(line for line in logged(folder) if "start_regret" in line))
        assert lines[-1]["start_length"] == pytest.approx(float(trainer.sample(0).answer_mask.sum(1).double().mean()))
    assert lines[0]["start_regret"] == lines[1]["start_regret"]
    assert lines[0]["start_length"] != lines[1]["start_length"]


class Recorded:
    """A teacher that scores answers and cannot take part in them."""

    gives, model = SIGNAL, None

    def __init__(self):
        self.score = tiny_teacher().score


def test_a_share_needs_a_teacher_that_is_here(tmp_path):
    with pytest.raises(ConfigError, match=r"^teacher_mix = 0.3: .* give a local Teacher, or set it to 0$"):
        make("reinforce", tmp_path, teacher=Recorded(), **MIXED)
    make("reinforce", tmp_path, teacher=Recorded(), rollout_temperature=2.0)
