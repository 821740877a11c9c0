"""Whose labels a student learns is said, compared with the run's teacher and settings, and kept with the student."""

import json
import logging
import shutil

import datasets
import pytest

import stub
from rlkd.io.provenance import origins
from rlkd.jobs.setup import DataArguments, load_data
from rlkd.labels.pseudolabels import generate_pseudolabels
from rlkd.labels.store import load_pseudolabels
from rlkd.records import Example
from rlkd.sampling.engines.protocol import Decoding
from rlkd.trainers.arguments import SupervisedArguments
from rlkd.trainers.supervised import SupervisedTrainer
from tiny import save_pretrained, tiny_t5, tiny_teacher, tiny_tokenizer

EXAMPLES = [Example(str(i), text, (f"copy {text}",)) for i, text in enumerate(["a b", "c", "1 2 3", "d e f"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "out"
    teacher = tiny_teacher(seed=3)
    teacher.lm.model.config.name_or_path = "owner/oracle"
    teacher.lm.model.name_or_path = "owner/oracle"
    generate_pseudolabels(teacher, EXAMPLES, out=out, template_names=["copy"], decoding=Decoding("greedy", 4))
    return out


def train(rows, out, teacher=None):
    """One step; run.json and the card."""
    args = SupervisedArguments(str(out), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SupervisedTrainer(tiny_t5(), args, tokenizer=tiny_tokenizer(), train_dataset=rows, teacher=teacher)
    trainer.run()
    return json.loads((out / "run.json").read_text())["data"]["train"], (out / "README.md").read_text()


def test_the_run_and_its_card_keep_who_made_the_labels(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rlkd"):
        kept, card = train(load_pseudolabels(folder).select(range(3)), tmp_path / "run")
    header = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    assert (kept["source"], kept["rows"]) == (str(folder), 3)
    (made,) = kept["labels"]
    assert (made["teacher"], made["templates"], made["strategy"]) == ("owner/oracle", ["copy"], "greedy")
    assert made["revision"] == header["settings"]["teacher_weights"]
    assert (made["data"], made["vocabulary"]) == (header["settings"]["source"], header["vocabulary"])
    assert "labels: answers of owner/oracle" in card
    assert header["settings"]["source"]["sha256"] in card
    assert "made in memory" not in card
    assert "labels: answers of owner/oracle" in caplog.text


def test_labels_that_lost_their_folder_are_known_by_their_columns(folder, tmp_path):
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    kept, card = train(rows, tmp_path / "run")
    assert [(made["teacher"], made["templates"]) for made in kept["labels"]] == [("owner/oracle", ["copy"])]
    assert "labels: answers of owner/oracle" in card
    plain = [{"student_input": "a", "label": "b"}]
    kept, card = train(plain, tmp_path / "plain")
    assert "labels" not in kept
    assert "labels: answers" not in card


@pytest.mark.parametrize(
    ("seed", "name", "told"),
    [
        (3, "owner/oracle", False),
        (3, "/moved/oracle", False),  # the weights decide
        (4, "owner/oracle", True),  # trained further under its old name
        (4, "other/teacher", True),
    ],
)
def test_another_teacher_is_told(folder, tmp_path, caplog, seed, name, told):
    teacher = tiny_teacher(seed=seed)
    teacher.lm.model.config.name_or_path = name
    train(load_pseudolabels(folder), tmp_path / "run", teacher)
    assert ("the labels are answers of owner/oracle" in caplog.text) is told
    assert (f"not of this run's teacher {name}" in caplog.text) is told


@pytest.mark.parametrize("append_eos", [True, False])
def test_prompts_that_end_otherwise_are_told(folder, tmp_path, caplog, append_eos):
    labels = load_pseudolabels(folder)
    theirs = origins(labels)[0]["settings"]["append_eos"]
    teacher = tiny_teacher(seed=3, append_eos=append_eos)
    train(labels, tmp_path / "run", teacher)
    assert ("were written with teacher_append_eos" in caplog.text) is (theirs != append_eos)


TEMPLATES = "templates:\n  t1: !Template {name: some, jinja: 'copy {{ text }} ||| x'}\n"


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"templates": []}, ["templates: some ("]),
        ({"templates": ["other.yaml"]}, ["templates: some ("]),
        ({"dataset": "other.jsonl"}, ["dataset: "]),
        ({"input_column": "more"}, ["input: 'text' -> 'more'"]),
        ({"column_map": ["more=less"]}, ["row_map: "]),
        ({"student_template": "other.yaml"}, ["student_template: None -> 'say {{ text }} ||| x'"]),
    ],
    ids=str,
)
def test_other_templates_data_and_columns_are_told(tmp_path, monkeypatch, caplog, change, lines):
    from rlkd.templates.template import load_templates

    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"a {i}", "more": "b"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    shutil.copy("rows.jsonl", "copy.jsonl")
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    (tmp_path / "other.yaml").write_text(TEMPLATES.replace("copy", "say"))
    stub.label(tmp_path / "rows.jsonl", tmp_path / "out", templates=tuple(load_templates("t.yaml")))
    settings = {"dataset": "copy.jsonl", "input_column": "text", "templates": ["t.yaml"], "reference_column": None}
    load_data(DataArguments(**{**settings, "eval_dataset": "rows.jsonl", "pseudo_labels": "out"} | change))
    assert ("made otherwise than this run's settings say" in caplog.text) is bool(lines)
    for line in lines:
        assert f"\n  {line}" in caplog.text


def test_a_saved_teacher_under_another_path_is_the_same(tmp_path, caplog):
    """By name where the precisions differ: one folder, named relatively and absolutely."""
    from rlkd.labels.makers import announce

    teacher = tiny_teacher().lm.model
    save_pretrained(tmp_path / "teacher", teacher)
    teacher.config.name_or_path = str(tmp_path / "teacher")
    made = {"teacher": str(tmp_path / "x" / ".." / "teacher"), "revision": "?", "dtype": "bfloat16", "templates": ["t"]}
    announce([made], [(teacher, "weights")])
    assert "the labels are answers of" not in caplog.text
    announce([made | {"teacher": "other"}], [(teacher, "weights")])
    assert "the labels are answers of other" in caplog.text
