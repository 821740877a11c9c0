"""Labels of a teacher in its chat template, from the command to the student that learns them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from models.chat_templates import TURN_ENDS, chat_model, chat_tokenizer
from trainers import tiny_runs

from rlkd.cli.main import main
from rlkd.errors import ConfigError
from rlkd.jobs.setup import TeacherArguments
from rlkd.labels.store import load_pseudolabels
from rlkd.models.architectures import language_model
from rlkd.models.chat import with_chat
from rlkd.models.teacher import Teacher
from tiny import save_pretrained

KIND, NEW = "gemma", 6
TEXTS = ["a b", "c", "good morning to you"]
TEMPLATE = "templates: {x: {name: x, jinja: 'Say: {{ text }} ||| ', answer_choices: 'yes ||| no'}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model = chat_model(KIND, seed=3)
    save_pretrained(folder / "teacher", model, chat_tokenizer(KIND))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "t.yaml").write_text(TEMPLATE)
    return folder, model


def run(folder, *command):
    """Its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in command])
    return ended.value.code


def label(folder, out, *options):
    command = [
        "generate-pseudolabels",
        "--input-column",
        "text",
        "--quiet",
        "--max-input-tokens",
        99,
        "--max-new-tokens",
        NEW,
    ]
    files = {"--teacher": "teacher", "--dataset": "rows.jsonl", "--templates": "t.yaml", "--out": out}
    return run(folder, *command, *(part for flag, name in files.items() for part in (flag, folder / name)), *options)


def prompt_of(text):
    turns = [{"role": "user", "content": f"Say: {text}"}]
    return chat_tokenizer(KIND).apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("strategy", ["greedy", "rank"])
def test_labels_are_those_of_a_plain_forward_over_the_chat(folder, strategy):
    folder, model = folder
    assert label(folder, strategy, "--teacher-chat", "--strategy", strategy) == 0
    rows, tokenizer = load_pseudolabels(folder / strategy).to_list(), chat_tokenizer(KIND)
    turn = tokenizer.convert_tokens_to_ids(TURN_ENDS[KIND])

    def sum_logprob(text, ids):
        prompt = prompt_of(text)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        log_p = logits.log_softmax(-1)
        return log_p, float(log_p[range(len(ids)), ids].sum())

    for text, row in zip(TEXTS, rows, strict=True):
        assert (row["teacher_input"], row["n_in"]) == (f"Say: {text}", len(prompt_of(text)))
        log_p, total = sum_logprob(text, row["token_ids"])
        assert row["sum_logprob"] == pytest.approx(total, abs=1e-4)
        if strategy == "greedy":
            assert row["token_ids"] == log_p.argmax(-1).tolist()
            continue
        for choice, found in zip(row["choices"], row["choice_logprobs"], strict=True):
            ids = [*tokenizer(choice, add_special_tokens=False)["input_ids"], turn]
            assert found == pytest.approx(sum_logprob(text, ids)[1], abs=1e-4)


def test_the_manifest_records_it_and_other_prompts_are_not_mixed_in(folder, capsys):
    folder, _ = folder
    assert label(folder, "said", "--teacher-chat") == 0
    manifest = folder / "said" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    settings = json.loads(lines[0])["settings"]
    assert settings["chat"] == {"template": settings["chat"]["template"], "system": None}
    manifest.write_text(lines[0] + "\n")  # as if it had been killed at once
    assert label(folder, "said") == 3
    assert "  chat: {'template': " in capsys.readouterr().err
    assert label(folder, "said", "--teacher-chat") == 0
    # Whoever looks at the labels has their teacher read as it did then.
    capsys.readouterr()
    assert run(folder, "inspect-rewards", "--labels", folder / "said", "--teacher", folder / "teacher", "--json") == 0
    shown = json.loads(capsys.readouterr().out)["samples"]
    sums = [sum(sample["logprobs"]) for sample in shown if sample["source"] == "pseudo-label"]
    assert sums == pytest.approx([row["sum_logprob"] for row in load_pseudolabels(folder / "said")], abs=1e-4)


def test_a_student_of_another_reading_is_told(folder, tmp_path, caplog):
    folder, _ = folder
    label(folder, "told", "--teacher-chat")
    rows = load_pseudolabels(folder / "told")
    for system, told in ((False, True), (None, False)):
        tokenizer = chat_tokenizer(KIND) if system is False else with_chat(chat_tokenizer(KIND))
        teacher = Teacher(language_model(chat_model(KIND, seed=3), tokenizer), tokenizer)
        trainer = tiny_runs.make(
            "supervised", tmp_path / str(told), model=chat_model(KIND, seed=4), teacher=teacher, max_steps=1, data=rows,
            tokenizer=chat_tokenizer(KIND),
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert ("the labels were written to prompts in the chat template" in caplog.text) is told
        caplog.clear()


def test_recorded_labels_have_their_own_prompts():
    with pytest.raises(ConfigError, match="teacher_chat is set, and teacher_signal is 'recorded': no teacher reads"):
        TeacherArguments(teacher_signal="recorded", teacher_chat=True)


def test_settings_of_prompts_that_nobody_reads_are_refused(folder, capsys):
    folder, _ = folder
    rows = ("--dataset", folder / "rows.jsonl", "--input-column", "text")
    assert run(folder, "evaluate", folder / "teacher", *rows, "--out", folder / "e", "--teacher-chat") == 2
    assert "--teacher-chat is of the prompts of --teacher: name it." in capsys.readouterr().err
    assert run(folder, "inspect-rewards", *rows, "--teacher", folder / "teacher", "--student-chat") == 2
    assert "--student-chat is of the prompts of --student: name it." in capsys.readouterr().err
