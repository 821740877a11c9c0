"""The loss of one minibatch and its gradient, against plain loops over full logits written from the formulas."""

import logging
import math
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from rlkd.records import Answers, Example, select_rows
from tiny import tiny_tokenizer
from tiny_runs import EOS, VALID, WORDS, assert_same, logged, make, student, tiny_teacher, weights


def full_logits(model, prompt, answer):
    """[T, V] logits of every answer position and the decoder states [T, D], one unpadded row."""
    decoder = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
    out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, output_hidden_states=True)
    return out.logits[0, :, :VALID], out.decoder_hidden_states[-1][0]


def prompt_ids(text):
    return tiny_tokenizer(WORDS)(text)["input_ids"]


def state_value(q, kind):
    if kind == "max":
        return q.max()
    if kind == "lse":
        return q.logsumexp(0)
    return (q.softmax(0) * q).sum()


class Row:
    """One answer with everything the credit needs, as Python numbers."""

    def __init__(self, trainer, minibatch, i, kl_coef=0.0):
        rollouts, args = minibatch.answers, trainer.args
        self.kl_coef = kl_coef
        self.example = rollouts.examples[i]
        self.n = int(rollouts.answer_mask[i].sum())
        self.answer = rollouts.answer_ids[i, : self.n].tolist()
        self.mu = rollouts.behaviour_logps[i, : self.n].tolist()
        self.prompt = prompt_ids(self.example.student_input)
        with torch.no_grad():
            self.q, _ = full_logits(trainer.teacher.lm.model, prompt_ids(self.example.teacher_inputs[0]), self.answer)
            reference, _ = full_logits(trainer.reference.student, self.prompt, self.answer)
            old, hidden = full_logits(trainer.policy.student, self.prompt, self.answer)
            head = trainer.policy.value_head
            self.old_values = [0.0] * self.n if head is None else head(hidden).squeeze(-1).tolist()
        self.reference_logps = reference.log_softmax(-1)
        self.reference = [float(self.reference_logps[t, a]) for t, a in enumerate(self.answer)]
        self.v = [float(state_value(q, args.reward_value)) for q in self.q]
        self.a = [float(q[a]) - v for q, a, v in zip(self.q, self.answer, self.v, strict=True)]
        self.expected = [float(old[t].softmax(0) @ self.q[t]) - self.v[t] for t in range(self.n)]
        self.log_prob_v = [v - float(q.logsumexp(0)) for q, v in zip(self.q, self.v, strict=True)]
        self.reward = list(self.a)
        if args.kl_in == "reward":
            kl = [m - r for m, r in zip(self.mu, self.reference, strict=True)]
            self.reward = [a - kl_coef * k for a, k in zip(self.a, kl, strict=True)]
        self.x = self.reward

    def to_go(self, args, t, w=None):
        """sum over k = t, t + K, t + 2K ... of (gamma lambda)^(k - t) w_k x_k."""
        w = w or [1.0] * self.n
        if args.length_normalised:
            later = range(t + 1, self.n)
            future = sum((args.gamma * args.lam) ** (k - t) * self.x[k] for k in later) / max(len(later), 1)
            return w[t] * self.x[t] + w[-1] * future
        return sum((args.gamma * args.lam) ** (k - t) * w[k] * self.x[k] for k in range(t, self.n, args.k_step))


def baselines(args, rows):
    """b_t of every row: what is taken from the credit (METHOD section 3)."""
    exact = args.one_step == "exact"
    out = []
    for row in rows:
        b = []
        others = [r for r in rows if r.example.id == row.example.id and r is not row]
        for t in range(row.n):
            if args.baseline == "critic":
                b.append(row.old_values[t] + (row.a[t] if exact else 0.0))
                continue
            immediate = row.a[t] if exact else 0.0
            if args.baseline == "none":
                b.append(immediate - row.log_prob_v[t])
            elif args.baseline == "teacher":
                b.append(immediate)
            elif args.baseline == "closed_form":
                b.append(immediate if exact else row.expected[t])
            else:
                rest = [r.to_go(args, t) - (r.a[t] if exact else 0.0) for r in others if t < r.n]
                b.append(immediate + sum(rest) / len(others))
        out.append(b)
    return out


def oracle_loss(trainer, rows, ppo):
    """The loss with the student as it is now; credit from the rollout-time numbers in `rows`."""
    args = trainer.args
    b = baselines(args, rows)
    adv = [[row.to_go(args, t) - b[i][t] for t in range(row.n)] for i, row in enumerate(rows)]
    mean, std = 0.0, 1.0
    if args.whiten_advantages:
        mean = statistics.fmean(x for row in adv for x in row)
        exact = args.one_step == "exact"
        whole = [x + (a if exact else 0.0) for i, row in enumerate(rows) for x, a in zip(adv[i], row.a, strict=True)]
        std = statistics.pstdev(whole)
    total, tokens = 0.0, sum(row.n for row in rows)
    for i, row in enumerate(rows):
        logits, hidden = full_logits(trainer.policy.student, row.prompt, row.answer)
        log_pi = logits.log_softmax(-1)
        ratio = [log_pi[t, a].exp().item() / math.exp(row.mu[t]) for t, a in enumerate(row.answer)]
        row_loss = 0.0
        weight = [1.0] * row.n
        if not ppo and args.importance_weight == "token":
            weight = [min(r, args.importance_cap) for r in ratio]
        if not ppo and args.importance_weight == "cumulative":
            weight = [min(math.prod(ratio[: t + 1]), args.importance_cap) for t in range(row.n)]
        for t, a in enumerate(row.answer):
            reached = 1.0
            if ppo:
                rho, credit = (log_pi[t, a] - row.mu[t]).exp(), (adv[i][t] - mean) / std
                clipped = rho.clamp(1 - args.clip_range, 1 + args.clip_range)
                loss = -torch.minimum(rho * credit, clipped * credit)
                if args.dual_clip is not None and credit < 0 and rho > args.dual_clip:
                    loss = torch.tensor(-args.dual_clip * credit)
            elif args.importance_weight == "cumulative":
                credit = (row.to_go(args, t, weight) - weight[t] * (b[i][t] + mean)) / std
                reached = 1.0 if t == 0 else weight[t - 1]
                loss = -credit * log_pi[t, a]
            else:
                loss = -weight[t] * (adv[i][t] - mean) / std * log_pi[t, a]
            if args.one_step == "exact":
                loss = loss - reached * ((log_pi[t].exp() @ row.q[t]) - row.v[t]) / std
            loss = loss + args.entropy_coef * (log_pi[t].exp() * log_pi[t]).sum()
            if args.kl_in == "loss" and args.kl_estimator == "k2":
                loss = loss + row.kl_coef * reached * ratio[t] * (log_pi[t, a] - row.reference[t]) ** 2 / 2
            elif args.kl_in == "loss":
                kl = (log_pi[t].exp() * (log_pi[t] - row.reference_logps[t])).sum()
                loss = loss + row.kl_coef * reached * kl
            if args.baseline == "critic":
                value = trainer.policy.value_head(hidden[t])[0]
                old, target = row.old_values[t], row.to_go(args, t) - (row.a[t] if args.one_step == "exact" else 0.0)
                clipped = old + (value - old).clamp(-args.value_clip_range, args.value_clip_range)
                loss = loss + args.value_coef * 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2)
            row_loss = row_loss + loss
        share = {"token_mean": 1 / tokens, "sequence_mean": 1 / (row.n * len(rows)), "sequence_sum": 1 / len(rows)}
        total = total + share[args.loss_reduction] * row_loss
    return total


def perturb(module, scale):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def check_ratios(trainer, rows):
    """The logged ratios are pi / mu: probabilities under the student over those when sampled."""
    ratios = []
    for row in rows:
        log_pi = full_logits(trainer.policy.student, row.prompt, row.answer)[0].detach().log_softmax(-1)
        ratios += [float(log_pi[t, a].exp()) / math.exp(row.mu[t]) for t, a in enumerate(row.answer)]
    found = {name: torch.stack(pairs).T for name, pairs in trainer._recorded.items()}
    means = {name: float(total.sum() / count.sum()) for name, (total, count) in found.items()}
    assert means["ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert means["ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    if "clip_fraction" in means:
        outside = sum(abs(r - 1) > trainer.args.clip_range for r in ratios)
        assert means["clip_fraction"] == pytest.approx(outside / len(ratios))
    if trainer.args.to_dict().get("dual_clip") is not None:
        above = sum(r > trainer.args.dual_clip for r in ratios)
        assert 0 < means["dual_clip_fraction"] <= above / len(ratios)  # those of negative advantage


def compare(trainer, *, ppo, drift=0.05):
    """Loss and gradient of the trainer and of the oracle where reference, behaviour policy and student all differ, and
    the weight of the KL penalty has moved.
    """
    trainer.current_gradient_accumulation_steps = 1
    if trainer.policy.value_head is not None:
        perturb(trainer.policy.value_head, 0.5)
    perturb(trainer.policy.student, 0.1)
    trainer.objective.kl_coef = 1.5 * trainer.args.kl_coef
    minibatch = next(trainer.experience())["minibatch"]
    rows = [Row(trainer, minibatch, i, trainer.objective.kl_coef) for i in range(len(minibatch.answers.examples))]
    assert len({row.n for row in rows}) > 1
    perturb(trainer.policy, drift)
    trainer._recorded.clear()
    losses, gradients = [], []
    for loss in (
        lambda: trainer.compute_loss(trainer.policy, {"minibatch": minibatch}),
        lambda: oracle_loss(trainer, rows, ppo),
    ):
        trainer.policy.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        gradients.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=2e-5, abs=1e-6)
    check_ratios(trainer, rows)
    scale = max(float(g.abs().max()) for g in gradients[1].values())
    assert scale > 1e-3
    for name in gradients[1]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=2e-5 * scale, msg=name)


BASELINES = ["teacher", "leave_one_out", "closed_form", "critic", "none"]
VARIANTS = [
    *({"baseline": b, "one_step": s, "lam": 0.7} for b in BASELINES for s in ("exact", "sampled")),
    {"baseline": "none", "reward_value": "lse", "lam": 1.0},
    {"reward_value": "softmax", "gamma": 0.9, "loss_reduction": "sequence_mean"},
    {"baseline": "critic", "kl_in": "reward", "kl_coef": 0.3, "entropy_coef": 0.2, "value_clip_range": 0.05},
    {"baseline": "leave_one_out", "one_step": "sampled", "whiten_advantages": True, "loss_reduction": "sequence_sum"},
    {"baseline": "critic", "whiten_advantages": True, "entropy_coef": 0.1, "kl_coef": 0.5},
    {"baseline": "leave_one_out", "whiten_advantages": True, "lam": 0.0},
    {"baseline": "teacher", "k_step": 2, "lam": 1.0, "kl_in": "reward", "kl_coef": 0.3},
    {"kl_estimator": "k2", "kl_coef": 0.5},
    *({"length_normalised": True, "baseline": b, "lam": 0.9} for b in ("leave_one_out", "critic")),
    {"length_normalised": True, "one_step": "sampled", "baseline": "closed_form", "lam": 1.0},
    {"kl_estimator": "exact", "kl_coef": 0.5, "one_step": "sampled", "baseline": "closed_form"},
]


def name(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize(
    "options", [*VARIANTS, {"dual_clip": 1.02, "baseline": "teacher", "one_step": "sampled"}], ids=name
)
def test_ppo_loss_and_gradient_equal_plain_loops(tmp_path, options):
    options = {"minibatches_per_rollout": 1, "clip_range": 0.1, **options}
    compare(make("ppo", tmp_path, **options), ppo=True)


@pytest.mark.parametrize("options", VARIANTS, ids=name)
def test_reinforce_loss_and_gradient_equal_plain_loops(tmp_path, options):
    compare(make("reinforce", tmp_path, importance_cap=1.2, **options), ppo=False)


@pytest.mark.parametrize("kind", ["none", "token"])
def test_reinforce_with_simpler_weights_equals_plain_loops(tmp_path, kind):
    compare(make("reinforce", tmp_path, importance_weight=kind, importance_cap=1.1, lam=1.0), ppo=False)


def test_one_pass_of_ppo_with_an_infinite_clip_is_reinforce(tmp_path):
    gradients = []
    for kind, options in (("ppo", {"clip_range": 1e9, "minibatches_per_rollout": 1}), ("reinforce", {})):
        trainer = make(kind, tmp_path, baseline="leave_one_out", **options)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.policy, next(trainer.experience())).backward()
        gradients.append([p.grad for p in trainer.policy.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_recorded_log_probabilities_are_those_of_the_first_update(tmp_path):
    trainer = make("ppo", tmp_path)
    minibatch = next(trainer.experience())["minibatch"]
    r = minibatch.answers
    with torch.no_grad():
        (logps, _), _ = trainer.policy(r.input_ids, r.input_mask, r.answer_ids, r.answer_mask)
    torch.testing.assert_close(logps, r.behaviour_logps, rtol=0, atol=1e-5)
    for i in range(len(r.examples)):
        row = Row(trainer, minibatch, i)
        exact, _ = full_logits(trainer.policy.student, row.prompt, row.answer)
        for t, token in enumerate(row.answer):
            assert row.mu[t] == pytest.approx(float(exact[t].detach().log_softmax(0)[token]), abs=1e-5)


def test_a_one_word_answer_trains_its_word(tmp_path):
    """Both tokens of [word, end] and the only token of a cut answer enter the loss with their own advantage."""
    trainer = make("ppo", tmp_path, kl_coef=0.0, one_step="sampled", baseline="teacher", n=16)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.annotate(trainer.sample(0))
    rollouts = batch.answers
    answer_ids = torch.zeros_like(rollouts.answer_ids)
    answer_ids[:, 0], answer_ids[:, 1] = 3, EOS
    mask = torch.zeros_like(rollouts.answer_mask)
    mask[:, :2] = True
    mask[0, 1] = False
    rollouts = replace(rollouts, answer_ids=answer_ids, answer_mask=mask, behaviour_logps=torch.zeros(mask.shape))
    with torch.no_grad():
        (logps, _), _ = trainer.policy(rollouts.input_ids, rollouts.input_mask, answer_ids, mask)
    rollouts = replace(rollouts, behaviour_logps=logps)
    for i, t in ((0, 0), (1, 0), (1, 1)):
        advantages = torch.zeros(mask.shape)
        advantages[i, t] = 1.0
        credit = replace(batch.annotations, advantages=advantages)
        changed = replace(batch, answers=rollouts, annotations=credit, denominator=1.0)
        loss = trainer.compute_loss(trainer.policy, {"minibatch": changed})
        assert loss.item() == pytest.approx(-1.0, abs=1e-5)


def test_cumulative_weights_are_unbiased_under_a_stale_policy(tmp_path):
    """Expectation over every answer of at most two tokens, drawn by another policy, against the true gradient."""
    trainer = make(
        "reinforce", tmp_path, baseline="teacher", lam=1.0, kl_coef=0.0, importance_cap=1e9, max_new_tokens=2,
        loss_reduction="sequence_sum", sync_every=2, one_step="exact",
    )  # fmt: skip
    perturb(trainer.policy, 0.3)
    trainer.current_gradient_accumulation_steps = 1
    words = [a for a in range(VALID) if a != EOS]
    answers = [(EOS,), *product(words, range(VALID))]
    example = Example("x", "a b", ("copy : a b",))
    prompt = prompt_ids(example.student_input)
    ids = torch.tensor([[*y, 0][:2] for y in answers])
    mask = torch.tensor([[True, len(y) == 2] for y in answers])

    def sequence_logp(model):
        return torch.stack(
            [full_logits(model, prompt, list(y))[0].log_softmax(-1)[range(len(y)), list(y)].sum() for y in answers]
        )

    teacher_logits = {
        y: full_logits(trainer.teacher.lm.model, prompt_ids(example.teacher_inputs[0]), list(y))[0].detach()
        for y in answers
    }
    returns = torch.tensor(
        [sum(float(q[t, a] - q[t].max()) for t, a in enumerate(y)) for y, q in teacher_logits.items()]
    )
    (sequence_logp(trainer.policy.student).exp() * -returns).sum().backward()
    truth = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])

    inputs = torch.tensor([prompt] * len(answers))
    given = (inputs, torch.ones_like(inputs).bool(), ids, mask)
    with torch.no_grad():
        (mu, _), _ = trainer.behaviour(*given)
        chance = sequence_logp(student()).exp()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-5)
    finished = torch.tensor([y[-1] == EOS for y in answers])
    rollouts = Answers([example] * len(answers), *given, mu, finished)
    minibatch = trainer.annotate(rollouts)
    trainer.policy.zero_grad()
    for i in range(len(answers)):
        row = replace(select_rows(minibatch, torch.tensor([i])), denominator=1.0)
        (chance[i] * trainer.compute_loss(trainer.policy, {"minibatch": row})).backward()
    got = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
    torch.testing.assert_close(got, truth, rtol=0, atol=2e-4 * float(truth.abs().max()))


def test_only_the_answer_of_the_policy_is_trained_not_the_teacher_or_the_reference(tmp_path):
    trainer = make("ppo", tmp_path, max_steps=4)
    frozen = [weights(trainer.teacher.lm.model), weights(trainer.reference)]
    trainer.train()
    for before, module in zip(frozen, (trainer.teacher.lm.model, trainer.reference), strict=True):
        assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_the_opd_recipe_is_the_reverse_kl_at_the_students_own_prefixes(tmp_path):
    """Loss and gradient of the shipped settings, against KL(pi || p) over the whole vocabulary from plain logits."""
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "opd_t0_to_t5.yaml").read_text())
    names = ("reward_value", "lam", "one_step", "entropy_coef", "kl_coef", "baseline")
    names += ("rollouts_per_prompt", "sync_every")
    trainer = make("reinforce", tmp_path, **{name: recipe[name] for name in names})
    trainer.current_gradient_accumulation_steps = 1
    perturb(trainer.policy, 0.3)
    minibatch = next(trainer.experience())["minibatch"]
    loss = trainer.compute_loss(trainer.policy, {"minibatch": minibatch})
    loss.backward()
    got = [p.grad.clone() for p in trainer.policy.parameters()]
    trainer.policy.zero_grad()
    terms = []
    for example, ids, mask in zip(
        minibatch.answers.examples, minibatch.answers.answer_ids, minibatch.answers.answer_mask, strict=True
    ):
        answer = ids[mask].tolist()
        log_pi = full_logits(trainer.policy.student, prompt_ids(example.student_input), answer)[0].log_softmax(-1)
        q = full_logits(trainer.teacher.lm.model, prompt_ids(example.teacher_inputs[0]), answer)[0].detach()
        terms.append((log_pi.exp() * (log_pi - q.log_softmax(-1))).sum(-1))
    want = torch.cat(terms).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for one, parameter in zip(got, trainer.policy.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


# The scale of whitened advantages


def scale_of(folder, **options):
    trainer = make("reinforce", folder, whiten_advantages=True, baseline="teacher", n=32, **options)
    return trainer.annotate(trainer.sample(0)).annotations.scale


def test_whitening_does_not_blow_up_the_exact_term_as_the_horizon_vanishes(tmp_path):
    """kl_coef and entropy_coef keep their weight: the scale is that of the sampled one-step term, near lam = 0 that of
    the reward itself.
    """
    rewards = make("reinforce", tmp_path, n=32)
    batch = rewards.annotate(rewards.sample(0))
    alone = 1 / float(batch.annotations.rewards[batch.answers.answer_mask].std(unbiased=False))
    for lam in (0.0, 1e-6, 0.1, 0.7):
        exact, sampled = (scale_of(tmp_path, lam=lam, one_step=kind) for kind in ("exact", "sampled"))
        assert exact == pytest.approx(sampled, rel=1e-5)
        if lam <= 1e-6:
            assert exact == pytest.approx(alone, rel=1e-4)
        assert alone / 3 < exact <= alone * 1.0001


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_credit_that_does_not_vary_is_left_as_it_is(tmp_path, kind, caplog, monkeypatch):
    """Divided by its deviation, it would multiply the exact term, and so the gradient, by its inverse."""
    monkeypatch.setattr("rlkd.trainers.policy_gradient.logger.propagate", True, raising=False)
    indifferent = tiny_teacher()  # to it all tokens are equally good
    with torch.no_grad():
        indifferent.lm.model.lm_head.weight.mul_(1e-6)
    options = {"baseline": "leave_one_out", "max_steps": 4, "teacher": indifferent}
    runs = [make(kind, tmp_path / str(whiten), **options, whiten_advantages=whiten) for whiten in (True, False)]
    with caplog.at_level(logging.WARNING):
        for run in runs:
            run.train()
    assert_same(weights(runs[0].trained), weights(runs[1].trained))
    said = [record.message for record in caplog.records if "too small to divide by" in record.message]
    assert len(said) == 1
    norms = [row["grad_norm"] for row in logged(tmp_path / "True") if "grad_norm" in row]
    assert max(norms) < 100
