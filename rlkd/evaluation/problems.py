"""What a classifier's outputs are, in one dictionary: how they are learned from labels and from a teacher, what they
predict, and how that is scored.

The names are transformers' own (`problem_type` in config.json, but for the last: there the model's class says it).
Labels of N rows are, as arrays,

    single_label_classification  [N], the index of the label, negative where it is not known
    multi_label_classification   [N, C], 1 for each label that the row has and 0 for the others, NaN if not known
    regression                   [N], the number, NaN where it is not known
    token_classification         [N, W], the index of each word's tag, negative where it is not known and beyond the end
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import check_choice
from ..choices import ProblemType
from ..errors import ConfigError
from ..objectives.encoder import (
    bernoulli_divergence,
    binary_cross_entropy,
    cross_entropy,
    soft_cross_entropy,
    squared_error,
)
from ..objectives.neighbours import logit_mse
from .entities import entity_f1, entity_precision, entity_recall, sequence_accuracy, token_accuracy
from .task_metrics import warn_of_useless

Score = Callable[[Any, Any], float]

# Scores: (predicted, true) of labelled rows -> a number, by scikit-learn and scipy; 0 without rows. Those of words take
# the names of their tags (`entities`).


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of equal labels; of rows with several, of equal sets of labels."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, predicted)) if len(true) else 0.0


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of label 1 whatever other labels there are, as GLUE scores QQP and MRPC; 0 if neither side has it."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, labels=[1], average="macro", zero_division=0)) if len(true) else 0.0


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews correlation, also for several classes (Gorodkin 2004); 0 if either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    # scikit-learn gives 0 for a single label as well, with a warning.
    return float(matthews_corrcoef(true, predicted)) if len(np.union1d(true, predicted)) > 1 else 0.0


def micro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of all pairs of a row and a label [N, C] together; 0 if neither side has any."""
    return f1(predicted.ravel(), true.ravel())


def macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over labels of the F1 of each [N, C]; 0 for a label that neither side has."""
    return float(np.mean([f1(*pair) for pair in zip(predicted.T, true.T, strict=True)])) if len(true) else 0.0


def _correlation(name: str, predicted: np.ndarray, true: np.ndarray) -> float:
    """0 if either side is constant, where no correlation is defined."""
    from scipy import stats

    if len(true) < 2 or not (np.ptp(predicted) > 0 and np.ptp(true) > 0):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nearly constant predictions
        return float(np.nan_to_num(getattr(stats, name)(predicted.astype(np.float64), true.astype(np.float64))[0]))


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Linear correlation; 0 if either side is constant."""
    return _correlation("pearsonr", predicted, true)


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation of ranks; 0 if either side is constant."""
    return _correlation("spearmanr", predicted, true)


def mean_squared_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean of (predicted - true)^2."""
    return float(np.square(predicted - true).mean()) if len(true) else 0.0


# Scores of each row [N].


def _equal(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    same = predicted == true
    return (same if same.ndim == 1 else same.all(-1)).astype(float)


def _squares(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.square(predicted - true)


def _all_equal(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    return ((predicted == true) | (true < 0)).all(-1).astype(float)


def _one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[labels.clip(min=0)]


@dataclass(frozen=True)
class Problem:
    """One kind of classifier; B rows or, of words, B words of all rows.

    loss          on labels: (logits [B, C], labels) -> a scalar, `ce`
    distillation  (student's, teacher's logits [B, C], temperature) -> a scalar, `kd`
    predict       logits [N, C] ([N, W, C] of words) -> predictions, in the form of labels
    outputs       its inverse: (labels, C) -> logits that predict them
    scores        name -> score of all rows
    chosen        those whose mean is `score`, unless others are chosen
    always        those that are measured whatever is chosen
    by_row        name and function of what a single row scores
    temperature   whether `distillation` has one
    of_words      whether each word has its own label, a tag
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    distillation: Callable[[Tensor, Tensor, float], Tensor]
    predict: Callable[[np.ndarray], np.ndarray]
    outputs: Callable[[np.ndarray, int], np.ndarray]
    scores: Mapping[str, Score]
    chosen: tuple[str, ...]
    always: tuple[str, ...]
    by_row: tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = field(repr=False)
    temperature: bool = True
    of_words: bool = False


PROBLEMS: dict[ProblemType, Problem] = {
    "single_label_classification": Problem(
        loss=cross_entropy,
        distillation=soft_cross_entropy,
        predict=lambda logits: logits.argmax(-1),
        outputs=_one_hot,
        scores={"accuracy": accuracy, "f1": f1, "matthews": matthews},
        chosen=("accuracy",),
        always=("accuracy",),
        by_row=("accuracy", _equal),
    ),
    "multi_label_classification": Problem(
        loss=binary_cross_entropy,
        distillation=bernoulli_divergence,
        predict=lambda logits: (logits > 0).astype(np.int64),
        outputs=lambda labels, classes: np.where(labels > 0, 1.0, -1.0).astype(np.float32),
        scores={"micro_f1": micro_f1, "macro_f1": macro_f1, "subset_accuracy": accuracy},
        chosen=("micro_f1", "macro_f1"),
        always=("micro_f1", "macro_f1", "subset_accuracy"),
        by_row=("subset_accuracy", _equal),
    ),
    "regression": Problem(
        loss=squared_error,
        distillation=lambda student, teacher, temperature: logit_mse(student, teacher),
        predict=lambda outputs: outputs[:, 0],
        outputs=lambda labels, classes: labels[:, None].astype(np.float32),
        scores={"pearson": pearson, "spearman": spearman, "mean_squared_error": mean_squared_error},
        chosen=("pearson", "spearman"),
        always=("pearson", "spearman", "mean_squared_error"),
        by_row=("mean_squared_error", _squares),
        temperature=False,
    ),
    "token_classification": Problem(
        loss=cross_entropy,
        distillation=soft_cross_entropy,
        predict=lambda logits: logits.argmax(-1),
        outputs=_one_hot,
        scores={
            "entity_f1": entity_f1,
            "entity_precision": entity_precision,
            "entity_recall": entity_recall,
            "token_accuracy": token_accuracy,
            "sequence_accuracy": sequence_accuracy,
        },
        chosen=("entity_f1",),
        always=("entity_f1", "entity_precision", "entity_recall", "token_accuracy", "sequence_accuracy"),
        by_row=("sequence_accuracy", _all_equal),
        of_words=True,
    ),
}
CLASSIFICATION_METRICS: dict[str, Score] = {k: v for problem in PROBLEMS.values() for k, v in problem.scores.items()}


def has_label(labels: np.ndarray) -> np.ndarray:
    """Which of N rows have a label [N], of labels as in the problems."""
    if not np.issubdtype(labels.dtype, np.floating):
        return labels >= 0 if labels.ndim == 1 else np.any(labels >= 0, axis=-1)  # type: ignore[no-any-return]
    known = ~np.isnan(labels)
    return known if known.ndim == 1 else known.all(-1)


def classified_rows(
    predicted: Sequence[Any] | np.ndarray,
    true: Sequence[Any] | np.ndarray,
    texts: Sequence[str],
    problem_type: ProblemType = "single_label_classification",
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """{id, input, label, predicted, SCORE} of each row that has a label: the lines of held_out.jsonl.

    SCORE is that of a single row (`evaluation.problems`); of rows with several labels, label and predicted are lists of
    indices, of words lists of tags by `names`. predicted, true: in the form of labels there.
    """
    guesses, labels = np.asarray(predicted), np.asarray(true)
    problem = PROBLEMS[problem_type]
    name, by_row = problem.by_row
    scores, known = by_row(guesses, labels), has_label(labels)
    plain: list[list[Any]] = [
        tags(part, labels, names) if problem.of_words else [_plain(one) for one in part] for part in (labels, guesses)
    ]
    facts = zip(texts, *plain, scores, known, strict=True)
    return [
        {"id": str(i), "input": text, "label": label, "predicted": guess, name: float(score)}
        for i, (text, label, guess, score, labelled) in enumerate(facts)
        if labelled
    ]


def tags(labels: np.ndarray, true: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """The names of tags [N, W], of the words whose true tag is known."""
    return [[names[k] for k in row[known]] for row, known in zip(labels, true >= 0, strict=True)]


def _plain(label: Any) -> Any:
    """A label as JSON has it: an index, a list of indices, or a number."""
    return np.flatnonzero(label).tolist() if np.ndim(label) else label.item()


def classification_metrics(
    names: Sequence[str], problem_type: ProblemType = "single_label_classification", labels: Sequence[str] = ()
) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` for the Trainer: these scores of what the logits predict, over the rows that have a label.

    labels: the names of the tags, which the scores of words need. Raises ConfigError for a problem that there is not, a
    name that it does not have, and for words without labels.
    """
    check_choice("problem_type", problem_type, PROBLEMS)
    problem = PROBLEMS[problem_type]
    for name in names:
        check_choice("metric", name, problem.scores)
    if problem.of_words and not labels:
        raise ConfigError(f"labels is empty: the scores of {problem_type} need the names of the tags, in order")

    def compute(prediction: Any) -> dict[str, float]:
        logits, given = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        known = has_label(given)
        predicted, true = problem.predict(logits)[known], given[known]
        if problem.of_words:
            predicted, true = tags(predicted, true, labels), tags(true, true, labels)
        return {name: problem.scores[name](predicted, true) for name in names}

    return compute


def try_classification(
    compute: Any,
    labels: Sequence[Any] | np.ndarray,
    classes: int,
    problem_type: ProblemType = "single_label_classification",
) -> list[str]:
    """The names of the scores that `compute_metrics` gives, from right predictions of the held-out labels.

    Raises ConfigError if it fails on them; a score that is 0 for them is a warning.
    """
    from transformers import EvalPrediction

    true = np.asarray(labels)
    try:
        scores = dict(compute(EvalPrediction(PROBLEMS[problem_type].outputs(true, classes), true)))
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(
            f"compute_metrics fails on {len(true)} right predictions ({type(error).__name__}: {error}): it must take "
            "an EvalPrediction (logits, labels) and return a dictionary of numbers"
        ) from error
    reason = {
        "single_label_classification": "F1 needs rows of label 1, the Matthews correlation rows of two labels",
        "multi_label_classification": "F1 needs rows that have a label",
        "regression": "a correlation needs different numbers",
        "token_classification": "they need rows with entities",
    }
    warn_of_useless(scores, reason[problem_type])
    return list(scores)
