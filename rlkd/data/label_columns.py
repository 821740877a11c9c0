"""Label columns: one label in each row, several, or a number; and the label set of a column."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    import datasets

UNLABELLED = -100  # the index of no label, as torch and transformers have it


def label_values(rows: datasets.Dataset, column: str, source: str) -> list[Any]:
    """The values of a label column: names where the data set names its classes, whole numbers as integers.

    Raises DataError for a list of labels or a fraction: rows of another problem.
    """
    names: list[str] = getattr(rows.features[column], "names", None) or []
    values = []
    for i, value in enumerate(rows[column]):
        if isinstance(value, (list, dict)) or (isinstance(value, float) and math.isfinite(value) and value % 1):
            kind, other = "not one label", "multi_label_classification"
            if isinstance(value, float):
                kind, other = "a number for regression", "regression"
            raise DataError(
                f"'{source}', row {i}: column '{column}' contains {str(value)[:60]}, {kind}, and this is single-label "
                f"classification. Name a column with one label in each row, or train with problem_type: {other}."
            )
        if isinstance(value, float):
            value = int(value) if math.isfinite(value) else None
        named = isinstance(value, int) and 0 <= value < len(names)
        values.append(names[value] if named else value)
    return values


def label_sets(
    rows: datasets.Dataset, column: str, source: str, separator: str | None = None
) -> list[list[Any] | None]:
    """The labels of each row, names or whole numbers: the column's lists or, with a separator, the names in its text.

    An empty list or text is a row that has none of the labels; None, one whose labels are not known. Raises DataError
    for values of another type and for a row that gives a label twice.
    """
    feature = getattr(rows.features[column], "feature", None)
    names: list[str] = getattr(feature, "names", None) or []
    found: list[list[Any] | None] = []
    for i, value in enumerate(rows[column]):
        where = f"'{source}', row {i}: column '{column}'"
        if separator is not None and isinstance(value, (str, int)) and not isinstance(value, bool):
            given = [name.strip() for name in str(value).split(separator) if name.strip()]
            value = [int(name) if re.fullmatch(r"\d+", name) else name for name in given]
        if value is not None and not isinstance(value, list):
            raise DataError(
                f"{where} contains {str(value)[:60]!r}, not a list of labels. Write lists (.jsonl, .parquet), or set "
                "label_separator to what separates the names in it."
            )
        for label in value or ():
            if isinstance(label, bool) or not isinstance(label, (str, int)) or hidden(label):
                raise DataError(f"{where} has the label {label!r}: labels are names, or whole numbers from 0.")
        if value is not None and len(set(value)) < len(value):
            raise DataError(
                f"{where} gives a label twice: {str(value)[:60]}. Write each label that the row has once (for a "
                "vector of 0 and 1, the names or numbers of the labels at 1)."
            )
        found.append(value and [names[k] if isinstance(k, int) and 0 <= k < len(names) else k for k in value])
    return found


def word_lists(rows: datasets.Dataset, column: str, source: str) -> list[list[str]]:
    """The words of each row. Raises DataError for a column without lists of texts, and for a row without words."""
    feature = rows.features[column]
    if getattr(getattr(feature, "feature", None), "dtype", None) not in ("string", "large_string"):
        raise DataError(
            f"'{source}': column '{column}' contains {feature}, not lists of words. Name another text_column; .jsonl "
            "and .parquet files can have lists."
        )
    found: list[list[str]] = rows[column]
    if wrong := [i for i, words in enumerate(found) if not words or None in words]:
        raise DataError(
            f"'{source}', rows {first(wrong)}: column '{column}' has no words, or null among them. Fix or remove them."
        )
    return found


def word_tags(rows: datasets.Dataset, column: str, words: Sequence[Sequence[str]], source: str) -> list[Any]:
    """The tags of each row, names or whole numbers, one for each word; None for a row whose tags are not known.

    Raises DataError for other values, and for another number of tags than words.
    """
    names: list[str] = getattr(getattr(rows.features[column], "feature", None), "names", None) or []
    found: list[Any] = []
    for i, (tags, own) in enumerate(zip(rows[column], words, strict=True)):
        where = f"'{source}', row {i}: column '{column}'"
        if tags is not None and not isinstance(tags, list):
            raise DataError(f"{where} contains {str(tags)[:60]!r}, not a list with a tag for each word.")
        for tag in tags or ():
            if not isinstance(tag, (str, int)) or isinstance(tag, bool) or hidden(tag) or tag == UNLABELLED:
                raise DataError(
                    f"{where} has the tag {tag!r}: tags are names, or whole numbers from 0. If those of a row are not "
                    "known, write null in place of the list."
                )
        if tags is not None and len(tags) != len(own):
            raise DataError(f"{where} has {len(tags)} tags for {len(own)} words. Give each word one tag.")
        found.append(tags and [names[k] if isinstance(k, int) and 0 <= k < len(names) else k for k in tags])
    return found


def numbers(values: Iterable[Any], column: str, source: str) -> list[float | None]:
    """The numbers of a column, as numbers or as text; None where there is none. Raises DataError for anything else."""
    found: list[float | None] = []
    for i, value in enumerate(values):
        try:
            number = None if value is None or value == "" else float(str(value).replace("_", "?"))  # 1_000 is no number
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or (number is not None and not math.isfinite(number)):
            raise DataError(
                f"'{source}', row {i}: column '{column}' contains {str(value)[:60]!r}, not a finite number. Regression "
                "needs one in every row, or an empty value where there is none."
            )
        found.append(number)
    return found


def find_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """The label set of a column, for data without one: the names, sorted, or the numbers from 0 (or from the smallest,
    if that is larger) to the largest.

    Take it from the training rows, so that a label that only held-out rows have is detected.
    """
    seen = {value for value in values if not hidden(value)}
    if seen and all(type(value) is int for value in seen):
        return tuple(map(str, range(min(seen), max(seen) + 1) if min(seen) > 0 else range(max(seen) + 1)))
    return tuple(sorted(map(str, seen)))


def label_indices(
    values: Iterable[Any], labels: Sequence[str], source: str, rows: Sequence[int] | None = None
) -> list[int | None]:
    """The index of each value: a name of `labels` or, unless names are numbers, an index itself; None if hidden.

    rows: the row of each value, where a row has several. Raises DataError for any other value.
    """
    names = {name: i for i, name in enumerate(labels)}
    numbered = any(re.fullmatch(r"-?\d+", name) for name in labels)
    indices: list[int | None] = []
    unknown: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        index = None if hidden(value) else names.get(str(value))
        if index is None and not numbered and isinstance(value, int) and 0 <= value < len(labels):
            index = value
        if index is None and not hidden(value):
            unknown.setdefault(value, []).append(i if rows is None else rows[i])
        indices.append(index)
    if unknown:
        found = "; ".join(f"{value!r} in rows {first(where)}" for value, where in list(unknown.items())[:5])
        indices_too = "" if numbered else f", or 0 to {len(labels) - 1}"
        raise DataError(f"'{source}': labels not in the label set: {found}. Allowed: {', '.join(labels)}{indices_too}.")
    return indices


def hidden(value: Any) -> bool:
    """Whether a value says that the label is not known."""
    return value is None or value == -1 or value == ""


def first(rows: list[int]) -> str:
    """The first of these row numbers, as text."""
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
