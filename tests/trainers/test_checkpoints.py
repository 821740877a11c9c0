"""What is saved, and that a resumed run is the run that was interrupted."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from transformers import AutoModelForSeq2SeqLM
from transformers.trainer_utils import get_last_checkpoint

from rlkd.errors import CheckpointError
from rlkd.runs.checkpoints import STATE_FILE
from rlkd.trainers.on_policy import BEHAVIOUR_FILE
from tiny_runs import EOS, assert_same, differ, examples, logged, make, student, weights

TIMES = {"time", "rollout_seconds", "tokens_per_second", "eval_seconds"}

RUNS = {
    "ppo": ("ppo", {"kl_target": 0.01, "max_steps": 8, "save_steps": 4}),
    "ppo behind": ("ppo", {"sync_every": 3, "max_steps": 16, "save_steps": 4}),
    "ppo warm-up": (
        "ppo",
        {"value_warmup_updates": 6, "value_learning_rate": 0.05, "max_steps": 12, "save_steps": 4, "weight_decay": 0.1},
    ),
    "reinforce": ("reinforce", {"max_steps": 5, "save_steps": 3}),
    "reinforce behind": ("reinforce", {"sync_every": 3, "max_steps": 7, "save_steps": 2}),
    "ppo, a share of the teacher": ("ppo", {"teacher_mix": 0.3, "max_steps": 8, "save_steps": 4}),
    "reinforce behind, a share of the teacher": (
        "reinforce",
        {"teacher_mix": 0.3, "rollout_temperature": 1.5, "rollout_top_p": 0.9, "sync_every": 2, "max_steps": 5,
         "save_steps": 3},
    ),
    "task reward": ("ppo", {"max_steps": 8, "save_steps": 4, "task_reward": "rouge1", "task_reward_coef": 0.01}),
    "accumulation": (
        "reinforce",
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 5, "save_steps": 3},
    ),
    "supervised": ("supervised", {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 2}),
    "divergence": ("supervised", {"max_steps": 5, "save_steps": 3, "objective": "reverse_kl"}),
}  # fmt: skip


def lines(folder, after):
    rows = [row for row in logged(folder) if row["step"] > after]
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("train_")} for row in rows]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_run(tmp_path, name):
    kind, options = RUNS[name]
    options = {**options, "save_strategy": "steps", "n": 12}
    straight = make(kind, tmp_path / "straight", **options)
    straight.train()
    for step in range(options["save_steps"], options["max_steps"], options["save_steps"]):
        folder = tmp_path / f"resumed {step}"
        checkpoint = tmp_path / "straight" / f"checkpoint-{step}"
        resumed = make(kind, folder, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == options["max_steps"]
        assert_same(weights(straight.policy), weights(resumed.policy))
        assert lines(folder, step) == lines(tmp_path / "straight", step)
        if kind != "supervised":
            assert_same(weights(resumed.reference), weights(straight.reference))
            assert_same(weights(resumed.reference.student), weights(student()))
            assert resumed.objective.state() == straight.objective.state()
            behind = (step // resumed.args.updates_per_rollout) % resumed.args.sync_every > 0
            assert (checkpoint / BEHAVIOUR_FILE).exists() == behind


def test_epochs_end_where_they_would_have_ended(tmp_path):
    """Resuming in the middle of an epoch shifts neither evaluations nor the checkpoints of later epochs."""
    options = {"num_train_epochs": 2, "n": 12, "eval_strategy": "epoch", "eval_examples": examples(4)}
    first = make("reinforce", tmp_path / "one", **options, save_strategy="steps", save_steps=2)
    first.train()
    assert first.state.global_step == 6
    second = make("reinforce", tmp_path / "two", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    steps = [[row["step"] for row in logged(tmp_path / run) if "eval_regret" in row] for run in ("one", "two")]
    assert steps == [[3, 6], [3, 6]]
    assert_same(weights(first.policy), weights(second.policy))


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    make("ppo", tmp_path, **{**options, "max_steps": 4}).train()
    trainer = make("ppo", tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-8")


def checkpoint(folder, kind="ppo", **options):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, **options}
    make(kind, folder, **options).train()
    return folder / "checkpoint-4"


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "one", "reinforce")
    for kind in ("ppo", "supervised"):
        trainer = make(kind, tmp_path / kind, max_steps=8)
        before = weights(trainer.policy)
        with pytest.raises(CheckpointError, match="written by ReinforceTrainer, not by"):
            trainer.train(resume_from_checkpoint=str(folder))
        assert_same(before, weights(trainer.policy))


@pytest.mark.parametrize("file", [STATE_FILE, "value_head.safetensors", BEHAVIOUR_FILE, "model.safetensors"])
def test_an_incomplete_checkpoint_is_an_error(tmp_path, file):
    options = {"sync_every": 2, "max_steps": 4}
    folder = checkpoint(tmp_path / "one", **options)
    (folder / file).unlink()
    trainer = make("ppo", tmp_path / "two", **{**options, "max_steps": 8})
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_turning_synchronisation_off_or_on_at_resume_starts_from_the_student(tmp_path):
    folder = checkpoint(tmp_path / "one")
    trainer = make("ppo", tmp_path / "two", sync_every=4)
    trainer._load_from_checkpoint(str(folder))
    assert_same(weights(trainer.behaviour), weights(trainer.policy))
    assert differ(weights(trainer.behaviour), weights(trainer.reference))
    behind = checkpoint(tmp_path / "three", sync_every=2)
    trainer = make("ppo", tmp_path / "four")
    trainer._load_from_checkpoint(str(behind))
    assert trainer.behaviour is trainer.policy


def loads_as_plain_model(folder):
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
def test_saved_students_and_checkpoints_are_plain_models(tmp_path, kind, tied):
    model = student(tied=tied)
    trainer = make(kind, tmp_path, model=model, max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[3, 4, EOS]])
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded = loads_as_plain_model(folder)
        torch.testing.assert_close(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=0, atol=0)
        tensors = load_file(folder / "model.safetensors")
        assert not any("value_head" in name or name.startswith("student.") for name in tensors)
        assert ("lm_head.weight" in tensors) == (not tied)
    assert (tmp_path / "checkpoint-4" / "value_head.safetensors").exists() == (kind == "ppo")
    assert not (tmp_path / "value_head.safetensors").exists()
    assert not (tmp_path / STATE_FILE).exists()
    assert (tmp_path / "tokenizer.json").exists()


def test_the_best_model_comes_back_at_the_end(tmp_path):
    trainer = make(
        "reinforce", tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        eval_examples=examples(4), load_best_model_at_end=True, metric_for_best_model="regret", greater_is_better=False,
        learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    regrets = {row["step"]: row["eval_regret"] for row in logged(tmp_path) if "eval_regret" in row}
    best = min(regrets, key=regrets.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept = loads_as_plain_model(tmp_path / f"checkpoint-{best}")
    assert_same(weights(trainer.policy.student), weights(kept))


def lora():
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], lora_dropout=0.0)
    return get_peft_model(student(), config)


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "supervised"])
def test_lora_trains_saves_and_resumes_its_adapter_only(tmp_path, kind):
    torch.manual_seed(0)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    if kind == "reinforce":
        options["sync_every"] = 3
    model = lora()
    start = weights(model)
    straight = make(kind, tmp_path / "one", model=model, **options)
    straight.train()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(start[name], tensor)}
    assert changed
    assert all("lora_" in name for name in changed)
    folder = tmp_path / "one" / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    torch.manual_seed(0)
    resumed = make(kind, tmp_path / "two", model=lora(), **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(weights(straight.policy), weights(resumed.policy))


def test_copies_share_what_lora_does_not_train(tmp_path):
    trainer = make("reinforce", tmp_path, model=lora(), sync_every=2)
    own = {name: p.data_ptr() for name, p in trainer.policy.named_parameters()}
    for copied in (trainer.reference, trainer.behaviour):
        for name, parameter in copied.named_parameters():
            assert (parameter.data_ptr() == own[name]) == ("lora_" not in name)
            assert not parameter.requires_grad


def test_patience_continues_after_a_resume(tmp_path):
    """A student that learns nothing: the second evaluation without a better one is at step 3, resumed or not."""
    options = {
        "dev": labelled_rows(4), "learning_rate": 0.0, "max_steps": 6, "early_stopping_patience": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"), **dict.fromkeys(("eval_steps", "save_steps"), 1),
    }  # fmt: skip
    straight, resumed = (make_tkd(tmp_path / name, **options) for name in ("straight", "resumed"))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert (straight.state.global_step, resumed.state.global_step) == (3, 3)


def test_a_run_saved_without_resume_state_cannot_be_resumed(tmp_path):
    make("ppo", tmp_path, max_steps=4, save_strategy="steps", save_steps=4, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-4" / STATE_FILE).exists()
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}: with save_only_model"):
        make("ppo", tmp_path / "two").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_state_is_json_that_names_its_trainer(tmp_path):
    folder = checkpoint(tmp_path)
    state = json.loads((folder / STATE_FILE).read_text())
    size = state.pop("logs")["metrics.jsonl"]
    assert state == {
        "trainer": "PPOTrainer",
        "processes": 1,
        "micro_batches": 1,
        "kl_coef": 0.05,
        "behaviour_lags": False,
    }
    assert [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_bytes()[:size].splitlines())] == [
        1,
        2,
        3,
        4,
    ]
    copied = tmp_path / "moved"
    shutil.copytree(folder, copied)
    trainer = make("ppo", tmp_path / "two", max_steps=8)
    trainer.train(resume_from_checkpoint=str(copied))
    assert trainer.state.global_step == 8
