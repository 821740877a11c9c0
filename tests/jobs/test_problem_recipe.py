"""The recipe on texts with several labels and on pairs with a number: from a file to a table and a page; what it
refuses before weights load.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction

from rlkd import (
    TRAINING_JOBS,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    prepare_encoders,
)
from rlkd.data.probe_rows import read_tables
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.report.page import report
from rlkd.report.reading import read_arms
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

MULTI, REGRESSION = "multi_label_classification", "regression"
TEXTS = [f"{a} {b} {c}" for a in "abcdefgh" for b in "xy" for c in "ij"]


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)


def lists(folder):
    path = folder / "lists.jsonl"
    rows = [{"text": text, "label": [k for k in ("x", "i") if k in text.split()]} for text in TEXTS]
    rows[5]["label"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(folder):
    path = folder / "pairs.csv"
    lines = [f"{text},{text[::-1]},{index % 4}" for index, text in enumerate(TEXTS)]  # whole numbers only
    path.write_text("text,text_pair,stars\n" + "\n".join(lines) + "\n")
    return str(path)


def encoder(folder, kind=None, labels=2, names=()):
    model = tiny_classifier(labels=labels)
    model.config.problem_type = kind
    if names:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return save_pretrained(folder / "encoder", model, classifier_tokenizer())


def settings(folder, teacher, data, *, finetuned=False, student=None, **training):
    return (
        LabelledDataArguments(**data),
        EncoderTeacherArguments(teacher=str(teacher), teacher_finetuned=finetuned, teacher_epochs=1),
        EncoderStudentArguments(student_layers=2, **student or {}),
        TKDArguments(
            str(folder / "out"), use_cpu=True, report_to="none", disable_tqdm=True, max_length=16,
            learning_rate=3e-3, **{"preset": "kd", "max_steps": 2, **training},
        ),
    )  # fmt: skip


def outputs(folder, rows):
    """Logits [rows, C] by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[row["text"] for row in rows], [row["text_pair"] for row in rows]]
    read = tokenizer(*(part for part in texts if part[0] is not None), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**read).logits.numpy()


@pytest.mark.slow
def test_texts_with_several_labels_become_a_small_classifier(tmp_path, capsys):
    data = {"train_file": lists(tmp_path), "problem_type": MULTI, "dev_fraction": 0.3}
    given = settings(tmp_path, encoder(tmp_path), data, student={"assistant_layers": [3]}, preset="tkd")
    TRAINING_JOBS["tkd"].run(*given)
    screen, out = capsys.readouterr().out, tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert "2 labels: i, x; 8 of 32 rows have none of them, and of 1 they are not known" in screen
    assert "no confusion matrix and no calibration error" in screen
    assert "the commonest set of training labels" in screen
    assert (summary["problem_type"], summary["labels"]) == (MULTI, ["i", "x"])
    dev = prepare_encoders(*given).data.first_dev
    true = np.array([[float(k in row["label"]) for k in range(2)] for row in dev])
    for role, folder in (("teacher", out / "teacher"), ("student", out)):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert (model.config.problem_type, model.config.id2label) == (MULTI, {0: "i", 1: "x"})
        predicted = outputs(folder, dev) > 0
        scores = summary[role]["scores"]["dev"]
        assert scores["subset_accuracy"] == pytest.approx((predicted == true).all(1).mean())
        assert scores["score"] == pytest.approx((scores["micro_f1"] + scores["macro_f1"]) / 2)
        assert [c["rows"] for c in summary[role]["classes"]["dev"]] == true.sum(0).tolist()
        assert summary[role]["confusion"] == summary[role]["ece"] == {}
    assert AutoModelForSequenceClassification.from_pretrained(out / "assistant-1").config.problem_type == MULTI
    page = report(read_arms(out), "lists")
    assert "Each label" in page
    assert "subset accuracy" in page.replace("_", " ")


def test_pairs_with_a_number_become_a_small_model(tmp_path, capsys):
    data = {"train_file": pairs(tmp_path), "problem_type": REGRESSION, "pair_column": "text_pair",
            "label_column": "stars", "dev_fraction": 0.3}  # fmt: skip
    given = settings(tmp_path, encoder(tmp_path), data, eval_strategy="steps", eval_steps=1)
    TRAINING_JOBS["tkd"].run(*given)
    screen, out = capsys.readouterr().out, tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert "numbers from 0 to 3, 0 rows without one" in screen
    assert "no scores of each label, no confusion matrix and no calibration error: the labels are numbers" in screen
    rows = prepare_encoders(*given).data
    dev, mean = rows.first_dev, np.mean([row["label"] for row in rows.train])
    assert f"'{mean:.4g}', the mean of the training numbers" in screen
    assert len(dev) == 10
    true = np.array([row["label"] for row in dev])
    for role, folder in (("teacher", out / "teacher"), ("student", out)):
        config = AutoModelForSequenceClassification.from_pretrained(folder).config
        assert (config.problem_type, config.num_labels, config.id2label) == (REGRESSION, 1, {0: "stars"})
        squares = (outputs(folder, dev)[:, 0] - true) ** 2
        assert summary[role]["scores"]["dev"]["mean_squared_error"] == pytest.approx(squares.mean(), rel=1e-4)
        assert summary[role]["classes"] == {}
    assert summary["majority"]["scores"]["dev"]["mean_squared_error"] == pytest.approx(((true - mean) ** 2).mean())
    page = report(read_arms(out), "pairs")
    assert "predicted: " in page
    assert "Each label" not in page


def test_a_fine_tuned_teacher_is_followed_in_the_order_of_its_labels(tmp_path, no_weights, caplog):
    teacher = encoder(tmp_path, MULTI, names=("x", "i"))
    data = {"train_file": lists(tmp_path), "problem_type": MULTI}
    setup = prepare_encoders(*settings(tmp_path, teacher, data, finetuned=True))
    assert setup.data.labels == ("x", "i")
    assert {row["text"]: row["label"] for row in setup.data.train + setup.data.first_dev}["a x j"] == [0]
    with pytest.raises(ConfigError, match="has the labels x, i, in this order, and labels has i, x"):
        prepare_encoders(*settings(tmp_path, teacher, data | {"labels": ["i", "x"]}, finetuned=True))
    assert caplog.text == ""
    unsaid = encoder(tmp_path, None, names=("x", "i"))
    prepare_encoders(*settings(tmp_path, unsaid, data, finetuned=True))
    assert (
        "does not say what its outputs are (problem_type in config.json): they are taken for those of multi"
        in caplog.text
    )


TEACHERS = {
    "one label for several": (MULTI, "single_label_classification", 2, "one of several labels .* any number of"),
    "numbers for several": (MULTI, REGRESSION, 1, "a number .* any number of labels is wanted"),
    "several for numbers": (REGRESSION, MULTI, 2, "any number of labels .* a number is wanted"),
    "two numbers for one": (REGRESSION, REGRESSION, 2, "has 2 outputs: a regression model gives one number"),
    "three labels for two": (MULTI, MULTI, 3, "has 3 labels, and lists has 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers_of_another_problem_are_refused(tmp_path, no_weights, case):
    kind, stated, labels, message = TEACHERS[case]
    data = {"train_file": lists(tmp_path), "problem_type": kind} if kind == MULTI else {
        "train_file": pairs(tmp_path), "problem_type": kind, "label_column": "stars", "pair_column": "text_pair",
    }  # fmt: skip
    with pytest.raises(ModelError, match=message):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path, stated, labels), data, finetuned=True))


FILES = {
    "one set of labels": ([["a"]] * 6, MULTI, "only the label 'a'"),
    "one number": ([2, 2, 2, 2], REGRESSION, "only the label '2'"),
    "names without a separator": (["a,b", "a", "b", "b"], MULTI, "set label_separator"),
    "words for numbers": (["a", "b"], REGRESSION, "row 0: column 'label' contains 'a', not a finite number"),
    "lists for one label": ([["a"], ["b"]], None, "train with problem_type: multi_label_classification"),
    "fractions for one label": ([0.5, 1.5], None, "train with problem_type: regression"),
    "texts": ([["one"], ["two"], ["three"], ["four"]], MULTI, "has 4 values in 4 rows"),
    "no number": ([None, None], REGRESSION, "has no label in its 2 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_another_problem_are_refused(tmp_path, no_weights, case):
    values, kind, message = FILES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": v}) + "\n" for i, v in enumerate(values)))
    with pytest.raises(DataError, match=message):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path), {"train_file": str(path), "problem_type": kind}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_file": "x", "problem_type": REGRESSION, "labels": ["a"]}, "labels is set, and problem_type is regr"),
        ({"train_file": "x", "label_separator": ";"}, "label_separator = ';': separates the labels"),
        ({"train_file": "x", "problem_type": MULTI, "label_separator": ""}, "and is not empty"),
        ({"pseudo_labels": "x", "problem_type": MULTI}, "problem_type is multi_label_classification and pseudo"),
        ({"pseudo_labels": "x", "task": "stsb"}, "problem_type is regression and pseudo_labels is"),
        ({"task": "sst2", "problem_type": REGRESSION}, "task sst2 is of single_label_classification. Leave it out"),
        ({"task": "stsb", "metrics": ["accuracy"]}, "metrics: accuracy: under problem_type regression, pearson, sp"),
        ({"task": "stsb", "metrics": ["mean_squared_error"]}, "pearson, spearman are allowed, whose mean is `score`"),
        ({"train_file": "x", "metrics": ["micro_f1"]}, "under problem_type single_label_classification, accuracy, f1"),
    ],
)  # fmt: skip
def test_settings_without_meaning_under_a_problem_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        LabelledDataArguments(**data)


def test_a_temperature_is_refused_before_anything_is_read(tmp_path, no_weights):
    data = {"train_file": str(tmp_path / "none.csv"), "problem_type": REGRESSION}
    with pytest.raises(ConfigError, match="temperature = 2: has no effect under problem_type regression"):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path), data, temperature=2.0))


def test_probes_have_one_label_a_row(tmp_path):
    with pytest.raises(DataError, match=r"row 0: column 'label' contains .*, not one label, and this is single-label"):
        read_tables(lists(tmp_path), lists(tmp_path))


def test_the_output_of_a_run_that_was_continued_is_kept(tmp_path):
    """A finished teacher of numbers is not fine-tuned again, and is refused for another problem."""
    data = {"train_file": pairs(tmp_path), "problem_type": REGRESSION, "label_column": "stars",
            "pair_column": "text_pair"}  # fmt: skip
    teacher = encoder(tmp_path)
    TRAINING_JOBS["tkd"].run(*settings(tmp_path, teacher, data, max_steps=1))
    before = (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes()
    other = data | {"problem_type": "single_label_classification"}
    with pytest.raises(ConfigError, match="was fine-tuned with labels"):
        TRAINING_JOBS["tkd"].run(*settings(tmp_path, teacher, other, max_steps=1))
    assert Path(tmp_path / "out" / "teacher" / "model.safetensors").read_bytes() == before


def test_one_label_that_a_text_has_or_not(tmp_path, no_weights):
    """Multi-label with a single label: one output."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": ["x"] if "x" in text else []} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = prepare_encoders(*settings(tmp_path, encoder(tmp_path), {"train_file": str(path), "problem_type": MULTI}))
    assert (setup.data.labels, setup.teacher_config.num_labels, setup.teacher_config.problem_type) == (("x",), 1, MULTI)
    prediction = EvalPrediction(np.array([[1.0], [-1.0], [1.0]]), np.array([[1.0], [1.0], [0.0]]))
    found = setup.data.compute_metrics()(prediction)
    assert found == pytest.approx({"score": 0.5, "micro_f1": 0.5, "macro_f1": 0.5, "subset_accuracy": 1 / 3})
