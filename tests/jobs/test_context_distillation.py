"""A teacher that is the student's own base model, its adapter off, under a longer prompt: context distillation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.chat_templates import chat_model, chat_tokenizer
from transformers import AutoModelForCausalLM

from rlkd import DataArguments, GKDArguments, GKDTrainer, PPOArguments, PPOTrainer, TeacherArguments, prepare
from rlkd.errors import ConfigError
from rlkd.models.adapters import base_of
from rlkd.models.saving import merge_adapter
from rlkd.models.spec import ModelSpec
from rlkd.settings.trl_compat import ModelConfig
from tiny import save_pretrained

SYSTEM = "Answer with one word."
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
RUNS = {"ppo": (PPOArguments, PPOTrainer), "gkd": (GKDArguments, GKDTrainer)}
WORDS = 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    save_pretrained(folder / "student", chat_model(seed=3), chat_tokenizer())
    rows = [{"text": "abcdefgh"[i % 8] * (1 + i % 3)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(folder, out, kind="ppo", *, model="student", told=None, student=LORA, data=None, **options):
    reads = {"teacher_chat": True, "teacher_system_prompt": SYSTEM} if told is None else told
    arguments, trainer = RUNS[kind]
    training = arguments(
        str(out), use_cpu=True, disable_tqdm=True, report_to="none", max_input_tokens=96, max_new_tokens=5,
        per_device_train_batch_size=4, learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1,
        **{"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", **options},
        **({} if kind == "gkd" else {"weak_start": "ignore", "rollouts_per_prompt": 2}),
    )  # fmt: skip
    data = DataArguments(dataset=str(folder / "rows.jsonl"), input_column="text", **(data or {"student_chat": True}))
    setup = prepare(
        data, TeacherArguments(teacher_signal="base", **reads), ModelConfig(str(folder / model), **student), training
    )
    made = trainer(setup.student, training, train_examples=setup.train_examples, **setup.trainer_inputs())
    return made, setup


def storages(*models):
    return {weight.data_ptr(): weight.numel() for model in models for weight in model.parameters()}


@pytest.mark.parametrize("kind", RUNS)
def test_one_copy_of_the_weights_teaches_and_only_the_adapter_learns(folder, tmp_path, kind):
    trainer, setup = prepared(folder, tmp_path / "run", kind)
    student, teacher = setup.student, setup.teacher.model
    alone = sum(storages(student).values())
    assert sum(storages(student, teacher).values()) == alone
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    answers = trainer.sample(0) if kind == "ppo" else None
    trainer.train()
    changed = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert sum(storages(student, teacher).values()) == alone  # the trainer placed both
    # After training the teacher is the base as ever, under its own prompt.
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "a"}]
    prompt = chat_tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([[40, 50, 60]])
    found = setup.teacher.score([("a",)], ids, torch.ones_like(ids).bool())
    with torch.no_grad():
        logits = base(torch.tensor([[*prompt, 40, 50, 60]])).logits[0, len(prompt) - 1 : -1, :WORDS]
    torch.testing.assert_close((found.chosen - found.max)[0], logits[range(3), [40, 50, 60]] - logits.amax(-1))
    assert answers is None or answers.input_ids.shape[1] < len(prompt)


def test_resumed_it_is_the_same_run_and_its_adapter_merges(folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "epochs_per_rollout": 1, "minibatches_per_rollout": 1}
    straight, _ = prepared(folder, tmp_path / "straight", **options)
    straight.train()
    resumed, _ = prepared(folder, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    ours, theirs = (trainer.policy.student.state_dict() for trainer in (straight, resumed))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    straight.save_model(str(tmp_path / "saved"))
    merge_adapter(str(tmp_path / "saved"), tmp_path / "merged")
    merged = ModelSpec(str(tmp_path / "merged"), "student")
    ids = torch.tensor([[3, 40, 50, 60]])
    with torch.no_grad():
        torch.testing.assert_close(merged.load()(ids).logits, straight.policy.student(ids).logits, atol=1e-5, rtol=1e-5)
        # The adapter of a next stage is trained further, its base teaches.
        further, setup = prepared(folder, tmp_path / "next", model=tmp_path / "saved", told={"teacher_chat": False})
        torch.testing.assert_close(setup.student(ids).logits, straight.policy.student(ids).logits)
        base = AutoModelForCausalLM.from_pretrained(folder / "student")
        torch.testing.assert_close(setup.teacher.model(ids).logits, base(ids).logits)
    assert Path(further.args.output_dir).name == "next"


def test_modules_that_are_trained_whole_are_the_bases_in_the_teacher():
    from peft import LoraConfig

    from rlkd.models.adapters import add_adapter

    base = chat_model(seed=3)
    want = base(torch.tensor([[3, 40, 50]])).logits.detach()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM")
    model = add_adapter(base, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
        teacher = base_of(model)
        assert not torch.allclose(model(torch.tensor([[3, 40, 50]])).logits, want)
        torch.testing.assert_close(teacher(torch.tensor([[3, 40, 50]])).logits, want)
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert sum("lora" in name for name, _ in model.named_parameters())  # the student has kept its own


def test_what_cannot_teach_is_refused(folder, tmp_path):
    def refused(message, **options):
        with pytest.raises(ConfigError, match=message):
            prepared(folder, tmp_path / "no", **options)

    refused("teacher_signal = 'base': is the student without its adapter: set use_peft to true", student={})
    refused("the base model would read the student's own prompts, and teach nothing", told={"teacher_chat": True})
    refused("teacher = 'x': teacher_signal is 'base', and the teacher is the student's base", told={"teacher": "x"})
    refused("teacher_dtype = 'float32': teacher_signal is 'base'", told={"teacher_dtype": "float32"})
