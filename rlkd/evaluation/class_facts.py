"""What there is to say of a classifier's predictions besides scores: each label or type of entity, and constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.special import softmax

from ..choices import ProblemType
from .classes import calibration_error, class_scores, confusion_matrix, in_words, only_prediction
from .entities import entity_scores
from .problems import PROBLEMS, has_label, tags


def class_facts(
    outputs: np.ndarray, true: np.ndarray, names: Sequence[str], problem_type: ProblemType
) -> dict[str, Any]:
    """Of outputs and labels as in `problems`: `classes`, the scores of each label or type of entity; `confusion`, rows
    by true and predicted label; `ece`, the calibration error. Those that the problem does not have are left out.
    """
    known = has_label(true)
    outputs, true = outputs[known], true[known]
    predicted = PROBLEMS[problem_type].predict(outputs)
    if problem_type == "token_classification":
        found, wanted = (tags(labels, true, names) for labels in (predicted, true))
        return {"classes": [asdict(one) for one in entity_scores(found, wanted, names)]}
    if problem_type == "multi_label_classification":
        given, own = ([np.flatnonzero(row).tolist() for row in labels] for labels in (predicted, true))
        return {"classes": [asdict(one) for one in class_scores(given, own, names)]}
    if problem_type == "regression":
        return {}
    return {
        "classes": [asdict(one) for one in class_scores(predicted.tolist(), true.tolist(), names)],
        "confusion": confusion_matrix(predicted.tolist(), true.tolist(), len(names)),
        "ece": calibration_error(softmax(outputs.astype(np.float64), axis=-1), true.tolist()),
    }


def constant_prediction(
    rows: Sequence[dict[str, Any]], names: Sequence[str], problem_type: ProblemType
) -> dict[str, Any] | None:
    """{label, rows} if a model predicts the same for all rows (of words, the same tag for all words) of
    `problems.classified_rows`, else None.
    """
    predicted = [row["predicted"] for row in rows]
    if PROBLEMS[problem_type].of_words:
        predicted = [tag for tags_of_row in predicted for tag in tags_of_row]
    only = only_prediction(predicted)
    return None if only is None else {"label": in_words(only, names), "rows": len(predicted)}
