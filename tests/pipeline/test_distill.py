"""`rlkd distill`: from a file and a prompt to a student, killed anywhere, against transformers' own generate."""

import csv
import json
import operator
import random
import re
import shlex
import shutil
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from models.chat_templates import chat_model, chat_tokenizer
from models.decoder_families import continuing_tokenizer, tiny_decoder
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd import DistillArguments, distill
from rlkd.cli import distill as command
from rlkd.cli.main import main
from rlkd.errors import ConfigError, InterruptedRunError
from rlkd.jobs.saved import limits_of
from rlkd.labels.manifest import Manifest
from rlkd.pipeline import run as pipeline
from rlkd.pipeline.choice import Helped
from rlkd.pipeline.record import Record
from rlkd.report.reading import read_runs
from rlkd.runs import resumable
from tiny import (
    PADDED_VOCAB,
    VALID,
    WORDS,
    classifier_tokenizer,
    save_pretrained,
    tiny_bart,
    tiny_classifier,
    tiny_t5,
    tiny_tokenizer,
)

LETTERS = random.Random(0)
TEXTS = [" ".join(LETTERS.choices("abcdefgh", k=4)) for _ in range(40)]
NOTHING = "zero"  # a reference that no answer equals
SHORT = ["--warm_up", '{"max_steps": 4, "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4}']
SHORT += ["--rl", '{"max_steps": 4, "eval_steps": 4, "save_steps": 4, "per_device_train_batch_size": 4}']
BASIC = ["--teacher", "teacher", "--student", "student", "--data", "rows.csv", "--input-column", "text"]
BASIC += ["--max-new-tokens", "5", "--max-input-tokens", "16", "--out", "runs/mine"]
PROMPT = ["--prompt", "reverse {{ text }}"]
SCORED = ["--reference-column", "answer", "--metric", "exact_match"]
EVALUATED = ("teacher", "warm-up", "rl")
WHOLE = [*BASIC, *PROMPT, *SCORED, *SHORT, "--weak-start", "warn"]


def answers_of_teacher(texts):
    teacher = AutoModelForSeq2SeqLM.from_pretrained("teacher").eval()
    asked = tiny_tokenizer()([f"reverse {text}" for text in texts], return_tensors="pt")
    banned = list(range(VALID, PADDED_VOCAB))
    rules = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": banned}
    ids = teacher.generate(input_ids=asked.input_ids, attention_mask=asked.attention_mask, **rules)
    return tiny_tokenizer().batch_decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pretrained(folder / "teacher", tiny_t5(tied=False, seed=6, width=32))
    save_pretrained(folder / "student", tiny_t5(seed=1))
    save_pretrained(folder / "encoder", tiny_classifier(layers=2), classifier_tokenizer())
    return folder


@pytest.fixture
def user(models, tmp_path, monkeypatch):
    """A user's folder: models and rows, of which every other one has the teacher's answer as reference; the first text
    has two rows.
    """
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    rows = [(t, a if i % 2 else NOTHING) for i, (t, a) in enumerate(zip(TEXTS, answers_of_teacher(TEXTS), strict=True))]
    write_rows([*rows, (TEXTS[0], "one")])
    return tmp_path


def write_rows(rows, name="rows.csv", names=("text", "answer")):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def run(capsys, *words):
    code = 0
    try:
        main(["distill", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def parts(out="runs/mine"):
    return {part: pq.read_table(f"{out}/data/{part}.parquet").to_pylist() for part in ("train", "validation", "test")}


def assert_the_better_one_is_the_student(out, score, better):
    lines = [json.loads(line) for line in Path("runs/mine/rl/metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line[f"eval_{score}"] for line in lines if f"eval_{score}" in line]
    source = "rl" if better(after, before) else "warm-up"
    assert weights("runs/mine/student") == weights(f"runs/mine/{source}")
    assert f"the student is that of {source}: greedy {score} on the validation rows was" in out


def test_a_student_is_the_better_one(tmp_path):
    def evaluated(**scores):
        lines = [{"step": step, "eval_regret": 1.0, **{f"eval_{name}": pair[k] for name, pair in scores.items()}}
                 for k, step in enumerate((0, 4))]  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return bool(Helped.of(tmp_path))

    assert [evaluated(regret=pair) for pair in ((2.0, 1.0), (1.0, 1.0), (1.0, 2.0))] == [True, True, False]
    assert [evaluated(bleu=pair, regret=(1.0, 9.0)) for pair in ((2.0, 1.0), (1.0, 2.0))] == [False, True]


@pytest.mark.slow
def test_a_whole_run(user, capsys, monkeypatch):
    code, out, err = run(capsys, *WHOLE)
    assert code == 0, err
    # An input is in one part; rows of one input are one, with both references.
    inputs = {part: [row["text"] for row in rows] for part, rows in parts().items()}
    assert sorted(chain.from_iterable(inputs.values())) == sorted(set(TEXTS))
    assert len(inputs["test"]) == len(inputs["validation"]) == 4
    (twice,) = [row for rows in parts().values() for row in rows if row["text"] == TEXTS[0]]
    assert twice["answer"] == [NOTHING, "one"]
    # The teacher's score is known: it gives its own answers, and no other.
    own = dict(zip(TEXTS, answers_of_teacher(TEXTS), strict=True))
    right = [own[row["text"]] in row["answer"] for row in parts()["test"]]
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("teacher ", "rl "))}
    assert float(table["teacher"][1]) == pytest.approx(sum(right) / len(right), abs=0.01)
    labels = pq.read_table("runs/mine/labels/labels-00000.parquet").to_pylist()
    assert {row["student_input"]: row["label"] for row in labels} == {text: own[text] for text in inputs["train"]}
    student = AutoModelForSeq2SeqLM.from_pretrained("runs/mine/student")
    assert int(table["rl"][4].replace(",", "")) == student.num_parameters()
    assert {path.name for path in Path("runs/mine/student").iterdir()} >= {"README.md", "tokenizer.json"}
    assert limits_of("runs/mine/student") == {"max_input_tokens": 16, "max_new_tokens": 5}
    runs = {str(found.folder) for found in read_runs(Path("runs/mine"))}
    assert runs == {f"runs/mine/{name}" for name in ("warm-up", "rl", *(f"evaluation/{e}" for e in EVALUATED))}
    assert weights("runs/mine/rl") != weights("runs/mine/warm-up")
    assert_the_better_one_is_the_student(out, "exact_match", operator.ge)
    assert "4 test rows, which nothing was trained on or chosen by" in Path("runs/mine/student/README.md").read_text()
    assert "<html" in Path("runs/mine/report.html").read_text()
    # What is printed last serves the student.
    code = out[out.index("from transformers") :]
    exec(code, {})
    asked = tiny_tokenizer()([inputs["test"][0]], return_tensors="pt")
    rules = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": list(range(VALID, PADDED_VOCAB))}
    expected = student.generate(input_ids=asked.input_ids, attention_mask=asked.attention_mask, **rules)
    assert capsys.readouterr().out.strip() == str(tiny_tokenizer().batch_decode(expected, skip_special_tokens=True))

    # The same in Python, again, only reads.
    monkeypatch.setattr(command, "command", lambda words: pytest.fail(f"ran {words}"))
    before = weights("runs/mine/student")
    settings = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(WHOLE[::2], WHOLE[1::2], strict=True)
    }
    numbers = {"max_new_tokens": 5, "max_input_tokens": 16}
    assert distill(DistillArguments(**settings | numbers)) == Path("runs/mine/student")
    again = capsys.readouterr().out
    assert again.count(": finished") == 8
    assert again[again.index("test rows,") :] == out[out.index("test rows,") :]
    assert weights("runs/mine/student") == before
    shutil.move("runs/mine", "elsewhere")
    assert run(capsys, *WHOLE, "--out", "elsewhere")[0] == 0
    refused(capsys)


def refused(capsys):
    """Of a finished run in `elsewhere`: other settings and missing stages, each in one line."""
    for words, said in (
        (["--max-new-tokens", "6"], "stage labels was made with max_new_tokens = 5, now 6"),
        (["--prompt", "copy {{ text }}"], 'stage data was made with prompt = "reverse {{ text }}", now "copy'),
        (["--rl", '{"max_steps": 8}'], "stage rl was made with"),
        (["--student", "teacher"], "stage warm-up was made with"),
        (["--weak-start", "refuse"], 'stage student was made with weak_start = "warn", now "refuse"'),
    ):
        code, _, err = run(capsys, *WHOLE, "--out", "elsewhere", *words)
        assert (code, said in err, err.count("\n")) == (2, True, 1), err
        assert "rm -r elsewhere/" in err
    with open("rows.csv", "a") as file:
        file.write("a a a,b\n")
    code, _, err = run(capsys, *WHOLE, "--out", "elsewhere")
    assert (code, "stage data was made with contents of data" in err) == (2, True), err
    shutil.rmtree("elsewhere/data")
    code, _, err = run(capsys, *WHOLE, "--out", "elsewhere")
    assert (code, "stage data is to be made, and what was made from it is there" in err) == (2, True), err
    Path("elsewhere/distill.json").write_text('{"stages": [')
    code, _, err = run(capsys, *WHOLE, "--out", "elsewhere")
    assert (code, "distill.json is damaged" in err) == (3, True), err


class Killed(BaseException):
    """As a process that dies: nothing catches it."""


def dying(monkeypatch, target, name, call, when=lambda *_, **__: True, *, after=True):
    """Replace a function by one that kills the process in its `call`-th call for which `when` holds."""
    original, counted = getattr(target, name), [0]

    def wrapped(*args, **kwargs):
        hit = when(*args, **kwargs)
        counted[0] += hit
        if hit and counted[0] == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if hit and counted[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(target, name, wrapped)


def ends(name):
    return lambda _, stage, finished: stage.name == name and finished


# (object, attribute, which call, of which calls, whether it is killed after the call)
DEATHS = [
    (pipeline, "new_folder", 1, lambda *_: True, False),  # nothing of the student is copied yet
    (Record, "set", 1, ends("data"), False),  # the rows are written, and not recorded
    (Manifest, "append", 1, lambda _, kind, **__: kind == "shard", True),
    (Record, "set", 1, ends("labels"), False),
    (resumable, "commit", 1, lambda *_: True, True),  # after the first checkpoint of the warm-up
    (resumable, "commit", 3, lambda *_: True, True),  # after the first of RL
    (Record, "set", 1, ends("evaluation/teacher"), False),
    (Record, "set", 1, ends("student"), True),
]


@pytest.mark.slow
def test_killed_runs_end_in_the_same_student(user, capsys, monkeypatch):
    """Between stages and inside them, one death after the other in a single run folder."""
    words = [*BASIC, *PROMPT, *SHORT, "--weak-start", "warn"]
    assert run(capsys, *words, "--out", "runs/undisturbed")[0] == 0
    for target, name, number, when, after in DEATHS[1:] + DEATHS[:1]:
        if Path("runs/mine/student").exists() and name == "new_folder":
            shutil.rmtree("runs/mine/student")
        with monkeypatch.context() as patch:
            done = len(list(Path("runs/mine").glob("*/checkpoint-*")))
            dying(patch, target, name, number - done if name == "commit" else number, when, after=after)
            with pytest.raises(Killed):
                run(capsys, *words)
    code, _, err = run(capsys, *words)
    assert code == 0, err
    for stage in ("warm-up", "rl", "student"):
        assert weights(f"runs/mine/{stage}") == weights(f"runs/undisturbed/{stage}"), stage


def test_a_signal_between_stages_and_inside_one(user, capsys, monkeypatch):
    """The message says to repeat the command, not how to resume a trainer."""
    import os
    import signal

    def stopped(words):
        if words[0] == "train":
            raise InterruptedRunError("stopped by SIGTERM: x is saved. Continue with --resume.", 15)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(command, "command", stopped)
    code, _, err = run(capsys, *BASIC, *PROMPT)
    assert (code, "stopped by SIGTERM before warm-up. Repeat the command to continue." in err) == (143, True), err
    monkeypatch.setattr(os, "kill", lambda *_: None)
    code, _, err = run(capsys, *BASIC, *PROMPT)
    assert (code, "warm-up: stopped by SIGTERM: x is saved. Repeat the command" in err) == (143, True), err
    monkeypatch.setattr(command, "command", lambda words: 9)
    code, _, err = run(capsys, *BASIC, *PROMPT)
    assert (code, "labels ended with exit code 9" in err) == (1, True), err


def no_weights(*_, **__):
    raise AssertionError("weights were loaded")


def test_a_dry_run_loads_and_writes_nothing(user, capsys, monkeypatch):
    monkeypatch.setattr("rlkd.models.loading.load_model", no_weights)
    code, out, err = run(capsys, *BASIC, *PROMPT, *SCORED, "--dry-run")
    assert code == 0, err
    assert not Path("runs").exists()
    sizes = [AutoModelForSeq2SeqLM.from_pretrained(name).num_parameters() for name in ("teacher", "student")]
    assert [f"{n}: {size:,} parameters" in out for n, size in zip(("teacher", "student"), sizes, strict=True)] == [
        True
    ] * 2
    assert "32 train rows, 4 validation rows, 4 test rows" in out
    listed = [line.split()[0] for line in out.splitlines() if " MB" in line]
    assert listed == [
        "data",
        "labels",
        "warm-up",
        "rl",
        "evaluation/teacher",
        "evaluation/warm-up",
        "evaluation/rl",
        "student",
    ]
    assert "32 answers of the teacher" in out
    assert "measured" in out


REFUSALS = [
    (["--input-column", "tex"], 3, "Did you mean 'text'"),
    (["--prompt", " "], 2, "prompt is empty"),
    (["--prompt", "reverse"], 2, "has no column, so the teacher would read the same for every row"),
    (["--prompt", "{{ txt }}"], 3, "Did you mean 'text'"),
    (["--prompt", "{{ text"], 3, "is not valid jinja"),
    (["--prompt", "{{ text }} {{ answer }}", "--reference-column", "answer"], 2, "the right answer, to the teacher"),
    (["--templates", "quora_para"], 2, "prompt and templates are both set"),
    (["--metric", "rouge"], 2, "needs reference_column"),
    (["--metric", "none", "--reference-column", "answer"], 2, "leave it and reference_column out"),
    (["--reference-column", "empty"], 3, "no row has a text in reference_column 'empty'"),
    (["--warm_up", '{"lerning_rate": 1}'], 2, "warm-up.yaml:"),
    (["--warm_up", '{"lerning_rate": 1}'], 2, "Did you mean 'learning_rate'"),
    (["--rl", '{"seed": 3}'], 2, "rl: seed is set by distill for all stages alike"),
    (["--rl", '{"lam": 2}'], 2, "lam = 2"),
    (["--rl", "fast"], 2, "must be a mapping of settings"),
    (["--teacher", "./teachr"], 2, "Did you mean 'teacher'"),
    (["--data", "row.csv"], 3, "Did you mean 'rows.csv'"),
    (["--eval-fraction", "1"], 2, "eval_fraction"),
    (["--student", "bart"], 2, "has 64 positions"),
    (["--student", "encoder"], 2, "is an encoder, which chooses among answers"),
    (["--student", "encoder", "--answer-choices", "a"], 2, "at least two answer choices"),
    (["--student", "encoder", "--answer-choices", "a|||b", "--reference-column", "answer"], 3, "not one of the answer"),
    (["--student_template", "quora_para"], 2, "names 4 templates"),
    (["--limit", "1"], 3, "too few different inputs"),
    (["--out", "mine"], 2, "holds something else: thesis.tex"),
    (["--out", "photos"], 2, "holds something else: summer"),
]


@pytest.mark.parametrize(
    ("words", "expected", "said"), REFUSALS, ids=[f"{r[0][0]}-{i}" for i, r in enumerate(REFUSALS)]
)
def test_mistakes_are_named_before_weights_load(user, capsys, monkeypatch, words, expected, said):
    monkeypatch.setattr("rlkd.models.loading.load_model", no_weights)
    for name in ("mine", "photos/summer"):
        Path(name).mkdir(parents=True)
    Path("mine/thesis.tex").write_text("x")
    write_rows([(text, "zz", "") for text in TEXTS], names=("text", "answer", "empty"))
    if "bart" in words:
        save_pretrained("bart", tiny_bart())
        words = [*words, "--max-input-tokens", "65"]
    code, _, err = run(capsys, *BASIC, *PROMPT, *words)
    assert (code, said in err) == (expected, True), err
    assert not Path("runs").exists()


def test_chats_are_those_of_every_stage(user, capsys, monkeypatch):
    """The teacher reads a chat wherever it reads; what is cut from it reads none unless asked."""
    save_pretrained("chatting", chat_model(), chat_tokenizer())
    called = []
    monkeypatch.setattr(command, "command", lambda words: called.append(words) or (words[0] == "evaluate") * 9)
    asked = ["--teacher", "chatting", "--student", "small", "--teacher-chat", "true", "--student-chat", "false"]
    asked += ["--teacher-system-prompt", "Be brief.", "--max-input-tokens", "100"]
    code, _, err = run(capsys, *BASIC, *PROMPT, *asked)
    assert (code, "evaluation/teacher ended with exit code 9" in err) == (1, True), err
    labels, warm_up, rl, teacher = called
    assert {"--teacher-chat", "--teacher-system-prompt=Be brief."} <= {*labels}
    assert {"--student-chat", "--student-system-prompt=Be brief."} <= {*teacher}
    for words in (warm_up, rl):
        settings = yaml.safe_load(Path(words[-1]).read_text())
        told = {name: value for name, value in settings.items() if "chat" in name or "system" in name}
        assert told == {"teacher_chat": True, "teacher_system_prompt": "Be brief.", "student_chat": False,
                        "student_system_prompt": None}  # fmt: skip
    code, _, err = run(
        capsys, *BASIC, *PROMPT, "--student", "encoder", "--answer-choices", "a|||b", "--student-chat", "true"
    )
    assert (code, "is an encoder, which reads no chats" in err) == (2, True), err


def test_neither_prompt_nor_templates(user, capsys):
    code, _, err = run(capsys, *BASIC)
    assert (code, "prompt and templates are both unset" in err) == (2, True)
    code, _, err = run(capsys, *BASIC, "--templates", "x", "--answer-choices", "a|||b")
    assert (code, "answer_choices go with prompt" in err) == (2, True)


def test_a_teacher_that_answers_nothing_ends_the_run(user, capsys):
    save_pretrained("silent", tiny_t5(tied=False, seed=0, width=32))
    model = AutoModelForSeq2SeqLM.from_pretrained("silent")
    model.lm_head.weight.data.zero_()  # the first of equal tokens is padding
    model.save_pretrained("silent")
    for _ in range(2):  # the labels are finished, and no better
        code, _, err = run(capsys, *BASIC, *PROMPT, "--teacher", "silent")
        assert code == 3
        assert "labels: the teacher has no answer to any of 32 rows (the answer is only padding tokens" in err


def test_several_processes_are_refused(user, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, *BASIC, *PROMPT)
    assert (code, "rlkd distill runs in one process" in err) == (2, True)


def quoted():
    """The arguments of README's `rlkd distill`, whose names are files here."""
    (line,) = re.findall(r"^rlkd distill (.*)$", (Path(__file__).parents[2] / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line)
    for option, name in (("--teacher", "teacher"), ("--student", "student")):
        shutil.copytree(name, words[words.index(option) + 1])
    shutil.copy("rows.csv", words[words.index("--data") + 1])
    return words


CONTINUED = """\
templates:
  x: !Template
    id: x
    name: ask
    jinja: 'reverse {{ text }} ||| {{ answer }}'
    metadata: !TemplateMetadata {}
"""


@pytest.mark.slow
def test_a_weak_student_is_the_result_of_its_warm_up_until_it_may_go_on(user, capsys):
    """README's command, without references; then a longer warm-up, and RL all the same."""
    words = [*quoted(), *SHORT, "--max-new-tokens", "5", "--max-input-tokens", "16", "--out", "runs/mine"]
    words += ["--weak-start", "refuse"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "RL is left out, and the warmed-up student is the result: not ready for RL" in out
    assert not Path("runs/mine/rl").exists()
    assert weights("runs/mine/student") == weights("runs/mine/warm-up")
    longer = [*words, "--warm_up", SHORT[1].replace('"max_steps": 4', '"max_steps": 6')]
    code, _, err = run(capsys, *longer)
    assert (code, "Remove that: rm -r" in err) == (2, True), err
    for stage in ("evaluation", "student"):
        shutil.rmtree(f"runs/mine/{stage}")
    code, out, err = run(capsys, *longer, "--weak-start", "warn")
    assert code == 0, err
    lines = [json.loads(line) for line in Path("runs/mine/warm-up/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_regret" in line] == [2, 4, 6]  # continued, not begun again
    assert "RL began weak: not ready for RL" in out
    assert_the_better_one_is_the_student(out, "regret", operator.le)


@pytest.mark.slow
def test_a_decoder_only_student_cut_from_its_teacher_and_test_rows_of_ones_own(user, capsys, caplog):
    """The rows to train on have no references, those of the test have."""
    words = [*WORDS[:3], "<s>", *WORDS[3:]]
    tokenizer = continuing_tokenizer(words)
    model = tiny_decoder("llama", words=len(words))
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    save_pretrained("decoder-teacher", model, tokenizer)
    write_rows([(text, "a") for text in (*TEXTS[:3], "a a a a")], "test.csv")
    write_rows([(text,) for text in TEXTS], names=("text",))
    Path("t.yaml").write_text(CONTINUED.replace(" ||| {{ answer }}", ""))
    words = [*BASIC, "--templates", "t.yaml", *SCORED, *SHORT, "--teacher", "decoder-teacher", "--student", "small"]
    code, out, err = run(capsys, *words, "--test-data", "test.csv", "--weak-start", "warn")
    assert code == 0, err
    assert "3 of 40 rows of rows.csv have inputs of test.csv: they are left out of training" in caplog.text
    found = {part: {row["text"] for row in rows} for part, rows in parts().items()}
    assert found["test"] == {*TEXTS[:3], "a a a a"}
    assert found["train"] | found["validation"] == set(TEXTS[3:])
    assert not found["train"] & found["validation"]
    assert "exact_match" in out
    teacher, start, student = (
        AutoModelForCausalLM.from_pretrained(name)
        for name in ("decoder-teacher", "runs/mine/start", "runs/mine/student")
    )
    assert [model.config.num_hidden_layers for model in (teacher, start, student)] == [2, 1, 1]
    embeddings = [model.get_input_embeddings().weight for model in (teacher, start, student)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[1], embeddings[2])
    tokenizer = AutoTokenizer.from_pretrained("runs/mine/student")
    exec(out[out.index("from transformers") :], {})
    (answer,) = eval(capsys.readouterr().out)
    inputs = tokenizer([TEXTS[0]], return_tensors="pt")
    ids = student.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    assert answer == tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_a_student_of_another_vocabulary_is_paid_by_text(user, capsys):
    """What the recommended settings need of a shared vocabulary gives way; asked for, it is refused first."""
    vocabulary = [*WORDS[:3], "<s>", *WORDS[:2:-1]]
    model = tiny_decoder("llama", words=len(vocabulary), bos_token_id=3, eos_token_id=1)
    save_pretrained("other", model, continuing_tokenizer(vocabulary))
    words = [*BASIC, *PROMPT, *SCORED, *SHORT, "--student", "other"]
    code, _, err = run(capsys, *words, "--rl", '{"one_step": "exact"}')
    assert (code, "rl.yaml" in err, "which has another vocabulary than the student" in err) == (2, True, True), err
    code, out, _ = run(capsys, *words, "--dry-run")
    assert (code, out.count("have different vocabularies")) == (0, 1)
    assert not Path("runs").exists()
    code, _, err = run(capsys, *words)
    assert code == 0, err
    settings = json.loads(Path("runs/mine/rl/run.json").read_text())["settings"]
    assert (settings["one_step"], settings["lam"]) == ("sampled", 0.2)
    assert isinstance(AutoModelForCausalLM.from_pretrained("runs/mine/student"), type(model))
    assert AutoTokenizer.from_pretrained("runs/mine/student").get_vocab() == {w: i for i, w in enumerate(vocabulary)}


@pytest.mark.slow
@pytest.mark.parametrize("references", [False, True])
def test_an_encoder_learns_the_probabilities_of_choices(user, capsys, references):
    """Its teacher's accuracy, or its agreement with itself, from transformers' own log-probabilities of the choices."""
    teacher = AutoModelForSeq2SeqLM.from_pretrained("teacher").eval()
    tokenizer, choices = tiny_tokenizer(), ["a", "b", "c"]

    def ranked(text):
        asked = tokenizer(f"reverse {text}", return_tensors="pt")
        scores = []
        for choice in choices:
            ids = tokenizer(choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = teacher(**asked, labels=ids).logits[0, :, :VALID]
            scores.append(float(logits.log_softmax(-1).gather(-1, ids[0, :, None]).sum()))
        return torch.tensor(scores).softmax(0)

    own = {text: choices[int(ranked(text).argmax())] for text in TEXTS}
    write_rows([(text, own[text] if i % 3 else "B") for i, text in enumerate(TEXTS)])
    words = [*BASIC, *PROMPT, "--student", "encoder", "--answer-choices", "a ||| b ||| c"]
    words += ["--reference-column", "answer"] if references else []
    code, out, err = run(capsys, *words, "--warm_up", '{"num_train_epochs": 2, "learning_rate": 1e-3}')
    assert code == 0, err
    for row in pq.read_table("runs/mine/labels/labels-00000.parquet").to_pylist()[:8]:
        scores = torch.tensor(row["choice_logprobs"]).softmax(0)
        torch.testing.assert_close(scores, ranked(row["student_input"]), rtol=1e-3, atol=1e-4)
        assert row["references"] == []
    test = parts()["test"]
    right = (
        [own[row["text"]] in [r.casefold() for r in row.get("answer", "x")] for row in test] if references else [True]
    )
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("teacher ", "student "))}
    assert float(table["teacher"][1]) == pytest.approx(sum(right) / len(right), abs=0.01)
    exec(out[out.index("from transformers") :], {})
    assert eval(capsys.readouterr().out)[0]["label"] in choices


def test_templates_of_one_encoder_have_the_same_choices(user, capsys):
    two = CONTINUED.replace("jinja", "answer_choices: a ||| b\n    jinja")
    Path("t.yaml").write_text(
        two + two.partition("\n")[2].replace("x", "y").replace("name: ask", "name: b").replace("a |||", "c |||")
    )
    code, _, err = run(capsys, *BASIC, "--templates", "t.yaml", "--student", "encoder")
    assert (code, "they are the labels of one encoder" in err) == (2, True), err
    save_pretrained("odd", tiny_classifier(layers=2), tiny_tokenizer())
    code, _, err = run(capsys, *BASIC, *PROMPT, "--answer-choices", "a|||b", "--student", "odd")
    assert (code, "do not begin with a [CLS] token" in err) == (2, True), err


def test_a_file_has_the_same_keys(user, capsys):
    lines = ["teacher: teacher", "student: student", "data: rows.csv", "input_column: text", "out: runs/x"]
    lines += ['prompt: "reverse {{ text }}"', "max_new_tokens: 5", "warm_up: {max_steps: 6}"]
    Path("mine.yaml").write_text("\n".join(lines))
    code, out, err = run(capsys, "--config", "mine.yaml", "--max-input-tokens", "16", "--dry-run")
    assert code == 0, err
    assert "at most 6 updates" in out
    said, settings = [], yaml.safe_load(Path("mine.yaml").read_text())
    assert distill(DistillArguments(**settings, max_input_tokens=16, dry_run=True), said.append) == Path(
        "runs/x/student"
    )
    assert "\n".join(said).splitlines()[:4] == out.splitlines()[:4]
    with pytest.raises(ConfigError, match="prompt and templates are both set"):
        distill(DistillArguments(**settings, templates=["x"]))
    assert run(capsys, "--config", "mine.yaml", "--promt", "x")[0] == 2
