"""Teachers whose labels are not those of the loss or of the data are refused before weights load, or it is said."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlkd import (
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    TKDTrainer,
    build_student,
    prepare_encoders,
)
from rlkd.data.glue import TableLayout, load_labelled
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.encoders.labels import check_same_labels
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

ROWS = [{"text": f"{a} {b}", "label": ("no", "yes")[a < b]} for a in "abcde" for b in "abcde"]


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)


def teacher_folder(folder, *, labels=2, **facts):
    """A tiny classifier whose config.json says `facts` besides."""
    save_pretrained(folder, tiny_classifier(labels=labels), classifier_tokenizer())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def table(folder, rows=ROWS):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(folder, teacher, *, finetuned=True, preset="kd", rows=ROWS, labels=None, **student):
    return prepare_encoders(
        LabelledDataArguments(train_file=str(table(folder, rows)), labels=labels),
        EncoderTeacherArguments(teacher=str(teacher), teacher_finetuned=finetuned),
        EncoderStudentArguments(student_layers=2, **student),
        TKDArguments(str(folder / "out"), preset=preset, max_length=16, use_cpu=True, report_to="none"),
    )


NAMED = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
OTHERS = {
    "multi-label": ({"problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
    "multi-label, named": (
        {"problem_type": "multi_label_classification"} | NAMED, "any number of labels .* one of several labels is",
    ),
    "regression of two": ({"problem_type": "regression"}, "problem_type regression"),
    "sigmoid outputs": ({"function_to_apply": "sigmoid"}, "function_to_apply sigmoid"),
    "softmax and sigmoid": (
        {"problem_type": "single_label_classification", "function_to_apply": "sigmoid"}, "does not go with pro",
    ),
    "another function": ({"function_to_apply": "tanh"}, "function_to_apply tanh, which does not go with"),
    "raw outputs": ({"function_to_apply": "none"}, "function_to_apply none"),
    "one output": ({"id2label": {"0": "score"}, "label2id": {"score": 0}}, "has 1 label"),
    "regression of one": (
        {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, "regression",
    ),
    "labels from 1": ({"id2label": {"1": "no", "2": "yes"}, "label2id": {"no": 1, "yes": 2}}, "from 0 without gaps"),
    "a name twice": ({"id2label": {"0": "yes", "1": "Yes"}, "label2id": {}}, "two labels 'yes'"),
    "contradiction": ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 1, "yes": 0}}, "contradicts itself"),
    "permuted": ({"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}, None),
    "other names": (
        {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}, "labels not in the label set",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_teacher_with_other_labels(tmp_path, no_weights, kind):
    """Refused from its configuration, or (its own order) followed by the data."""
    facts, message = OTHERS[kind]
    teacher = teacher_folder(tmp_path / "teacher", **facts)
    if message is None:
        setup = prepare(tmp_path, teacher)
        assert setup.data.labels == ("yes", "no")
        assert {row["text"]: row["label"] for row in setup.data.train + setup.data.first_dev}["a b"] == 0
        with pytest.raises(ConfigError, match=r"has the labels yes, no, in this order, and labels has no, yes"):
            prepare(tmp_path, teacher, labels=["no", "yes"])
        return
    with pytest.raises((ModelError, DataError), match=message):
        prepare(tmp_path, teacher)


@pytest.mark.parametrize("kind", ["multi-label", "regression of two", "sigmoid outputs", "regression of one"])
def test_a_head_that_is_replaced_leaves_nothing_to_the_student(tmp_path, kind):
    """Fine-tuned here, such a checkpoint becomes a single-label teacher, and so does its student."""
    teacher = teacher_folder(tmp_path / "teacher", **OTHERS[kind][0])
    setup = prepare(tmp_path, teacher, finetuned=False)
    own = setup.new_student(setup.load_teacher(str(teacher)))
    for config in (setup.teacher_config, own.config):
        assert config.problem_type == "single_label_classification"
        assert config.id2label == {0: "no", 1: "yes"}
        assert not hasattr(config, "function_to_apply")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_trainer_refuses_models_of_two_problems(tmp_path, role):
    teacher, student = tiny_classifier(), tiny_classifier(layers=2)
    (teacher if role == "teacher" else student).config.problem_type = "multi_label_classification"
    args = TKDArguments(str(tmp_path), preset="kd", use_cpu=True, report_to="none", max_length=16)
    rows = [{"text": "a b", "label": 0}, {"text": "b a", "label": 1}]
    words = {"teacher": ("any number of labels", "one of several labels")}
    one, other = words.get(role, ("one of several labels", "any number of labels"))
    with pytest.raises(ModelError, match=f"the teacher gives each text {one} and the student {other}"):
        TKDTrainer(student, args, teacher=teacher, tokenizer=classifier_tokenizer(), train_rows=rows)


def test_two_outputs_are_no_regression(tmp_path):
    teacher = tiny_classifier()
    teacher.config.problem_type = "regression"
    with pytest.raises(ModelError, match="teacher 'bert' has 2 outputs: a regression model gives one number here"):
        build_student(teacher, 2)


def test_labels_of_teacher_and_student_in_another_order():
    teacher, student = tiny_classifier().config, tiny_classifier().config
    teacher.id2label, student.id2label = {0: "no", 1: "yes"}, {0: "yes", 1: "no"}
    with pytest.raises(ModelError, match=r"teacher's labels are no, yes, in this order, and the student's are yes, no"):
        check_same_labels(student, teacher)
    student.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    check_same_labels(student, teacher)
    student.id2label = {0: "No", 1: "Yes"}
    check_same_labels(student, teacher)


@pytest.mark.parametrize(("names", "kept"), [(("no", "yes"), True), (("yes", "no"), False), (None, False)])
def test_the_head_of_a_pretrained_student_is_kept_only_with_the_same_labels(tmp_path, names, kept):
    other = tiny_classifier(seed=5)
    if names:
        other.config.id2label = dict(enumerate(names))
    other.config.problem_type = "multi_label_classification"
    other.save_pretrained(tmp_path)
    teacher = tiny_classifier()
    teacher.config.id2label = {0: "no", 1: "yes"}
    student = build_student(teacher, 2, "pretrained", pretrained=str(tmp_path))
    assert torch.equal(student.classifier.weight, other.classifier.weight) is kept
    assert torch.equal(student.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert student.config.problem_type == "single_label_classification"


def test_guesses_about_labels_are_said(tmp_path, no_weights, caplog):
    caplog.set_level(logging.WARNING, "rlkd")
    prepare(tmp_path, teacher_folder(tmp_path / "unnamed"))
    assert "does not name its labels: its outputs are taken for no, yes, in this order" in caplog.text
    caplog.clear()
    numbers = [row | {"label": int(row["label"] == "yes")} for row in ROWS]
    named = teacher_folder(tmp_path / "named", **NAMED)
    prepare(tmp_path, named, rows=numbers)
    assert "numbers its labels: they are taken for the fine-tuned teacher's, 0 = no, 1 = yes" in caplog.text
    caplog.clear()
    prepare(tmp_path, named)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("label", "message"), [(["yes", "no"], "not one label"), ([], "not one label"), ({"yes": 1}, "not one label"),
                           (0.35, "regression")],
)  # fmt: skip
@pytest.mark.parametrize("labels", [None, ["no", "yes"]])
def test_rows_of_other_tasks_are_refused(tmp_path, no_weights, label, message, labels):
    rows = [{"text": row["text"], "label": label} for row in ROWS]
    with pytest.raises(DataError, match=rf"rows.jsonl', row 0: column 'label' contains .*{message}.*single-label"):
        prepare(tmp_path, teacher_folder(tmp_path / "t"), finetuned=False, rows=rows, labels=labels)


def test_names_of_a_data_set_decide_not_its_numbers(tmp_path):
    """A parquet file that carries its class names in another order than the teacher's."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(str(path))
    rows = load_labelled(str(path), TableLayout(), labels=("no", "yes"))
    assert [row["label"] for row in rows] == [1, 0]
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n{"text": "b", "label": null}\n')
    assert [row["label"] for row in load_labelled(str(numbers), TableLayout(), labels=("no", "yes"))] == [1, 0, None]
