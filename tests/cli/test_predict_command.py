"""`rlkd predict`: answers and classes against transformers' own generate and forward; the folder for its readers."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from models.chat_templates import chat_model, chat_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from rlkd import DataError, load_pseudolabels
from rlkd.cli import labels as recorded_commands
from rlkd.cli.main import main
from rlkd.jobs.encoder_label_folder import read_label_folder
from rlkd.labels.classes import ClassifierEngine
from rlkd.labels.manifest import Manifest
from rlkd.sampling.engines.torch_engine import TorchEngine
from tiny import classifier_tokenizer, save_pair, save_pretrained, tiny_classifier, tiny_tokenizer

NOTES = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "gh"]
TEMPLATE = """\
templates:
  x: !Template
    id: x
    name: ask
    jinja: 'b {{ note }} a'
    metadata: !TemplateMetadata {}
"""
BASIC = ("--data", "rows.jsonl", "--input-column", "note")
SHORT = ("--max-new-tokens", "5", "--max-input-tokens", "16")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path)
    model = tiny_classifier(seed=3)
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    save_pretrained(tmp_path / "classifier", model, classifier_tokenizer())
    rows = [{"note": note, "other": note[::-1], "gold": "yes"} for note in NOTES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(TEMPLATE)
    return tmp_path


def run(capsys, *words):
    code = 0
    try:
        main(["predict", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def of_transformers(name: str, text: str) -> list[int]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(name), tiny_tokenizer()
    banned = list(range(len(tokenizer), model.config.vocab_size))
    asked = tokenizer(text, return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=5, do_sample=False, suppress_tokens=banned)[0, 1:].tolist()
    return ids[: ids.index(1) + 1] if 1 in ids else ids


def test_answers_are_those_of_generate_under_the_students_own_template(folder, capsys):
    code, out, err = run(
        capsys, "student", *BASIC, *SHORT, "--student-template", "t.yaml", "--reference-column", "gold", "--out", "out"
    )
    assert code in (0, 4), err
    rows = load_pseudolabels("out", statuses=None).to_list()
    assert [row["student_input"] for row in rows] == [f"b {note} a" for note in NOTES]
    for row in rows[:4]:
        if row["status"] == "ok":
            assert row["token_ids"] == of_transformers("student", row["student_input"])
    card = Path("out/README.md").read_text()
    assert "# Predictions of student" in card
    assert "model: student" in card
    assert "teacher" not in card + out
    with pytest.raises(SystemExit):
        main(["data", "score", "out", "--metric", "exact_match"])
    assert "exact_match" in capsys.readouterr().out


def test_a_merged_adapter_answers_as_the_adapter(folder, capsys):
    base = AutoModelForSeq2SeqLM.from_pretrained("student")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    save_pretrained("adapter", adapted)
    with pytest.raises(SystemExit):
        main(["merge-adapter", "adapter", "merged"])
    found = []
    for name in ("adapter", "merged"):
        code, _, err = run(capsys, name, *BASIC, *SHORT, "--out", f"out-{name}", "--limit", "6")
        assert code in (0, 4), err
        found.append(load_pseudolabels(f"out-{name}", statuses=None)["label"])
    assert found[0][:] == found[1][:]


@pytest.mark.parametrize("pair", [False, True])
def test_classes_are_those_of_the_forward(folder, capsys, pair):
    words = ("--pair-column", "other") if pair else ()
    code, out, err = run(capsys, "classifier", *BASIC, *words, "--reference-column", "gold", "--out", "out")
    assert code == 0, err
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("classifier"), classifier_tokenizer()
    rows = load_pseudolabels("out").to_list()
    for row, note in zip(rows, NOTES, strict=True):
        texts = [note, note[::-1]] if pair else [note]
        with torch.no_grad():
            wanted = model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)
        assert np.exp(row["choice_logprobs"]) == pytest.approx(wanted.tolist(), abs=1e-6)
        assert row["label"] == ("no", "yes")[int(wanted.argmax())]
        assert (row["choices"], row["finish_reason"]) == (["no", "yes"], "ranked")
        assert row["n_in"] == len(tokenizer(*texts)["input_ids"])
    assert "teacher" not in Path("out/README.md").read_text() + out
    made, names, _ = read_label_folder("out")  # the labels of another encoder
    assert names == ("no", "yes")
    assert np.exp(made[3]["logits"]) == pytest.approx(np.exp(rows[3]["choice_logprobs"]), abs=1e-6)


def test_long_and_missing_texts(folder, capsys):
    rows = [{"note": "a b c d e", "other": "a"}, {"note": " ", "other": "a"}, {"note": "b", "other": None}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--pair-column", "other", "--max-input-tokens", "6", "--out", "out")
    code, out, err = run(capsys, "classifier", *BASIC, *words)
    assert code == 0, err
    found = load_pseudolabels("out", statuses=None)
    assert found["status"][:] == ["ok", "skipped", "skipped"]
    assert found["error"][1:] == ["no student input", "no second text"]
    assert (found["truncated"][0], found["n_in"][0]) == (True, 6)
    assert "1 prompts truncated" in out


@pytest.mark.parametrize("name", ["student", "classifier"])
def test_a_run_that_is_stopped_continues_to_the_same_files(folder, capsys, monkeypatch, name):
    words = (*BASIC, "--limit", "10", "--shard-rows", "4", "--quiet")
    words += (*SHORT, "--engine", "torch") if name == "student" else ()
    kind, method = (TorchEngine, "answer") if name == "student" else (ClassifierEngine, "log_probabilities")
    assert run(capsys, name, *words, "--out", "whole")[0] in (0, 4)
    batches, compute = [], getattr(kind, method)

    def stopped(self, *args):
        batches.append(signal.raise_signal(signal.SIGTERM) if len(batches) == 1 else None)
        return compute(self, *args)

    monkeypatch.setattr(kind, method, stopped)
    code, _, err = run(capsys, name, *words, "--out", "cut")
    assert (code, "Repeat the command to continue" in err) == (143, True)
    assert run(capsys, name, *words, "--out", "cut")[0] in (0, 4)
    for file in sorted(Path("whole").glob("labels-*.parquet")):
        assert file.read_bytes() == Path("cut", file.name).read_bytes()
    assert run(capsys, name, *words, "--out", "cut")[0] == DataError.exit_code  # finished
    # Damage is repaired by the recorded command.
    before = Path("cut/labels-00001.parquet").read_bytes()
    Path("cut/labels-00001.parquet").write_bytes(b"x")
    request = Manifest.read(Path("cut/manifest.jsonl")).header["request"]
    assert recorded_commands.shown(request, Path("cut")).split("&& ")[1].startswith(f"rlkd predict {name} --dataset=")
    with pytest.raises(SystemExit) as end:
        main(["data", "repair", "cut", "--run", "--quiet"])
    assert end.value.code in (0, 4, None)
    assert Path("cut/labels-00001.parquet").read_bytes() == before


def test_a_chat_model_answers_in_its_chat_template(folder, capsys):
    save_pretrained("chat", chat_model(), chat_tokenizer())
    words = (*BASIC, "--max-new-tokens", "3", "--max-input-tokens", "128", "--limit", "2", "--student-chat", "--quiet")
    code, _, err = run(capsys, "chat", *words, "--out", "out")
    assert code in (0, 4), err
    rows = load_pseudolabels("out", statuses=None).to_list()
    turns = [{"role": "user", "content": NOTES[0]}]
    asked = chat_tokenizer().apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert rows[0]["n_in"] == len(asked)


def test_a_warning_where_the_run_that_made_the_model_says_otherwise(folder, capsys, caplog):
    record = {
        "trainer": "PPOTrainer", "data": {}, "templates": [], "models": {}, "revisions": {},
        "settings": {"max_input_tokens": 32, "max_new_tokens": 5, "student_template": "s.yaml"},
    }  # fmt: skip
    Path("student/run.json").write_text(json.dumps(record))
    code, _, err = run(capsys, "student", *BASIC, *SHORT, "--limit", "2", "--out", "out")
    assert code in (0, 4), err
    assert "was trained with student_template s.yaml (now None), max_input_tokens 32 (now 16)" in caplog.text
    caplog.clear()
    code, _, err = run(capsys, "student", *BASIC, "--student-template", "t.yaml", "--limit", "2", "--out", "own")
    assert code in (0, 4), err
    settings = Manifest.read(Path("own/manifest.jsonl")).header["settings"]
    assert (settings["max_input_tokens"], settings["max_new_tokens"]) == (32, 5)
    assert "was trained with student_template s.yaml (now t.yaml)" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student", "--pair-column", "other"], "--pair-column has no effect: 'student' is a generating model"),
        (["classifier", "--max-new-tokens", "4"], "--max-new-tokens has no effect: 'classifier' is a classifier"),
        (["classifier", "--engine", "torch"], "--engine has no effect"),
        (["classifier", "--no-student-chat"], "--student-chat has no effect"),
        (["classifier", "--max-input-tokens", "600"], "max_length = 600"),
        (["classifier", "--pair-column", "othr"], "Did you mean 'other'"),
        (["encoder"], "an encoder, which writes no text"),
        (["one-way"], "reads texts in one direction"),
        (["exported"], "was written by rlkd export: name the student"),
        (["no-padding"], "its tokenizer has no padding token"),
        (["student", "--input-column", "nota"], "Did you mean 'note'"),
        (["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named_before_weights_load(folder, capsys, monkeypatch, words, said):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    for name in ("rlkd.models.loading.load_pretrained", "rlkd.jobs.classifiers.load_pretrained"):
        monkeypatch.setattr(name, weights)
    tokenizer = classifier_tokenizer()
    save_pretrained("encoder", tiny_classifier().base_model, tokenizer)
    save_pretrained("one-way", tiny_classifier(), tokenizer)
    config = json.loads(Path("one-way/config.json").read_text())
    llama = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    Path("one-way/config.json").write_text(
        json.dumps(config | llama | {"architectures": ["LlamaForSequenceClassification"]})
    )
    Path("exported").mkdir()
    Path("exported/export.json").write_text("{}")
    tokenizer.pad_token = None
    save_pretrained("no-padding", tiny_classifier(), tokenizer)
    code, _, err = run(capsys, *words[:1], *BASIC, *words[1:], "--out", "out")
    assert code in (2, 3)
    assert said in err
    assert not Path("out/manifest.jsonl").exists()


def test_a_recorded_command_of_another_kind_is_not_repeated(folder):
    with pytest.raises(DataError, match="the recorded command is 'rm', which makes no labels"):
        recorded_commands.shown({"command": "rm", "folder": "."}, Path("out"))
