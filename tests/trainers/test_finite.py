"""What is not finite stops the run before it reaches weights, optimizer or checkpoint, and leaves the batch behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tkd import make as make_tkd
from transformers import TrainerCallback

from rlkd.errors import DivergenceError, ModelError
from rlkd.models.loading import load_model
from rlkd.trainers.encoders.terms import TERMS
from tiny import save_pretrained, tiny_t5
from tiny_runs import assert_same, examples, make, tiny_teacher, weights

NAN, INF = float("nan"), float("inf")


def poison(module, value=NAN):
    with torch.no_grad():
        next(module.parameters())[0] = value


class Poisoned(TrainerCallback):
    """Weights that break after they were looked at, before the first step."""

    def __init__(self, module):
        self.module = module

    def on_train_begin(self, *args, **kwargs):
        poison(self.module)


class Before(TrainerCallback):
    """The weights at the start of the newest step."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, *_, model, **__):
        self.weights = weights(model)


def diverges(trainer, match):
    """Train until the error; weights are those before the step, and the batch is in the folder that the message
    names.
    """
    before = Before()
    trainer.add_callback(before)
    start = weights(trainer.trained)
    with pytest.raises(DivergenceError, match=match) as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    assert_same(before.weights or start, weights(trainer.trained))
    assert "learning_rate is 0.0" in str(caught.value)
    folder = trainer.run_folder / "diverged" / f"step-{trainer.state.global_step}"
    assert f"The batch is in {folder}." in str(caught.value)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    return load_file(folder / "batch.safetensors"), json.loads((folder / "batch.json").read_text()), str(caught.value)


def test_a_teacher_that_is_not_finite_leaves_the_rollouts(tmp_path):
    teacher = tiny_teacher()
    trainer = make("ppo", tmp_path, teacher=teacher, callbacks=[Poisoned(teacher.lm.model.decoder.final_layer_norm)])
    tensors, plain, message = diverges(trainer, "^step 0: the teacher's logits are not finite")
    assert "Its weights are torch.float32" in message
    assert tensors["answer_ids"].shape[0] == len(plain["ids"]) == len(plain["texts"]["answer_ids"]) == 16
    assert plain["examples"][0]["id"] == plain["ids"][0]
    assert plain["examples"][0]["teacher_inputs"][0].startswith("copy :")
    assert plain["problem"] in message


@pytest.mark.parametrize("part", ["behaviour_logps", "reward", "value"])
def test_numbers_of_a_rollout_batch(tmp_path, monkeypatch, part):
    trainer = make("ppo", tmp_path)
    if part == "value":
        with torch.no_grad():
            trainer.policy.value_head.bias.fill_(INF)
    elif part == "behaviour_logps":
        sample = trainer.sample

        def sampled(index):
            rollouts = sample(index)
            rollouts.behaviour_logps[3, 0] = -INF
            return rollouts

        trainer.sample = sampled
    else:
        score = trainer.teacher.score
        bad = {"max": None}

        def scored(*args, **options):
            scores = score(*args, **options)
            bad["max"] = scores.max.clone()
            bad["max"][5, 0] = INF  # chosen and logsumexp stay finite: only the reward shows it
            return replace(scores, max=bad["max"])

        monkeypatch.setattr(trainer.teacher, "score", scored)
    name = {"behaviour_logps": "student's log-probability", "reward": "reward", "value": "critic's value"}[part]
    tensors, plain, message = diverges(trainer, f"^step 0: the {name} is not finite")
    if part != "value":
        row = 3 if part == "behaviour_logps" else 5
        assert f"(rows {plain['ids'][row]})" in message
    assert len(tensors["behaviour_logps"]) == len(plain["ids"])


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
def test_only_the_bad_rows_are_named(tmp_path, kind):
    trainer = make(kind, tmp_path, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    row_loss, calls = trainer.row_loss, []

    def spoiled(minibatch):
        of_rows = row_loss(minibatch)

        def broken(rows, statistics, values):
            (logps, *more) = statistics
            if trainer.state.global_step == 2:
                calls.append(rows)
                if len(calls) == 2:
                    assert rows.start == 0
                    logps = logps * torch.ones_like(logps).index_fill_(0, torch.tensor(1), INF)
            return of_rows(rows, (logps, *more), values)

        return broken

    trainer.row_loss = spoiled
    tensors, plain, message = diverges(trainer, "^step 2: the (loss|log-ratio) is not finite")
    assert f"(rows {plain['ids'][1]})" in message
    assert len(plain["ids"]) == 4  # of the second micro-batch alone
    name = "answers.answer_ids"
    assert len(tensors[name]) == len(plain["texts"][name]) == 4
    assert set("".join(plain["texts"][name])) <= set("abcopy: <unk>")
    if kind != "supervised":
        assert {"annotations.advantages", "signal.chosen", "answers.behaviour_logps"} <= set(tensors)


@pytest.mark.parametrize("part", ["loss", "teacher"])
def test_tkd(tmp_path, monkeypatch, part):
    trainer = make_tkd(tmp_path, preset="kd")
    if part == "teacher":
        trainer.add_callback(Poisoned(trainer.teacher.classifier))
    else:
        term = TERMS["kd"]
        monkeypatch.setitem(TERMS, "kd", replace(term, loss=lambda batch: term.loss(batch) * NAN))
    tensors, plain, _ = diverges(trainer, f"^step 0: the {'teacher.s logits' if part == 'teacher' else 'loss'} is not")
    assert plain["ids"] == [str(i) for i in tensors["index"].tolist()]
    assert len(plain["texts"]["input_ids"]) == len(plain["ids"]) == 4


def test_a_gradient_that_overflows_names_all_rows_of_the_update(tmp_path):
    trainer = make("reinforce", tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    next(trainer.policy.parameters()).register_hook(lambda gradient: gradient * INF)
    with pytest.raises(DivergenceError, match=r"gradient is not finite \(rows (row \d, ){4}row \d and 3 more\)"):
        trainer.train()
    files = sorted(path.name for path in (tmp_path / "diverged" / "step-0").iterdir())
    assert files == [f"batch-{i}.{kind}" for i in (0, 1) for kind in ("json", "safetensors")]


def test_a_gradient_scaler_may_overflow(tmp_path, monkeypatch):
    trainer = make("reinforce", tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.accelerator, "scaler", object())
    trainer.finite.grad_norm = torch.tensor(INF)
    trainer.finite.on_pre_optimizer_step()
    monkeypatch.setattr(trainer.accelerator, "scaler", None)
    with pytest.raises(DivergenceError):
        trainer.finite.on_pre_optimizer_step()


def test_one_look_per_update(tmp_path, monkeypatch):
    trainer = make("reinforce", tmp_path, max_steps=3, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    looks, look = [], trainer.finite._look
    monkeypatch.setattr(trainer.finite, "_look", lambda norms: (looks.append(len(trainer.finite.watched)), look(norms)))
    trainer.train()
    assert looks == [4, 4, 4]
    assert trainer.finite.watched == []


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_no_checkpoint_and_no_student_is_saved(tmp_path, part):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make("supervised", tmp_path, **options)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                first = next(trainer.policy.parameters())
                spoiled = first if part == "weights" else trainer.optimizer.state[first]["exp_avg"]
                with torch.no_grad():
                    spoiled[0] = NAN

    trainer.add_callback(Spoil())
    with pytest.raises(DivergenceError, match=r"^step 4: weights or optimizer state are not finite, and are not saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(DivergenceError):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()
    # The run continues from the previous checkpoint.
    again = make("supervised", tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_weights_that_broke_in_an_update_are_found_in_the_next_rollout(tmp_path):
    trainer = make("reinforce", tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    annotate = trainer.annotate

    def spoiled(rollouts):
        if trainer.state.global_step == 1:
            poison(trainer.policy)
            rollouts = trainer.sample(1)
        return annotate(rollouts)

    trainer.annotate = spoiled
    with pytest.raises(DivergenceError, match=r"^step 1: the (student's|teacher's) log"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "checkpoint-1" / "model.safetensors").values())


def test_a_batch_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlkd.runs.finite.write_batch", full)
    trainer = make("supervised", tmp_path)
    trainer.add_callback(Poisoned(trainer.policy))
    with pytest.raises(DivergenceError, match=r"the loss is not finite.*could not be written to .*No space left"):
        trainer.train()


def test_evaluation_stops_too(tmp_path):
    trainer = make("reinforce", tmp_path, eval_examples=examples(4))
    poison(trainer.teacher.lm.model.decoder.final_layer_norm)
    with pytest.raises(DivergenceError, match=r"^step 0: the teacher's logits are not finite"):
        trainer.evaluate()


def test_float16_is_pointed_out(tmp_path):
    trainer = make("supervised", tmp_path)
    trainer.trained.student.half()
    with pytest.raises(DivergenceError, match=r"in float16, .*use bfloat16 or float32"):
        trainer.finite.check({"the loss": torch.tensor(NAN)}, ["row 1"], {})


@pytest.mark.multi
@pytest.mark.parametrize("where", ["loss", "teacher"])
def test_all_processes_stop_when_one_diverges(tmp_path, where):
    root, script = Path(__file__).parents[2], Path(__file__).with_name("diverging_process.py")
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(tmp_path), where], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    messages = [path.read_text() for path in sorted(tmp_path.glob("message-*.txt"))]
    assert len(messages) == 2, done.stderr[-3000:]
    assert all(message.startswith(("step 1: ", "another process")) for message in messages)
    assert "rows row " in messages[1] or "answers: row " in messages[1]
    assert (tmp_path / "diverged" / "step-1" / "batch-process-1.safetensors").exists()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", ["reinforce", "supervised", "tkd"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_never_used_are_looked_at_before_training(tmp_path, kind, role, value):
    """A row of the vocabulary that no text has would be found when the student is saved, and a teacher's never."""
    if kind == "tkd":
        trainer = make_tkd(tmp_path, preset="kd")
        model = trainer.teacher if role == "teacher" else trainer.trained.student
        weight, name = model.get_input_embeddings().weight, "bert.embeddings.word_embeddings.weight"
    else:
        trainer = make(kind, tmp_path)
        model = trainer.teacher.lm.model if role == "teacher" else trainer.policy.student
        weight, name = model.get_input_embeddings().weight, "shared.weight"
    with torch.no_grad():
        weight[-1, 2] = value
    message = rf"{role} .*: {name} holds values .*: 1 of {weight.numel()}, the first in row {len(weight) - 1}\."
    with pytest.raises(ModelError, match=message):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_that_is_not_finite_is_refused_when_it_is_loaded(tmp_path):
    model = tiny_t5()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.q.weight[3, 0] = INF
        model.shared.weight[-1] = NAN
    save_pretrained(tmp_path, model)
    message = r"^student '.*': shared.weight holds values .*: 16 of 608, the first in row 37, and 1 other tensors"
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), "student")
