"""Losses and scores of the three problems, against torch's own losses, enumeration, scipy and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from sklearn.metrics import mean_squared_error as of_sklearn
from torch import nn
from torch.nn import functional as F
from transformers import EvalPrediction

from rlkd.errors import ConfigError
from rlkd.evaluation.classes import class_scores, in_words, only_prediction
from rlkd.evaluation.problems import (
    CLASSIFICATION_METRICS,
    PROBLEMS,
    classification_metrics,
    classified_rows,
    try_classification,
)

MULTI, REGRESSION = PROBLEMS["multi_label_classification"], PROBLEMS["regression"]


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_losses_on_labels_are_those_of_torch_over_the_rows_that_have_some():
    z, y = logits(6, 3), (logits(6, 3, seed=1) > 0).float()
    y[[1, 4]] = math.nan
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(MULTI.loss(z, y), nn.BCEWithLogitsLoss()(z[kept], y[kept]))
    outputs, numbers = logits(6, 1), logits(6, seed=2)
    numbers[[1, 4]] = math.nan
    torch.testing.assert_close(REGRESSION.loss(outputs, numbers), nn.MSELoss()(outputs[kept, 0], numbers[kept]))
    none = torch.full_like(z, math.nan)
    for loss, labels in ((MULTI.loss, none), (REGRESSION.loss, none[:, 0])):
        free = logits(6, 3 if labels.dim() > 1 else 1).requires_grad_()
        value = loss(free, labels)
        value.backward()
        assert value == 0
        assert torch.equal(free.grad, torch.zeros_like(free))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distillation_of_several_labels_is_the_divergence_of_sets_of_labels(temperature):
    """Enumerated: KL between the distributions over all 2^C sets, a mean over C as the loss on labels is."""
    rows, C = 4, 3
    student, teacher = logits(rows, C), logits(rows, C, seed=1)
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=C)))

    def over_sets(z):
        p = torch.sigmoid(z / temperature)[:, None]
        return (sets * p + (1 - sets) * (1 - p)).prod(-1)  # [rows, 2^C]

    expected = F.kl_div(over_sets(student).log(), over_sets(teacher), reduction="batchmean") / C
    found = MULTI.distillation(student, teacher, temperature)
    torch.testing.assert_close(found, temperature**2 * expected, rtol=1e-4, atol=1e-6)


def test_numbers_are_not_rounded_to_a_bf16_output():
    numbers = torch.tensor([3.8, 2.2])
    found = REGRESSION.loss(torch.tensor([[4.0], [2.0]], dtype=torch.bfloat16), numbers)
    assert float(found) == pytest.approx(0.04, rel=1e-5)


def test_the_distillation_of_two_bernoullis_is_kl_div_and_its_gradient_is_the_students_alone():
    student, teacher = logits(5, 2).double().requires_grad_(), logits(5, 2, seed=1).double().requires_grad_()
    pairs = [torch.stack([torch.sigmoid(z), torch.sigmoid(-z)], -1) for z in (student, teacher)]
    expected = F.kl_div(pairs[0].log(), pairs[1], reduction="sum") / 10
    found = MULTI.distillation(student, teacher, 1.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    # d KL / d z_s = s(z_s) - s(z_t), over the 10 pairs of the mean.
    torch.testing.assert_close(student.grad, (torch.sigmoid(student) - torch.sigmoid(teacher)).detach() / 10)
    assert teacher.grad is None
    far = torch.tensor([[500.0, -500.0]], requires_grad=True)
    assert torch.isfinite(MULTI.distillation(far, -far, 1.0))


def test_the_distillation_of_numbers_is_their_squared_difference_at_any_temperature():
    student, teacher = logits(5, 1), logits(5, 1, seed=1)
    for temperature in (1.0, 5.0):
        torch.testing.assert_close(
            REGRESSION.distillation(student, teacher, temperature), nn.MSELoss()(student, teacher)
        )


def test_scores_of_several_labels_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    z, true = draw.normal(size=(50, 4)), draw.integers(0, 2, (50, 4)).astype(float)
    z[:, 3], true[:, 3] = -1.0, 0.0  # a label that neither side has
    unknown = np.vstack([true, np.full((2, 4), np.nan)])
    found = classification_metrics(MULTI.always, "multi_label_classification")(
        EvalPrediction(np.vstack([z, draw.normal(size=(2, 4))]), unknown)
    )
    predicted = 1 / (1 + np.exp(-z)) > 0.5
    assert found == pytest.approx({
        "micro_f1": f1_score(true, predicted, average="micro"),
        "macro_f1": f1_score(true, predicted, average="macro", zero_division=0),
        "subset_accuracy": accuracy_score(true, predicted),
    })  # fmt: skip
    one = true[:, :1]
    assert MULTI.scores["micro_f1"](predicted[:, :1], one) == pytest.approx(f1_score(one[:, 0], predicted[:, 0]))


def test_scores_of_numbers_are_those_of_scipy_and_scikit_learn():
    draw = np.random.default_rng(0)
    true = draw.normal(size=40).astype(np.float32)
    outputs = (true[:, None] + draw.normal(size=(40, 1))).astype(np.float32)
    found = classification_metrics(REGRESSION.always, "regression")(EvalPrediction(outputs, true))
    assert found == pytest.approx({
        "pearson": stats.pearsonr(outputs[:, 0], true)[0], "spearman": stats.spearmanr(outputs[:, 0], true)[0],
        "mean_squared_error": of_sklearn(true, outputs[:, 0]),
    }, rel=1e-5)  # fmt: skip
    constant = classification_metrics(REGRESSION.always, "regression")(EvalPrediction(np.ones((40, 1)), true))
    assert (constant["pearson"], constant["spearman"]) == (0, 0)
    assert constant["mean_squared_error"] == pytest.approx(np.mean((true - 1) ** 2), rel=1e-5)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_right_predictions_are_best_and_nothing_is_0(kind):
    problem = PROBLEMS[kind]
    true = {
        "single_label_classification": np.array([0, 1, 2]),
        "multi_label_classification": np.array([[0, 1], [1, 1], [0, 0]]),
        "regression": np.array([0.5, 2.0, -1.0]),
        "token_classification": np.array([[0, 1], [1, 1], [0, 0], [1, 1]]),
    }[kind]
    names = ["O", "B-X"]

    def named(labels):
        return [[names[k] for k in row] for row in labels] if problem.of_words else labels

    outputs = problem.outputs(true, 3 if kind == "single_label_classification" else 2)
    assert np.array_equal(problem.predict(outputs), true.astype(problem.predict(outputs).dtype))
    scores = classification_metrics(list(problem.scores), kind, names)(EvalPrediction(outputs, true))
    assert scores == pytest.approx({name: float(name != "mean_squared_error") for name in problem.scores})
    none = named(true[:0])
    assert [score(none, none) for score in problem.scores.values()] == [0] * len(problem.scores)
    (name, by_row) = problem.by_row
    moved = np.roll(true, 1, axis=0)
    assert by_row(moved, true).mean() == pytest.approx(problem.scores[name](named(moved), named(true)))
    assert {*problem.chosen, *problem.always, name} <= problem.scores.keys() <= CLASSIFICATION_METRICS.keys()


def test_scores_of_another_problem_are_refused_and_useless_ones_said(caplog):
    with pytest.raises(ConfigError, match="metric = 'accuracy': allowed are 'pearson'"):
        classification_metrics(["accuracy"], "regression")
    with pytest.raises(ConfigError, match="labels is empty: the scores of token_classification need the names"):
        classification_metrics(["entity_f1"], "token_classification")
    compute = classification_metrics(["pearson", "mean_squared_error"], "regression")
    assert try_classification(compute, [2.0, 2.0], 1, "regression") == ["pearson", "mean_squared_error"]
    assert "pearson: 0 for the right answers themselves" in caplog.text
    assert "mean_squared_error:" not in caplog.text


def test_rows_with_several_labels_or_numbers_as_they_are_written():
    nan = math.nan
    guesses, true = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]]), np.array([[1, 0, 0], [0, 0, 0], [nan, nan, nan]])
    assert classified_rows(guesses, true, ["a", "b", "c"], "multi_label_classification") == [
        {"id": "0", "input": "a", "label": [0], "predicted": [0, 2], "subset_accuracy": 0.0},
        {"id": "1", "input": "b", "label": [], "predicted": [], "subset_accuracy": 1.0},
    ]
    assert classified_rows(np.array([1.0, 2.0]), np.array([1.5, nan]), ["a", "b"], "regression") == [
        {"id": "0", "input": "a", "label": 1.5, "predicted": 1.0, "mean_squared_error": 0.25}
    ]
    assert only_prediction([[0], [0]]) == [0]
    assert only_prediction([[], []]) == []
    assert only_prediction([[0], [0, 1]]) is None
    words = [in_words(label, ("x", "y")) for label in ([1, 0], [], 1, 7, 3.14159)]
    assert words == ["y, x", "none of the labels", "y", "7", "3.142"]


def test_scores_of_each_label_are_those_of_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    draw = np.random.default_rng(2)
    for true, guesses in (
        (draw.integers(0, 4, 60), draw.integers(0, 3, 60)),
        (draw.integers(0, 2, (60, 4)), draw.integers(0, 2, (60, 4)) * [1, 1, 1, 0]),
    ):
        lists = [x.tolist() if x.ndim == 1 else [np.flatnonzero(row).tolist() for row in x] for x in (guesses, true)]
        found = class_scores(*lists, "abcd")
        options = {"labels": range(4)} if true.ndim == 1 else {}
        expected = precision_recall_fscore_support(true, guesses, zero_division=0, average=None, **options)
        assert [(c.precision, c.recall, c.f1, c.rows) for c in found] == [
            pytest.approx(values) for values in zip(*expected, strict=True)
        ]
