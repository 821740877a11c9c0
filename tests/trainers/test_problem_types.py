"""Students of several labels a text, and of numbers: learned as transformers' own models learn them, from labels and
from a teacher; resumed exactly; saved as what they are.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from test_tkd import LETTERS, make, one_batch
from test_tkd import rows as letters
from transformers import AutoConfig, pipeline

from rlkd.data.labelled import EncodedTexts, model_inputs
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.evaluation.problems import PROBLEMS
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.classifiers import build_student
from rlkd.models.encoders.labels import check_same_labels
from rlkd.trainers.encoders.terms import TERMS
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier
from tiny_runs import assert_same, logged, weights

MULTI, REGRESSION = "multi_label_classification", "regression"
OUTPUTS = {MULTI: 3, REGRESSION: 1}
KINDS = [MULTI, REGRESSION]


def rows(kind, n=12, **options):
    """The labels say which of a, e, z a text has; the number is the share of its letters before m."""
    made = letters(n, **options)
    for row in made:
        words = row["text"].split()
        if kind == MULTI:
            row["label"] = [k for k, letter in enumerate("aez") if letter in words]
        else:
            row["label"] = sum(word < "m" for word in words) / len(words)
    return made


def classifier(kind, family="bert", **options):
    model = tiny_classifier(family, labels=OUTPUTS[kind], **options)
    model.config.problem_type = kind
    return model


def trainer(kind, folder, family="bert", **options):
    options = {"train": rows(kind), "teacher": classifier(kind, family), **options}
    return make(folder, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "bilstm"])
def test_fine_tuning_has_the_loss_and_the_gradient_of_transformers(tmp_path, kind, family):
    if family == "bilstm":
        config = BiLSTMConfig(vocab_size=30, embedding_size=8, hidden_size=4, dropout=0.0, num_labels=OUTPUTS[kind],
                              problem_type=kind)  # fmt: skip
        model = BiLSTMForSequenceClassification(config)
    else:
        model = classifier(kind, family)
    tuned = make(tmp_path, model=model, teacher=None, preset="ft", train=rows(kind))
    batch = one_batch(tuned)
    tuned.compute_loss(tuned.model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = model(**model_inputs(batch), labels=batch["labels"]).loss
    own.backward()
    assert found
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_term_trains_and_kd_is_that_of_the_problem(tmp_path, kind):
    terms = dict.fromkeys(TERMS, 1.0)
    one = trainer(kind, tmp_path, preset="custom", terms=terms)
    batch = one_batch(one)
    outputs = [m(**model_inputs(batch)).logits.detach() for m in (one.trained.student, one.teacher)]
    expected = PROBLEMS[kind].distillation(*outputs, 5.0)
    one.train()
    first, second = (line for line in logged(tmp_path) if "loss" in line)
    assert all(math.isfinite(line[name]) for line in (first, second) for name in terms)
    read = one.batch(batch, *(type(one.trained(model_inputs(batch)))(z) for z in outputs))
    assert float(TERMS["kd"].loss(read)) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", [MULTI, pytest.param(REGRESSION, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    """Killed twice, in two epochs, with rows whose labels are not known and rows that have none of them."""
    data = [{**row, "label": None} if i % 5 == 3 else row for i, row in enumerate(rows(kind))]
    assert kind == REGRESSION or any(row["label"] == [] for row in data)
    options = {"train": data, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "preset": "tkd", "seed": 5,
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    straight = trainer(kind, tmp_path / "straight", **options)
    straight.train()
    for step in (2, 4):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        source = tmp_path / ("straight" if step == 2 else "from-2") / f"checkpoint-{step}"
        shutil.copytree(source, folder / source.name)
        resumed = trainer(kind, folder, **options)
        resumed.train(resume_from_checkpoint=str(folder / source.name))
        assert_same(weights(straight.trained.student), weights(resumed.trained.student))


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_student_says_what_it_is_and_pipelines_answer_as_it_was_evaluated(tmp_path, kind):
    dev = rows(kind, 6, seed=2)
    teacher = classifier(kind)
    if kind == MULTI:
        teacher.config.id2label = {0: "a", 1: "e", 2: "z"}
    one = trainer(kind, tmp_path, teacher=teacher, dev=dev, preset="kd", learning_rate=3e-3)
    one.run()
    assert AutoConfig.from_pretrained(tmp_path).problem_type == kind
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    last = [row for row in held_out if row["step"] == 2]
    answer = pipeline("text-classification", model=str(tmp_path), device="cpu")
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    numbers = logged(tmp_path)[-1] | {k: v for line in logged(tmp_path) for k, v in line.items() if "eval_" in k}
    if kind == MULTI:
        for row, labels in zip(last, answer([row["input"] for row in last], top_k=None), strict=True):
            above = sorted("aez".index(one["label"]) for one in labels if one["score"] > 0.5)
            assert row["predicted"] == above
            assert row["subset_accuracy"] == (above == row["label"])
        assert 'classify("A text.", truncation=True, max_length=32, top_k=None)' in card
        assert "labels with a score above 0.5" in card
        assert numbers["eval_subset_accuracy"] == pytest.approx(np.mean([row["subset_accuracy"] for row in last]))
    else:
        found = [one["score"] for one in answer([row["input"] for row in last])]
        assert [row["predicted"] for row in last] == pytest.approx(found, abs=1e-5)
        assert [row["label"] for row in last] == pytest.approx([row["label"] for row in dev])
        assert "# The score is the number." in card
        assert numbers["eval_pearson"] == pytest.approx(
            stats.pearsonr(found, [row["label"] for row in dev])[0], abs=1e-4
        )
        assert numbers["eval_loss"] == pytest.approx(numbers["eval_mean_squared_error"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_cached_or_gone_teaches_the_same(tmp_path, kind):
    teacher, data = classifier(kind), rows(kind)
    there = trainer(kind, tmp_path / "there", teacher=teacher, preset="kd")
    batch = one_batch(there, 12)
    logits = there.teacher_outputs(batch, {"logits"}).logits
    told = [{**row, "logits": values} for row, values in zip(data, logits.tolist(), strict=True)]
    options = {"model": build_student(teacher, 2), "preset": "kd"}
    cached = trainer(kind, tmp_path / "cached", teacher=teacher, teacher_cache="logits", **options)
    cached.open_teacher_cache()
    gone = make(tmp_path / "gone", teacher=None, train=told, **options)
    expected = there.compute_loss(there.model, batch)
    for other in (cached, gone):
        torch.testing.assert_close(other.compute_loss(other.model, one_batch(other, 12)), expected)


def test_rows_are_compared_in_the_direction_of_each_score(tmp_path):
    one = trainer(REGRESSION, tmp_path, dev=rows(REGRESSION, 5), preset="kd")
    names = ("eval_pearson", "eval_mean_squared_error", "eval_loss")
    found = one._scores_by_row([{"mean_squared_error": 4.0}, {"mean_squared_error": 1.0}], names)
    assert found == {"pearson": [-4.0, -1.0], "mean_squared_error": [4.0, 1.0]}


def test_a_model_that_gives_all_texts_the_same_labels_is_said(tmp_path, caplog):
    model = classifier(MULTI)
    model.config.id2label = {0: "a", 1: "e", 2: "z"}
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1e3, -1e3, 1e3]))
    one = make(tmp_path, model=model, teacher=None, preset="ft", train=rows(MULTI), dev=rows(MULTI, 4),
               learning_rate=1e-9, eval_strategy="steps", eval_steps=1)  # fmt: skip
    one.train()
    assert caplog.text.count("step 1: it predicts 'a, z' for all 4 held-out rows") == 1


def test_one_output_without_a_problem_type_is_a_number_and_that_is_said(tmp_path, caplog):
    model = tiny_classifier(labels=1)
    make(tmp_path, model=model, teacher=None, preset="ft", train=rows(REGRESSION))
    assert model.config.problem_type == REGRESSION
    assert "one output and no problem_type: it is taken for a number" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_students_are_what_their_teachers_are(tmp_path, kind):
    teacher = classifier(kind)
    assert build_student(teacher, 2).config.problem_type == kind
    other = tiny_classifier(layers=2, labels=OUTPUTS[kind]).config
    other.problem_type = "single_label_classification"
    with pytest.raises(ModelError, match=r"the teacher gives each text .* and the student one of several labels"):
        check_same_labels(other, teacher.config)
    if kind == MULTI:
        student = build_student(teacher, 2)
        teacher.config.id2label, student.config.id2label = dict(enumerate("aez")), dict(enumerate("eaz"))
        with pytest.raises(
            ModelError, match="teacher's labels are a, e, z, in this order, and the student's are e, a, z"
        ):
            make(tmp_path, model=student, teacher=teacher, train=rows(kind))


def test_a_temperature_has_no_meaning_in_regression(tmp_path):
    with pytest.raises(ConfigError, match="temperature = 2: has no effect under problem_type regression"):
        trainer(REGRESSION, tmp_path, temperature=2.0)
    trainer(MULTI, tmp_path, temperature=2.0)


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        (MULTI, 1, "row 1: label 1 is not a list"),
        (MULTI, [0, None], r"row 1: label .*None.* is not a list"),
        (MULTI, [0, 3], "row 1: label 3 is not in the label set: allowed are the whole numbers 0 to 2"),
        (REGRESSION, [1.0], r"row 1: label .* is not a finite number"),
        (REGRESSION, True, "row 1: label True is not a finite number"),
        (REGRESSION, math.nan, "row 1: label nan is not a finite number"),
    ],
)
def test_labels_of_another_kind_are_refused(kind, label, message):
    made = [{"text": "a b", "label": [0] if kind == MULTI else 1}, {"text": "b", "label": label}]
    with pytest.raises(DataError, match=message):
        EncodedTexts(made, classifier_tokenizer(), 16, OUTPUTS[kind], kind)


def test_what_is_read_of_labels():
    def labels(kind, values):
        texts = [{"text": LETTERS[0], "label": value} for value in values]
        encoded = EncodedTexts(texts, classifier_tokenizer(), 16, OUTPUTS[kind], kind)
        return encoded.collate([encoded[i] for i in range(len(values))])["labels"]

    nan = math.nan
    found, expected = labels(MULTI, [[2, 0], [], None]), torch.tensor([[1.0, 0, 1], [0, 0, 0], [nan, nan, nan]])
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(labels(REGRESSION, [3, 0.5, None]), torch.tensor([3.0, 0.5, nan]), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_of_the_other_problems(tmp_path, kind):
    from rlkd.models.encoders.onnx_export import export_onnx

    save_pretrained(tmp_path / "model", classifier(kind), classifier_tokenizer())
    agreement = export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert agreement.same_label == (None if kind == REGRESSION else 1.0)
    assert ("same label" in str(agreement)) == (kind == MULTI)
    assert AutoConfig.from_pretrained(tmp_path / "onnx").problem_type == kind
