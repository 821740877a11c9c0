"""Students and teachers in chat templates, each in its own: training, resuming, what is saved and shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from models.chat_templates import chat_model, chat_tokenizer

from rlkd.jobs.setup import DataArguments
from rlkd.models.architectures import language_model
from rlkd.models.chat import chat_of, with_chat
from rlkd.models.spec import ModelSpec
from rlkd.models.teacher import Teacher
from tiny_runs import assert_same, examples, make, weights

SYSTEM = "Speak up."


def run(kind, folder, **options):
    """A student with a system prompt, a teacher without."""
    theirs = with_chat(chat_tokenizer())
    teacher = Teacher(language_model(chat_model(seed=2), theirs), theirs, max_input_tokens=96)
    settings = {"tokenizer": with_chat(chat_tokenizer(), SYSTEM), "teacher": teacher, "max_steps": 2}
    settings |= {"max_input_tokens": 96, "n": 4, "per_device_train_batch_size": 4, **options}
    return make(kind, folder, model=chat_model(seed=11), **settings)


def oracle(text, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    chat = [*turns, {"role": "user", "content": text}]
    return chat_tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("kind", ["ppo", "supervised"])
def test_each_reads_its_own_prompts_and_a_resumed_run_is_the_same(tmp_path, kind):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    if kind == "ppo":
        options |= {"epochs_per_rollout": 1, "minibatches_per_rollout": 1}
    straight = run(kind, tmp_path / "straight", **options)
    straight.train()
    again = run(kind, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    assert_same(weights(straight.policy), weights(again.policy))
    record = json.loads((tmp_path / "straight" / "run.json").read_text())
    assert "chat template" in record["inputs"]["teacher's reading"]
    if kind == "supervised":
        batch = straight.collate(straight.train_dataset[:1])
        assert batch["input_ids"][0][batch["input_mask"][0]].tolist() == oracle("a", SYSTEM)
        return
    answers = straight.sample(0)
    for i, example in enumerate(answers.examples):
        assert answers.input_ids[i][answers.input_mask[i]].tolist() == oracle(example.student_input, SYSTEM)
        ids = answers.answer_ids[i][answers.answer_mask[i]].tolist()
        prompt = oracle(example.teacher_inputs[0])
        with torch.no_grad():
            logits = straight.teacher.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :258]
        found = straight.score(answers, distribution=False)
        want = logits[range(len(ids)), ids] - logits.max(-1).values
        torch.testing.assert_close((found.chosen - found.max)[i, : len(ids)], want, atol=1e-4, rtol=1e-4)


def test_resuming_with_other_prompts_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run("supervised", tmp_path / "one", **options).train()
    other = run("supervised", tmp_path / "two", **options | {"tokenizer": with_chat(chat_tokenizer(), "Be brief.")})
    with pytest.raises(Exception, match=r"(?s)written with other settings or inputs.*tokenizer: \w+ -> \w+"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))


def test_what_is_saved_reads_as_it_was_trained(tmp_path, capsys):
    """By the card's lines, and where rlkd loads it without settings; the page of token rewards, too."""
    held_out = [replace(e, student_input=f"{e.student_input}{'!' * i}") for i, e in enumerate(examples(4))]
    trainer = run("supervised", tmp_path / "run", eval_examples=held_out, learning_rate=0.1, max_steps=1)
    trainer.run()
    rows = trainer.evaluate_policy(4)
    i = max(range(4), key=lambda i: len(rows[i]["student"]))
    (code,) = re.findall(r"## Use\n\n```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "run")).replace("A text.", held_out[i].student_input)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == str([rows[i]["student"]])
    assert f"system prompt {SYSTEM}" in (tmp_path / "run" / "README.md").read_text()
    saved = ModelSpec(str(tmp_path / "run"), "student")
    assert chat_of(saved.tokenizer).system == SYSTEM
    assert saved.rules.eos_ids == trainer.policy.lm.rules.eos_ids
    shown = [json.loads(line) for line in (tmp_path / "run" / "token_rewards.jsonl").read_text().splitlines()]
    answered = [row for row in shown if row["source"] == "teacher greedy"]
    assert len(answered) == 4
    for row in answered:
        prompt, ids = oracle(row["input"], SYSTEM), row["ids"]
        with torch.no_grad():
            logits = trainer.policy.student(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :258]
        want = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
        assert row["student_logprobs"] == pytest.approx(want, abs=1e-4)


def test_settings_of_the_student_are_its_own():
    data = DataArguments(dataset="rows.jsonl", input_column="text", student_chat=True, student_system_prompt=SYSTEM)
    assert (data.student_chat, data.student_system_prompt) == (True, SYSTEM)
