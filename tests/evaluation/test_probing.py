"""Linear probes find what is there, and nothing where nothing is."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rlkd.evaluation.probing import GRID, Split, linear_probe, majority_baseline


def splits(rows=(400, 200, 300), width=6, noise=0.0, seed=0):
    """Features: the sign of the first column is the label, except for a share `noise` of the rows."""
    random = np.random.default_rng(seed)
    made = []
    for n in rows:
        x = random.normal(size=(n, width)).astype(np.float32)
        wrong = random.random(n) < noise
        made.append(Split(x, ((x[:, 0] > 0) ^ wrong).astype(int)))
    return made


def test_a_label_that_is_there_is_found_whatever_the_scale():
    train, validation, test = splits()
    found = linear_probe(train, validation, test)
    assert found.accuracy > 0.97
    assert found.low > majority_baseline(train.labels, test.labels).high
    scaled = [Split(s.features * [1e4, 1, 1, 1, 1, 1e-4] + 7, s.labels) for s in (train, validation, test)]
    assert linear_probe(*scaled).accuracy == pytest.approx(found.accuracy, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_do_not_beat_the_majority_beyond_chance(seed):
    train, validation, test = splits(noise=0.5, seed=seed)
    found, baseline = linear_probe(train, validation, test), majority_baseline(train.labels, test.labels)
    assert found.low <= baseline.high
    assert baseline.low <= found.high


def test_features_that_say_nothing_give_the_majority():
    random = np.random.default_rng(0)
    train, validation, test = (
        Split(np.full((n, 3), 5.0), random.choice(3, n, p=[0.2, 0.6, 0.2])) for n in (90, 40, 50)
    )
    found = linear_probe(train, validation, test)
    assert found.accuracy == majority_baseline(train.labels, test.labels).accuracy == np.mean(test.labels == 1)
    assert found.C == 0.001  # all are equal: the strongest penalty


def test_the_penalty_is_the_best_on_the_validation_rows():
    train, validation, test = splits(rows=(40, 150, 150), width=30, noise=0.1, seed=3)
    mean, spread = train.features.mean(0), train.features.std(0)
    scaled = [(s.features - mean) / spread for s in (train, validation, test)]
    probes = {C: LogisticRegression(C=C, max_iter=2000).fit(scaled[0], train.labels) for C in GRID}
    scores = {C: np.mean(p.predict(scaled[1]) == validation.labels) for C, p in probes.items()}
    assert len(set(scores.values())) > 1
    found = linear_probe(train, validation, test)
    assert found.validation == pytest.approx(max(scores.values()))
    assert scores[found.C] == max(scores.values())
    assert found.accuracy == pytest.approx(np.mean(probes[found.C].predict(scaled[2]) == test.labels))


def test_the_majority_and_its_interval_by_hand():
    found = majority_baseline(np.array([2, 0, 2, 1, 2]), np.array([2] * 30 + [0] * 10))
    p, n, z = 0.75, 40, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    assert (found.accuracy, found.low, found.high) == pytest.approx((p, low, high))
    assert found.C is found.validation is None


def test_training_rows_of_one_label_are_refused():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_probe(Split(x, np.zeros(4, int)), Split(x, np.zeros(4, int)), Split(x, np.zeros(4, int)))
