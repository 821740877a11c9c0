"""Pseudo-labels in on-policy training: GKD, whose answers are labels now and then, and the imitation term of RL."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_losses import full_logits, prompt_ids

from rlkd.errors import ConfigError, DataError
from rlkd.jobs.setup import DataArguments, TeacherArguments, prepare
from rlkd.settings.trl_compat import ModelConfig
from rlkd.trainers.arguments import GKDArguments, ReinforceArguments, SupervisedArguments
from tiny import tiny_bart
from tiny_runs import PADDED, assert_same, differ, examples, labels, logged, make, tiny_teacher, weights


def gradients(trainer, minibatch):
    """The gradient of the loss of one minibatch, by parameter."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.policy.zero_grad()
    trainer.compute_loss(trainer.policy, {"minibatch": minibatch}).backward()
    return {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}


def first(trainer):
    return next(trainer.experience())["minibatch"]


# GKD


@pytest.mark.parametrize("objective", ["forward_kl", "jensen_shannon", "alpha_beta", "best_token"])
def test_with_no_answers_of_the_student_gkd_is_supervised_distillation(tmp_path, objective):
    gkd = make("gkd", tmp_path / "gkd", objective=objective, on_policy_fraction=0.0, labels=labels())
    supervised = make("supervised", tmp_path / "supervised", objective=objective)
    got = gradients(gkd, first(gkd))
    supervised.compute_loss(supervised.policy, supervised.data_collator(labels())).backward()
    want = {name: p.grad for name, p in supervised.policy.named_parameters()}
    assert max(float(g.abs().max()) for g in want.values()) > 1e-3
    assert_same(got, want, 1e-6)


def test_with_its_own_answers_alone_gkd_is_exact_on_policy_distillation(tmp_path):
    """The same answers, and the gradient of the settings of recipes/opd_t0_to_t5.yaml."""
    gkd = make("gkd", tmp_path / "gkd", objective="reverse_kl", on_policy_fraction=1.0, rollouts_per_prompt=1)
    settings = {"reward_value": "lse", "lam": 0.0, "entropy_coef": 1.0, "kl_coef": 0.0, "baseline": "teacher"}
    opd = make("reinforce", tmp_path / "opd", rollouts_per_prompt=1, **settings)
    batches = [first(trainer) for trainer in (gkd, opd)]
    assert torch.equal(batches[0].answers.answer_ids, batches[1].answers.answer_ids)
    assert_same(gradients(gkd, batches[0]), gradients(opd, batches[1]), 1e-6)


def test_forward_kl_at_the_students_own_prefixes_equals_full_logits(tmp_path):
    """Answers are data: no gradient goes through their sampling."""
    trainer = make("gkd", tmp_path, objective="forward_kl")
    minibatch = first(trainer)
    got = gradients(trainer, minibatch)
    answers, terms = minibatch.answers, []
    for example, ids, mask in zip(answers.examples, answers.answer_ids, answers.answer_mask, strict=True):
        answer = ids[mask].tolist()
        log_pi = full_logits(trainer.policy.student, prompt_ids(example.student_input), answer)[0].log_softmax(-1)
        q = full_logits(trainer.teacher.lm.model, prompt_ids(example.teacher_inputs[0]), answer)[0].detach()
        terms.append((q.softmax(-1) * (q.log_softmax(-1) - log_pi)).sum(-1))
    trainer.policy.zero_grad()
    torch.cat(terms).mean().backward()
    assert_same(got, {name: p.grad for name, p in trainer.policy.named_parameters()}, 1e-6)


def test_whose_answers_a_batch_has_is_drawn_from_the_seed_and_its_number(tmp_path):
    def draws(**options):
        trainer = make("gkd", tmp_path, labels=labels(), **options)
        return [trainer.on_policy(i) for i in range(400)]

    mixed = draws(on_policy_fraction=0.3)
    assert mixed == draws(on_policy_fraction=0.3)
    assert mixed != draws(on_policy_fraction=0.3, seed=7)
    assert sum(mixed) / 400 == pytest.approx(0.3, abs=0.07)  # 3 standard errors
    assert not any(draws(on_policy_fraction=0.0))


def test_a_run_says_and_logs_whose_answers_it_learned_from(tmp_path, capsys):
    trainer = make("gkd", tmp_path, on_policy_fraction=0.5, labels=labels(), max_steps=8, eval_examples=examples(3))
    trainer.run()
    assert "; 50% of the batches, drawn, are the student's answers, the others are labels" in capsys.readouterr().out
    lines = [line for line in logged(tmp_path) if "loss" in line]
    assert [line["on_policy"] for line in lines] == [float(trainer.on_policy(i)) for i in range(8)]
    assert {line["on_policy"] for line in lines} == {0.0, 1.0}
    # Labels are not the student's: their length and end say nothing about it.
    assert all(("length" in line) == ("finish_rate" in line) == ("ratio_max" in line) for line in lines)
    assert [float("length" in line) for line in lines] == [line["on_policy"] for line in lines]
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["data"]["train"]["rows"], record["data"]["labels"]["rows"]) == (8, 8)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_reverse_kl", "alpha_beta"])
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_student_that_is_the_teacher_learns_nothing(tmp_path, objective, fraction):
    teacher = tiny_teacher()
    twin = copy.deepcopy(teacher.lm.model).requires_grad_()
    same = [replace(e, teacher_inputs=(e.student_input,)) for e in examples()]
    rows = [{**row, "teacher_input": row["student_input"]} for row in labels()]
    options = {"objective": objective, "on_policy_fraction": fraction, "rollouts_per_prompt": 1}
    given = {} if fraction else {"labels": rows}
    trainer = make("gkd", tmp_path, model=twin, teacher=teacher, data=same, **given, **options)
    found = gradients(trainer, first(trainer))
    assert max(float(g.abs().max()) for g in found.values()) < 1e-6


def test_gkd_of_another_family(tmp_path):
    """BART, with its own start token and bias."""
    trainer = make("gkd", tmp_path, model=tiny_bart(vocab=PADDED), on_policy_fraction=0.5, labels=labels(), max_steps=4)
    before = weights(trainer.policy)
    trainer.train()
    assert differ(before, weights(trainer.policy))


# The imitation term


RL = [
    ("reinforce", {}),
    ("reinforce", {"one_step": "sampled", "loss_reduction": "sequence_mean"}),
    ("ppo", {"minibatches_per_rollout": 1}),
]


@pytest.mark.parametrize(("kind", "options"), RL)
def test_the_gradient_is_that_of_rl_plus_c_times_that_of_seqkd(tmp_path, kind, options):
    c = 0.7
    both = make(kind, tmp_path / "both", imitation_coef=c, labels=labels(), **options)
    plain = make(kind, tmp_path / "plain", **options)
    seqkd = make("supervised", tmp_path / "seqkd")
    got, rl = gradients(both, first(both)), gradients(plain, first(plain))
    seqkd.compute_loss(seqkd.policy, seqkd.data_collator(labels())).backward()
    imitated = {name: p.grad for name, p in seqkd.policy.named_parameters()}
    assert max(float(g.abs().max()) for g in imitated.values()) > 1e-2
    want = {name: g + c * imitated[name] if name in imitated else g for name, g in rl.items()}
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reinforce", {"imitation_coef": 0.5}),
        pytest.param(
            "ppo",
            {"imitation_coef": 0.5, "epochs_per_rollout": 1, "minibatches_per_rollout": 1},
            marks=pytest.mark.slow,
        ),
        ("gkd", {"on_policy_fraction": 0.5, "rollouts_per_prompt": 1}),
    ],
)
def test_accumulation_changes_nothing(tmp_path, kind, options):
    """Labels of unequal length, so that a mean of means would be another number."""
    results = []
    for accumulation in (1, 2, 4, 8):
        folder = tmp_path / str(accumulation)
        trainer = make(
            kind, folder, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=0.1, max_steps=2, labels=labels(5), **options,
        )  # fmt: skip
        if kind == "gkd":
            assert {trainer.on_policy(0), trainer.on_policy(1)} == {True, False}
        trainer.train()
        loss = [line["loss"] for line in logged(folder) if "loss" in line]
        results.append((weights(trainer.policy), loss))
    for other in results[1:]:
        assert_same(results[0][0], other[0], 1e-6)
        assert other[1] == pytest.approx(results[0][1], rel=1e-5)


def test_every_pass_over_the_labels_has_each_once(tmp_path):
    """PPO takes new labels for each of its updates; passes are shuffled anew, and batches cross their ends."""
    trainer = make("ppo", tmp_path, imitation_coef=0.1, labels=labels(6), per_device_train_batch_size=4)
    batches = [trainer.label_batches.batch(i, 4, 0, 1).ids for i in range(6)]
    experience = trainer.experience()
    for batch in batches[:4]:  # the updates of the first rollout batch
        imitated = next(experience)["minibatch"].imitation.labels
        assert sorted(imitated.ids) == sorted(batch)
    seen = [name for batch in batches for name in batch]
    passes = [seen[i : i + 6] for i in range(0, 24, 6)]
    for one in passes:
        assert sorted(one) == [f"row {i}" for i in range(6)]
    assert passes[0] != passes[1]


def test_two_processes_share_the_rows_of_one(tmp_path):
    trainer = make("ppo", tmp_path, imitation_coef=0.1, labels=labels(7))
    for index in range(4):
        whole = trainer.label_batches.batch(index, 4, 0, 1).ids
        assert [i for process in (0, 1) for i in trainer.label_batches.batch(index, 2, process, 2).ids] == whole


def test_a_run_says_what_it_imitates(tmp_path, capsys):
    trainer = make("reinforce", tmp_path, imitation_coef=0.5, labels=labels(6), max_steps=2)
    trainer.run()
    assert capsys.readouterr().out.splitlines()[0].endswith("; every update also imitates 8 of 6 labels")
    assert all(line["imitation_loss"] > 0 for line in logged(tmp_path) if "loss" in line)


def test_other_labels_are_another_run(tmp_path):
    def build(rows):
        return make(
            "reinforce", tmp_path, imitation_coef=0.5, labels=rows, max_steps=2, save_strategy="steps", save_steps=1
        )

    build(labels()).train()
    with pytest.raises(ConfigError, match=r"data.labels: 8 rows .* -> 6 rows"):
        build(labels(6)).train(resume_from_checkpoint="auto")


# What is refused


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gkd", {"on_policy_fraction": 0.5}, r"^labels is not set, .* \(on_policy_fraction = 0.5\)"),
        ("gkd", {"labels": labels()}, r"^labels is set, but .* \(on_policy_fraction = 1\)"),
        ("reinforce", {"imitation_coef": 0.5}, r"^labels is not set, .* \(imitation_coef = 0.5\)"),
        ("ppo", {"labels": labels()}, r"^labels is set, but .*, or change imitation_coef$"),
    ],
)
def test_labels_that_are_missing_or_have_no_effect_are_refused(tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make(kind, tmp_path, **options)


@pytest.mark.parametrize(
    ("training", "folder", "message"),
    [
        (SupervisedArguments, None, r"^pseudo_labels is not set, and the trainer learns from them: name a folder"),
        (
            partial(GKDArguments, on_policy_fraction=0.5),
            None,
            r"^pseudo_labels is not set.*\(on_policy_fraction = 0.5\)",
        ),
        (
            ReinforceArguments,
            "labels",
            r"^pseudo_labels is set, but .* \(imitation_coef = 0\): leave it out, or change",
        ),
    ],
)
def test_recipes_refuse_them_before_anything_is_read(tmp_path, training, folder, message):
    data, args = DataArguments("no such data", "text", pseudo_labels=folder), training(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        prepare(data, TeacherArguments(), ModelConfig("no such student"), args)


def test_rows_that_are_no_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="labels: 'label' is not text"):
        make("gkd", tmp_path, on_policy_fraction=0.5, labels=[{"student_input": "a", "label": None}])
    unprompted = [{name: row[name] for name in ("student_input", "label")} for row in labels()]
    with pytest.raises(DataError, match="labels: 'teacher_input' is not text in 8 rows"):
        make("gkd", tmp_path, on_policy_fraction=0.5, labels=unprompted)
    with pytest.raises(DataError, match="train_dataset: 'teacher_input' is not text in 8 rows"):
        make("supervised", tmp_path, objective="forward_kl", data=unprompted)
    make("reinforce", tmp_path, imitation_coef=0.5, labels=unprompted)


def test_settings_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match=r"on_policy_fraction = 1.5: must be at least 0 and at most 1"):
        GKDArguments(output_dir=str(tmp_path), on_policy_fraction=1.5)
    with pytest.raises(ConfigError, match=r"imitation_coef = -1: must be at least 0"):
        ReinforceArguments(output_dir=str(tmp_path), imitation_coef=-1)
    with pytest.raises(ConfigError, match=r"objective = 'sequence': allowed are"):
        GKDArguments(output_dir=str(tmp_path), objective="sequence")
    with pytest.raises(ConfigError, match=r"beta = 0.3: objective = 'forward_kl' does not take it"):
        GKDArguments(output_dir=str(tmp_path), objective="forward_kl", beta=0.3)
