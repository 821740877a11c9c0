"""TinyBERT's terms against NumPy, on states of transformers' own forward; who is compared, and what is refused."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.teacher import Teacher
from rlkd.trainers.arguments import SupervisedArguments
from tiny import tiny_bart, tiny_tokenizer
from tiny_runs import PADDED, VALID, WORDS, assert_same, differ, labels, logged, make, student, tiny_teacher, weights

BOTH = {"hidden_coef": 0.7, "attention_coef": 0.3}


def deep_teacher(width=24, heads=2, layers=4, **options):
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=PADDED, d_model=width, d_kv=8, d_ff=16, num_layers=layers, num_heads=heads, dropout_rate=0.0,
        relative_attention_num_buckets=8, decoder_start_token_id=0,
    )  # fmt: skip
    lm = EncoderDecoder(T5ForConditionalGeneration(config).eval(), VALID)
    return Teacher(lm, tiny_tokenizer(WORDS), max_input_tokens=512, **options)


def read_alike(n=8):
    """Labels to prompts that both models read as they are."""
    return [{**row, "teacher_input": row["student_input"], "label": f"{row['label']} c a"[: 2 * (i % 3) + 3]}
            for i, row in enumerate(labels(n))]  # fmt: skip


def layers_of(model, part, ids, **options):
    """Outputs and self-attention scores of every layer for one row without padding, in NumPy from T5's weights."""
    stack = getattr(model, part)
    out = stack(input_ids=torch.tensor([ids]), output_hidden_states=True, **options)
    states = [h[0].detach().double().numpy() for h in out.hidden_states]
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(len(ids), len(ids))[0].detach().double().numpy()
    scores = []
    for x, block in zip(states, stack.block, strict=False):  # the input of each layer
        norm, attention = block.layer[0].layer_norm, block.layer[0].SelfAttention
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.variance_epsilon) * norm.weight.detach().numpy()
        q, k = (x @ getattr(attention, n).weight.detach().double().numpy().T for n in "qk")
        heads = [m.reshape(len(ids), -1, 8).transpose(1, 0, 2) for m in (q, k)]
        scores.append(heads[0] @ heads[1].transpose(0, 2, 1) + bias)
    return states[1:], scores, out.last_hidden_state


def by_hand(trainer, teacher, rows, encoders, maps):
    """The two terms, mean over rows."""
    tokenizer, found = tiny_tokenizer(WORDS), np.zeros(2)
    projections = [[m.weight.detach().double().numpy() for m in part] for part in trainer.policy.projections.parts]
    for row in rows:
        answer = tokenizer(row["label"])["input_ids"][:5]
        sides = []
        for model, prompt in ((trainer.policy.student, "student_input"), (teacher.lm.model, "teacher_input")):
            ids = tokenizer(row[prompt])["input_ids"]
            encoder = layers_of(model, "encoder", ids)
            given = {"encoder_hidden_states": encoder[2], "use_cache": False}
            sides.append((encoder, layers_of(model, "decoder", [0, *answer[:-1]], **given)))
        for p in (0, 1) if encoders else (1,):
            own, theirs = sides[0][p], sides[1][p]
            for k, layer in enumerate(maps[p]):
                h = own[0][k] @ projections[p][k].T if projections[p] else own[0][k]
                found[0] += ((h - theirs[0][layer - 1]) ** 2).mean() / len(maps[p])
                n = len(h)
                seen = np.tril(np.ones((n, n), bool)) if p else np.ones((n, n), bool)
                found[1] += ((own[1][k] - theirs[1][layer - 1]) ** 2)[:, seen].mean() / len(maps[p])
    return found / len(rows)


@pytest.mark.parametrize("width", [16, 24])  # the student's is 16
@pytest.mark.parametrize("alike", [True, False])
def test_the_terms_are_those_of_numpy(tmp_path, width, alike):
    """The encoders count where both models read the same prompts; projections where widths differ."""
    teacher, rows = deep_teacher(width), read_alike() if alike else labels()
    trainer = make("supervised", tmp_path, teacher=teacher, data=rows, max_steps=1, encoder_layer_map=[1, 3], **BOTH)
    maps = ([1, 3], [2, 4])
    want = by_hand(trainer, teacher, rows, alike, maps)
    trainer.train()
    line = logged(tmp_path)[0]
    assert [line["hidden_loss"], line["attention_loss"]] == pytest.approx(want, rel=1e-5)
    plain = make("supervised", tmp_path / "plain", teacher=teacher, data=rows, max_steps=1)
    plain.train()
    assert line["loss"] - logged(tmp_path / "plain")[0]["loss"] == pytest.approx(
        0.7 * want[0] + 0.3 * want[1], rel=1e-4
    )


@pytest.mark.parametrize("objective", ["sequence", "forward_kl"])
def test_training_lowers_them_and_nothing_of_it_is_saved_with_the_student(tmp_path, objective):
    options = {"teacher": deep_teacher(), "data": read_alike(), "objective": objective, **BOTH}
    trainer = make("supervised", tmp_path, max_steps=12, save_strategy="steps", save_steps=12, **options)
    start = weights(trainer.policy.projections)
    trainer.train()
    trainer.save_model()
    lines = [line for line in logged(tmp_path) if "hidden_loss" in line]
    assert lines[-1]["hidden_loss"] < 0.9 * lines[0]["hidden_loss"]
    assert differ(start, weights(trainer.policy.projections))
    assert not (tmp_path / "projections.safetensors").exists()
    assert type(trainer.policy.student).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    options = {"teacher": deep_teacher(), "data": read_alike(), "max_steps": 4, "optim": "adamw_torch", **BOTH}
    straight = make("supervised", tmp_path / "a", **options)
    straight.train()
    first = make("supervised", tmp_path / "b", **options, save_strategy="steps", save_steps=2)
    first.train()
    again = make("supervised", tmp_path / "b", **options, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert_same(weights(straight.policy), weights(again.policy))


def test_accumulation_changes_no_gradient(tmp_path):
    found = []
    plain = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 1}
    for steps in (1, 4):
        split = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        options = {"teacher": deep_teacher(), "data": read_alike(), **plain, **split, **BOTH}
        trainer = make("supervised", tmp_path / str(steps), **options)
        trainer.train()
        found.append(weights(trainer.policy))
    assert_same(*found, tolerance=2e-6)


def test_an_adapter_learns_from_layers_too(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    model = peft.get_peft_model(student(), config)
    trainer = make("supervised", tmp_path, model=model, teacher=deep_teacher(), data=read_alike(), max_steps=6, **BOTH)
    trainer.train()
    lines = [line for line in logged(tmp_path) if "hidden_loss" in line]
    assert lines[-1]["hidden_loss"] < lines[0]["hidden_loss"]


def test_what_is_not_compared_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rlkd.trainers.layer_terms.logger.propagate", True)
    reasons = [
        ({"data": labels()}, "the teacher's prompt is not the student's input in 8 of 8 rows"),
        ({"teacher": deep_teacher(append_eos=False)}, "without end-of-sequence"),
        ({"max_input_tokens": 9}, "cut to 512 tokens, the student's to 9"),
        ({}, None),
    ]
    for options, reason in reasons:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make("supervised", tmp_path, **{"teacher": deep_teacher(), "data": read_alike(), **BOTH, **options})
        told = [r.message for r in caplog.records if "encoders are not" in r.message]
        assert [reason in message for message in told] == ([True] if reason else [])


def test_another_family_of_teacher(tmp_path):
    lm = EncoderDecoder(tiny_bart(vocab=PADDED, width=16), VALID)
    teacher = Teacher(lm, tiny_tokenizer(WORDS))
    trainer = make("supervised", tmp_path, teacher=teacher, data=read_alike(), max_steps=2, **BOTH)
    trainer.train()
    assert logged(tmp_path)[0]["hidden_loss"] > 0


class Served:
    """A teacher without layers."""

    gives, model, longest_answer = frozenset({"chosen"}), None, None


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    cases = [
        ({"teacher": deep_teacher(heads=3), **BOTH}, "the student has 2 attention heads and the teacher 3"),
        ({"teacher": deep_teacher(layers=1), **BOTH}, "the student has 2 layers, more than its teacher"),
        ({"teacher": deep_teacher(), **BOTH, "decoder_layer_map": [4, 2]}, r"layer_map = \[4, 2\]: must give 2 layers"),
        ({"teacher": Served(), **BOTH}, "hidden_coef = 0.7 compares layers .* give a local Teacher"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            make("supervised", tmp_path, data=read_alike(), **options)
    for options, message in (
        ({"encoder_layer_map": [1, 2]}, r"encoder_layer_map = \[1, 2\]: compares no layers"),
        ({"attention_coef": 1.0, "gradient_checkpointing": True}, "layers that attention_coef = 1.0 compares"),
    ):
        with pytest.raises(ConfigError, match=message):
            SupervisedArguments(output_dir=str(tmp_path), **options)
    other = tiny_teacher()
    other = replace(other, lm=Foreign(other.lm))
    with pytest.raises(ConfigError, match="the teacher is a 't5' model: set it to 0"):
        make("supervised", tmp_path, data=read_alike(), teacher=other, **BOTH)
    model = student()
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    with pytest.raises(ModelError, match="student: a 't5' model does not show its attention"):
        make("supervised", tmp_path, data=read_alike(), teacher=deep_teacher(), model=model, **BOTH)


class Foreign:
    """A language model of another architecture."""

    def __init__(self, lm):
        self.lm = lm

    def __getattr__(self, name):
        return getattr(self.lm, name)
