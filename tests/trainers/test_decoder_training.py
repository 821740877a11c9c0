"""Decoder-only students and teachers in every trainer: a tokenizer with `<s>`, whose padding is end-of-sequence."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.decoder_families import continuing_tokenizer, tiny_decoder
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_runs
from rlkd.errors import ConfigError
from rlkd.models.adapters import add_adapter
from rlkd.models.architectures import language_model
from rlkd.models.spec import ModelSpec
from rlkd.models.teacher import Teacher
from rlkd.tensors import pad_rows
from rlkd.trainers.supervised import PseudoLabelCollator
from tiny import save_pretrained
from tiny_runs import TRAINERS, assert_same, differ, examples, labels, logged, make, weights

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "copy", ":"]
VALID, EOS = len(WORDS), 1
OPTIONS = {"supervised": {"objective": "reverse_kl"}, "gkd": {"objective": "jensen_shannon"}}


def tokenizer():
    """As SmolLM2's: the same token pads and ends."""
    made = continuing_tokenizer(WORDS)
    made.pad_token = made.eos_token
    return made


def student(seed=11, family="llama", **options):
    return tiny_decoder(family, seed=seed, words=VALID, eos_token_id=EOS, pad_token_id=EOS, **options)


def teacher(seed=2, family="llama"):
    return Teacher(language_model(student(seed, family), tokenizer()), tokenizer())


def run(kind, folder, model=None, **options):
    settings = {"tokenizer": tokenizer(), "teacher": teacher(), "max_steps": 4, **OPTIONS.get(kind, {}), **options}
    return make(kind, folder, model=student() if model is None else model, **settings)


# -- the end of answers ------------------------------------------------------------------------------------------------


def test_padding_that_is_the_end_does_not_unteach_it(tmp_path):
    """trl#6357: a mask by id would drop every end from the loss. Lengths decide: the loss counts each end once, and
    padding never, against a plain loss row by row.
    """
    rows = labels(4)
    collate = PseudoLabelCollator(tokenizer(), 16, 5, rules=language_model(student(), tokenizer()).rules)
    batch = collate(rows)
    assert batch["answer_mask"].sum(1).tolist() == [len(row["label"].split()) + 1 for row in rows]
    assert all(ids[mask][-1] == EOS for ids, mask in zip(batch["answer_ids"], batch["answer_mask"], strict=True))
    assert (batch["input_ids"][batch["input_mask"]] != EOS).all()
    trainer = run("supervised", tmp_path, objective="sequence", max_steps=1, learning_rate=0.5, optim="sgd",
                  data=rows, per_device_train_batch_size=4, max_grad_norm=0.0)  # fmt: skip
    trainer.train()
    plain, total, tokens = student(), 0.0, 0
    for row in rows:
        prompt = [0, *(WORDS.index(word) for word in row["student_input"].split())]
        answer = [*(WORDS.index(word) for word in row["label"].split()), EOS]
        logits = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, :VALID]
        total, tokens = total - logits.log_softmax(-1)[range(len(answer)), answer].sum(), tokens + len(answer)
    (total / tokens).backward()
    for name, parameter in plain.named_parameters():
        want = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(trainer.policy.student.get_parameter(name), want, atol=1e-5, rtol=1e-5, msg=name)


def test_a_student_learns_to_stop(tmp_path):
    trainer = run("supervised", tmp_path, objective="sequence", max_steps=25, learning_rate=3e-2, data=labels(8),
                  eval_examples=examples(8))  # fmt: skip
    assert trainer.evaluate()["eval_finish_rate"] < 1
    trainer.train()
    assert trainer.evaluate()["eval_finish_rate"] == 1.0


def test_of_several_ends_the_most_probable_has_the_price(tmp_path):
    """As in chat models, which end their turns otherwise than their texts."""
    ends = [EOS, WORDS.index("b")]
    models = [tiny_decoder(seed=seed, words=VALID, eos_token_id=ends, pad_token_id=EOS) for seed in (11, 2)]
    guide = Teacher(language_model(models[1], tokenizer()), tokenizer(), max_input_tokens=16)
    trainer = run("reinforce", tmp_path, model=models[0], teacher=guide, max_new_tokens=2, n=16, weak_start="warn",
                  per_device_train_batch_size=16, cut_answers="end_price", max_steps=1)  # fmt: skip
    answers = trainer.sample(0)
    signal, gaps = trainer.ending(answers), []
    for i, example in enumerate(answers.examples):
        ids = answers.answer_ids[i][answers.answer_mask[i]].tolist()
        prompt = [0, *(WORDS.index(word) for word in example.teacher_inputs[0].split())]
        with torch.no_grad():
            logits = models[1](torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :, :VALID]
        assert bool(answers.finished[i]) == (ids[-1] in ends)
        want = 0.0 if answers.finished[i] else float(logits[-1, ends].max())
        assert float(signal.chosen[i, 0]) == pytest.approx(want, abs=1e-5)
        gaps += [float(q.max() - q[ends].max()) for token, q in zip(ids, logits, strict=False) if token not in ends]
    assert not answers.finished.all()
    trainer.train()
    (start,) = [line for line in logged(tmp_path) if "start_eos_price" in line]
    assert start["start_eos_price"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


def test_the_window_has_room_for_the_price_of_an_end(tmp_path):
    longer = Teacher(language_model(student(2), tokenizer()), tokenizer(), max_input_tokens=64)
    with pytest.raises(ConfigError, match="has 0 positions for an answer and its end: set the teacher's max_input_tok"):
        run("reinforce", tmp_path, teacher=longer, cut_answers="end_price")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    """Stopped twice, within and between passes over the data."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    more = {"reinforce": {"sync_every": 2}, "ppo": {"epochs_per_rollout": 1, "minibatches_per_rollout": 1}}
    options |= more.get(kind, {})
    straight = run(kind, tmp_path / "straight", **options)
    before = weights(straight.policy)
    straight.train()
    assert differ(before, weights(straight.policy))
    source = tmp_path / "straight"
    for step, last in ((1, 2), (2, 3)):
        resumed = run(kind, tmp_path / f"from {step}", **{**options, "max_steps": last})
        resumed.train(resume_from_checkpoint=str(source / f"checkpoint-{step}"))
        source = tmp_path / f"from {step}"
    assert_same(weights(straight.policy), weights(resumed.policy))


@pytest.mark.parametrize("kind", ["ppo", "supervised"])
def test_gradient_checkpointing_is_the_same_run(tmp_path, kind):
    """transformers drops the keys and values of layers that are checkpointed."""
    plain = run(kind, tmp_path / "plain", optim="sgd", max_steps=2)
    plain.train()
    again = run(kind, tmp_path / "again", optim="sgd", max_steps=2, gradient_checkpointing=True)
    again.train()
    assert again.policy.student.model.layers[0].gradient_checkpointing
    assert_same(weights(plain.policy), weights(again.policy), tolerance=1e-5)


def test_mixed_precision_samples_what_the_loss_recomputes(tmp_path):
    trainer = run("ppo", tmp_path, bf16=True, max_steps=1)
    trainer.train()
    numbers = [line for line in logged(tmp_path) if "loss" in line]
    assert numbers[0]["loss"] == numbers[0]["loss"]
    answers = trainer.sample(3)
    with torch.no_grad(), trainer.accelerator.autocast():
        (logps, _), _ = trainer.policy(*answers.policy_inputs)
    torch.testing.assert_close(logps, answers.behaviour_logps, atol=0.05, rtol=0)


def test_other_families_train_with_each_other(tmp_path):
    """A student with sliding windows and capped logits, a teacher with learned positions, two templates; a tokenizer
    without padding.
    """
    data = [replace(e, teacher_inputs=(*e.teacher_inputs, f"{e.student_input} copy :")) for e in examples(8)]
    trainer = run("reinforce", tmp_path, model=student(family="gemma2"), teacher=teacher(family="gpt2"), data=data,
                  tokenizer=continuing_tokenizer(WORDS))  # fmt: skip
    assert trainer.tokenizer.pad_token_id is None
    before = weights(trainer.policy)
    trainer.train()
    assert differ(before, weights(trainer.policy))


def test_an_encoder_decoder_teaches_a_decoder_only_student(tmp_path):
    """With the same tokenizer: the teacher's prompt ends, the student's goes on."""
    model = tiny_decoder(words=tiny_runs.VALID, eos_token_id=EOS, pad_token_id=0)
    trainer = make("reinforce", tmp_path, model=model, max_steps=1)
    assert trainer.teacher.append_eos is True
    answers = trainer.sample(0)
    assert not (answers.input_ids[answers.input_mask] == EOS).any()
    trainer.train()


# -- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_cards_snippet_gives_the_evaluated_answer(tmp_path, capsys, kind):
    model = student()
    if kind == "adapter":
        model = ModelSpec(save_pretrained(tmp_path / "base", student(), tokenizer()), "student").load()
        model = add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    folder, held_out = tmp_path / "run", examples(8)
    trainer = run("supervised", folder, model=model, max_steps=2, eval_examples=held_out, learning_rate=0.1)
    trainer.run()
    answers = [row["student"] for row in trainer.evaluate_policy(8)]
    i = max(range(8), key=lambda i: len(answers[i]))
    (code,) = re.findall(r"## Use\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(folder)).replace("A text.", held_out[i].student_input)
    assert ("AutoPeftModelForCausalLM" in code) == (kind == "adapter")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] == str([answers[i]])
    if kind == "adapter":
        again = run("supervised", tmp_path / "again", model=ModelSpec(str(folder), "student", keep_adapter=True).load())
        assert_same(weights(again.policy), weights(trainer.policy))


def test_the_student_is_saved_with_its_own_tokenizer_and_generation(tmp_path):
    trainer = run("supervised", tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    loaded, words = (kind.from_pretrained(tmp_path / "saved") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert_same(loaded.state_dict(), trainer.policy.student.state_dict())
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.max_new_tokens) == (EOS, EOS, 5)
    assert generation.suppress_tokens == [*range(VALID, VALID + 4)]
    assert generation.decoder_start_token_id is None
    assert words("a")["input_ids"] == [0, 3]
    assert ModelSpec(str(tmp_path / "saved"), "student").rules.banned == ()


def test_adapters_of_a_frozen_copy_share_the_base(tmp_path):
    model = add_adapter(student(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = run("ppo", tmp_path, model=model, max_steps=1)
    base = trainer.policy.student.get_base_model().model.embed_tokens.weight
    assert trainer.reference.student.get_base_model().model.embed_tokens.weight is base
    before = weights(trainer.policy)
    trainer.train()
    assert differ(before, weights(trainer.policy))
    ids, mask = pad_rows([[3, 4, EOS]], EOS)
    prompt = pad_rows([[0, 3]], EOS)
    with torch.no_grad():
        (ours, _), _ = trainer.policy(*prompt, ids, mask)
        (theirs, _), _ = trainer.reference(*prompt, ids, mask)
    assert not torch.equal(ours, theirs)
