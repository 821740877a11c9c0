"""The loop: how often, on what and from whom it learns."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from rlkd.errors import ConfigError, DivergenceError
from tiny_runs import EOS, assert_same, differ, examples, logged, make, student, tiny_teacher, weights


class Watch(TrainerCallback):
    """Keeps what a trainer does, in order."""

    def __init__(self):
        self.steps, self.seen, self.behaviour = 0, [], []

    def on_step_end(self, *_, **__):
        self.steps += 1


def watched(kind, folder, **options):
    """A trainer that records its micro-batches (step, rows) and rollout batches (index, behaviour, student)."""
    watch = Watch()
    trainer = make(kind, folder, callbacks=[watch], **options)
    compute_loss, sample = trainer.compute_loss, trainer.sample

    def seen(model, inputs, **extra):
        rollouts = inputs["minibatch"].answers
        pairs = zip(rollouts.examples, rollouts.answer_ids.tolist(), rollouts.answer_mask.tolist(), strict=True)
        watch.seen.append((watch.steps, [(e.id, tuple(a), sum(m)) for e, a, m in pairs]))
        return compute_loss(model, inputs, **extra)

    def sampled(index):
        watch.behaviour.append((index, weights(trainer.behaviour), weights(trainer.policy)))
        return sample(index)

    trainer.compute_loss, trainer.sample = seen, sampled
    return trainer, watch


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_row_is_used_once_per_epoch_and_no_step_is_added(tmp_path, accumulation):
    trainer, watch = watched(
        "ppo", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, n=16,
        epochs_per_rollout=3, minibatches_per_rollout=2, num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    rows = trainer.args.rows_per_rollout
    batches = 16 // (rows // 2)
    assert rows == 8 * accumulation
    assert watch.steps == trainer.state.global_step == 3 * 2 * batches
    assert [index for index, *_ in watch.behaviour] == list(range(batches))
    per_step = Counter()
    for step, seen in watch.seen:
        per_step[step] += len(seen)
    assert dict(per_step) == dict.fromkeys(range(watch.steps), 4 * accumulation)
    prompts = Counter()
    for batch in range(batches):
        passes = []
        for epoch in range(3):
            first = (batch * 3 + epoch) * 2
            cuts = [[row for s, seen in watch.seen if s == first + i for row in seen] for i in range(2)]
            passes.append(Counter(row for cut in cuts for row in cut))
            assert sum(passes[-1].values()) == rows
        assert passes[0] == passes[1] == passes[2]
        prompts.update(id for (id, *_), count in passes[0].items() for _ in range(count))
    assert prompts == {f"row {i}": 2 for i in range(16)}


def test_minibatches_are_drawn_again_each_epoch(tmp_path):
    trainer = make("ppo", tmp_path, epochs_per_rollout=4, minibatches_per_rollout=4, n=32)
    batch = trainer.annotate(trainer.sample(0))
    cuts = [[id(e) for e in m.answers.examples] for m in trainer.minibatches(batch, 0)]
    assert len(cuts) == 16
    assert len({tuple(sorted(cut)) for cut in cuts}) > 8


def test_first_update_is_on_policy_and_later_ones_are_not(tmp_path):
    make("ppo", tmp_path, epochs_per_rollout=2, minibatches_per_rollout=2, max_steps=8, learning_rate=2e-3).train()
    lines = [line for line in logged(tmp_path) if "ratio_mean" in line]
    assert len(lines) == 8
    for i, line in enumerate(lines):
        if i % 4 == 0:
            assert line["ratio_mean"] == pytest.approx(1, abs=1e-5)
            assert line["ratio_max"] == pytest.approx(1, abs=1e-4)
            assert line["clip_fraction"] == 0
        else:
            assert abs(line["ratio_max"] - 1) > 1e-3
    assert max(line["clip_fraction"] for line in lines) > 0


def test_answers_of_a_single_word_are_trained(tmp_path):
    trainer, watch = watched("reinforce", tmp_path, max_new_tokens=1, max_steps=2)
    before = weights(trainer.policy)
    trainer.train()
    answers = [row for _, seen in watch.seen for row in seen]
    assert all(length == 1 for *_, length in answers)
    assert any(answer[0] != EOS for _, answer, _ in answers)
    assert differ(before, weights(trainer.policy))


def test_behaviour_policy_lags_and_is_synchronised(tmp_path):
    trainer, watch = watched("reinforce", tmp_path, sync_every=3, max_steps=7, logging_steps=1)
    trainer.train()
    assert len(watch.behaviour) == 7
    for index, behaviour, policy in watch.behaviour:
        synced = watch.behaviour[index // 3 * 3]
        assert_same(behaviour, synced[2])
        assert differ(behaviour, policy) == (index % 3 > 0)
    ratios = [line["ratio_max"] for line in logged(tmp_path) if "ratio_max" in line]
    assert [ratio == pytest.approx(1, abs=1e-4) for ratio in ratios] == [i % 3 == 0 for i in range(7)]


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_accumulation_changes_nothing(tmp_path, kind, reduction):
    if kind == "supervised" and reduction != "token_mean":
        pytest.skip("supervised losses are means over tokens")
    options = {} if kind == "supervised" else {"loss_reduction": reduction, "whiten_advantages": True}
    if kind == "ppo":
        options["epochs_per_rollout"] = 1
    results = []
    for rows, accumulation in ((8, 1), (4, 2), (2, 4)):
        folder = tmp_path / str(accumulation)
        trainer = make(
            kind, folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=0.1, max_steps=2, max_grad_norm=0.5, n=16, **options,
        )  # fmt: skip
        before = weights(trainer.policy)
        trainer.train()
        assert differ(before, weights(trainer.policy))
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in logged(folder) if "loss" in line]
        results.append((weights(trainer.policy), lines))
    for other in results[1:]:
        assert_same(results[0][0], other[0], 1e-6)
        for one, two in zip(results[0][1], other[1], strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


TIMES = {"time", "rollout_seconds", "tokens_per_second", "epoch"}


def test_adaptive_kl_moves_after_the_batch_it_was_measured_on(tmp_path):
    make("ppo", tmp_path, kl_target=1e-4, kl_coef=0.1, max_steps=8).train()
    coefs = [line["kl_coef"] for line in logged(tmp_path) if "kl_coef" in line]
    kls = [line["kl"] for line in logged(tmp_path) if "kl" in line]
    assert coefs[0] == pytest.approx(0.1)
    expected = 0.1 * (1 + 0.1 * min(max(kls[0] / 1e-4 - 1, -0.2), 0.2))
    assert coefs[1] == pytest.approx(expected)
    trainer = make("ppo", tmp_path, kl_target=1e-4, kl_coef=0.1)
    minibatch = trainer.annotate(trainer.sample(0))
    assert minibatch.annotations.kl_coef == 0.1
    assert trainer.objective.kl_coef != 0.1


def test_too_few_prompts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes 16 prompts .* have 8"):
        make("reinforce", tmp_path, per_device_train_batch_size=32)


def poison(module):
    with torch.no_grad():
        next(module.parameters())[0] = float("nan")


@pytest.mark.parametrize("weak_start", ["warn", "ignore"])
def test_nan_in_the_teacher_stops_before_any_update(tmp_path, weak_start):
    teacher = tiny_teacher()
    trainer = make("ppo", tmp_path, teacher=teacher, weak_start=weak_start)
    begin = trainer.begin_run

    def poisoned(checkpoint):  # after the weights were looked at
        begin(checkpoint)
        poison(teacher.lm.model.decoder.final_layer_norm)

    trainer.begin_run = poisoned
    before = weights(trainer.policy)
    with pytest.raises(DivergenceError, match=r"^step 0: the teacher's logits are not finite .* row \d"):
        trainer.train()
    assert_same(before, weights(trainer.policy))


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
def test_nan_loss_stops_before_the_update(tmp_path, kind):
    trainer = make(kind, tmp_path, max_steps=4)
    forward = trainer.policy.forward
    kept = []

    def broken(*args, **kwargs):
        (logps, *more), values = forward(*args, **kwargs)
        if trainer.state.global_step == 2 and logps.requires_grad:
            kept.append(weights(trainer.policy))
            logps = logps * float("nan")
        return (logps, *more), values

    trainer.policy.forward = broken
    with pytest.raises(DivergenceError, match=r"^step 2: the (loss|log-ratio) is not finite \(rows row \d"):
        trainer.train()
    assert_same(kept[0], weights(trainer.policy))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_gradient_of_a_finite_loss_stops_before_the_update(tmp_path, accumulation):
    trainer = make("reinforce", tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=4)
    next(trainer.policy.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    before = weights(trainer.policy)
    with pytest.raises(DivergenceError, match=r"^step 0: the gradient is not finite \(rows row"):
        trainer.train()
    assert_same(before, weights(trainer.policy))


def expected_start(trainer):
    """Start numbers from full logits, answer by answer."""
    rollouts, model = trainer.sample(0), trainer.teacher.lm.model
    regrets, gaps, lengths = [], [], []
    for i, example in enumerate(rollouts.examples):
        answer = rollouts.answer_ids[i, rollouts.answer_mask[i]].tolist()
        prompt = trainer.tokenizer(example.teacher_inputs[0])["input_ids"]
        with torch.no_grad():
            decoder = torch.tensor([[0, *answer[:-1]]])
            q = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[
                0, :, : trainer.policy.lm.valid_vocab
            ]
        regrets.append(sum(float(q[t].max() - q[t, a]) for t, a in enumerate(answer)))
        gaps += [float(q[t].max() - q[t, EOS]) for t, a in enumerate(answer) if a != EOS]
        lengths.append(len(answer))
    n = len(regrets)
    return {
        "start_regret": sum(regrets) / n,
        "start_eos_price": sum(gaps) / len(gaps),
        "start_length": sum(lengths) / n,
        "start_finish_rate": float(rollouts.finished.float().mean()),
    }


def test_start_numbers_equal_a_count_by_hand(tmp_path):
    trainer = make("reinforce", tmp_path, weak_start="warn", max_steps=1)
    expected = expected_start(trainer)
    trainer.train()
    (start,) = [line for line in logged(tmp_path) if "start_regret" in line]
    assert {k: start[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_weak_start_warns_refuses_or_is_ignored(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rlkd.trainers.start.logger.propagate", True)
    make("reinforce", tmp_path / "warn", weak_start="warn", max_steps=1).train()
    assert "weak start" in caplog.text
    trainer = make("reinforce", tmp_path / "refuse", weak_start="refuse", max_steps=1)
    before = weights(trainer.policy)
    with pytest.raises(ConfigError, match=r"weak start.*lam = 0.2.*refuse"):
        trainer.train()
    assert_same(before, weights(trainer.policy))
    caplog.clear()
    make("reinforce", tmp_path / "ignore", max_steps=1).train()
    assert "weak start" not in caplog.text
    assert not any("start_regret" in line for line in logged(tmp_path / "ignore"))
    # Without a horizon there is no shortcut to learn.
    make("reinforce", tmp_path / "immediate", weak_start="refuse", lam=0.0, max_steps=1).train()
    assert any("start_regret" in line for line in logged(tmp_path / "immediate"))


def test_a_strong_start_is_silent(tmp_path, caplog):
    # The student is the teacher sharpened until its samples are the teacher's greedy answers.
    teacher = tiny_teacher()
    twin = copy.deepcopy(teacher.lm.model).requires_grad_()
    with torch.no_grad():
        twin.lm_head.weight.mul_(50)
    data = [replace(e, student_input=e.teacher_inputs[0]) for e in examples()]
    trainer = make("reinforce", tmp_path, model=twin, teacher=teacher, data=data, weak_start="refuse", max_steps=1)
    expected = expected_start(trainer)
    assert expected["start_regret"] <= 0.5 * expected["start_eos_price"]
    trainer.train()
    assert "weak start" not in caplog.text


def test_untouched_files_outside_the_run_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    make("ppo", tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4).train()
    assert list((tmp_path / "cwd").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "run"]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        # Plain descent: Adam would make whole steps of the rounding errors of a gradient that is 0.
        options = {"gradient_checkpointing": on, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        trainer = make("ppo", tmp_path / str(on), model=student(), **options)
        before = weights(trainer.policy)
        trainer.train()
        results.append(weights(trainer.policy))
    assert max(float((results[0][name] - start).abs().max()) for name, start in before.items()) > 1e-3
    assert_same(results[0], results[1], 1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        (
            "reinforce", {"max_steps": 6},
            "a rollout batch is 8 answers to 4 prompts, for 1 update; this run of 6 updates sees 24 prompts, 3 epochs "
            "of 8",
        ),
        (
            "ppo", {"num_train_epochs": 3, "max_steps": -1},
            "a rollout batch is 16 answers to 8 prompts, for 4 updates; this run of 12 updates sees 24 prompts, 3 "
            "epochs of 8",
        ),
        (
            "supervised", {"max_steps": 6, "n": 16, "gradient_accumulation_steps": 2},
            "an update is on 16 rows; this run of 6 updates sees 96 rows, 6 epochs of 16",
        ),
    ],
)  # fmt: skip
def test_the_first_lines_say_what_a_run_sees(tmp_path, capsys, kind, options, line):
    """Counted from what the trainer samples or reads, whatever the units of its settings."""
    trainer = make(kind, tmp_path, **options, save_strategy="steps", save_steps=4)
    seen = []
    if kind == "supervised":
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: (seen.extend(rows), collate(rows))[1]
    else:
        prompts = trainer.prompts
        trainer.prompts = lambda index: (seen.extend(found := prompts(index)), found)[1]
    trainer.run()
    said = capsys.readouterr().out
    assert said.splitlines()[0] == line
    assert f"sees {len(seen)} " in line
    again = make(kind, tmp_path, **options, save_strategy="steps", save_steps=4, resume_from_checkpoint="auto")
    again.run()
    total = trainer.state.max_steps
    assert capsys.readouterr().out.startswith(
        f"resuming from {tmp_path / f'checkpoint-{total}'}: step {total} of {total}, "
    )
