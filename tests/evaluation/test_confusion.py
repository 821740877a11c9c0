"""The confusion matrix is scikit-learn's; the calibration error is its definition, bin by bin."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as of_sklearn

from rlkd.evaluation.classes import calibration_error, confusion_matrix


def test_confusion_matrix():
    draw = np.random.default_rng(0)
    true, predicted = draw.integers(0, 4, 50), draw.integers(0, 3, 50)
    found = confusion_matrix([*predicted.tolist(), 1], [*true.tolist(), -100], 4)
    assert found == of_sklearn(true, predicted, labels=range(4)).tolist()


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error(bins):
    draw = np.random.default_rng(1)
    probabilities, true = draw.dirichlet([0.5] * 3, 200), draw.integers(0, 3, 200)
    probabilities[:3] = np.eye(3)  # confidence 1 is in the last bin
    gaps = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i in range(200) if low < probabilities[i].max() <= high]
        if inside:
            accuracy = np.mean([probabilities[i].argmax() == true[i] for i in inside])
            gaps += len(inside) / 200 * abs(accuracy - np.mean([probabilities[i].max() for i in inside]))
    assert calibration_error(probabilities, true.tolist(), bins) == pytest.approx(gaps)
    more = np.vstack([probabilities, [[0.9, 0.1, 0.0]]])
    assert calibration_error(more, [*true.tolist(), -100], bins) == pytest.approx(gaps)


def test_calibration_of_models_whose_error_is_known():
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, [0, 0, 0, 0]) == 0
    assert calibration_error(sure, [0, 1, 1, 1]) == pytest.approx(0.75)
    assert calibration_error(np.array([[0.75, 0.25]] * 4), [0, 0, 0, 1]) == pytest.approx(0)
    assert calibration_error(sure, [-100] * 4) == 0
