"""Classification data sets, single sentences and pairs: GLUE, TREC, SST-5 from the hub, or a table of your own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, nearest
from .rows import OnBadRow, check_columns, check_text_column, load_rows


@dataclass(frozen=True)
class RawColumns:
    """Columns of the .tsv files as GLUE distributes them; columns, of all but the test file where they have no header.

    Quotes in them are characters like any other.
    """

    text: str
    pair: str | None
    label: str
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ClassificationTask:
    """Where a data set lives and how it is read and scored.

    labels, in the order of their indices; metrics, names in `rlkd.evaluation.task_metrics.CLASSIFICATION_METRICS`;
    submissions, the GLUE server's file for each test split, and whether it wants labels by name; raw, how GLUE's own
    files look.
    """

    source: str
    subset: str | None
    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    dev_splits: tuple[str, ...] = ("validation",)
    submissions: tuple[tuple[str, str], ...] = ()
    submits_names: bool = False
    raw: RawColumns | None = None


def _glue(
    subset: str, text: str, pair: str | None, labels: tuple[str, ...], file: str, **more: Any
) -> ClassificationTask:
    more.setdefault("raw", RawColumns(text, pair, "label"))
    more.setdefault("submissions", (("test", file),))
    return ClassificationTask("nyu-mll/glue", subset, text, pair, "label", labels, **more)


_ENTAILED = ("entailment", "not_entailment")
TASKS: dict[str, ClassificationTask] = {
    "sst2": _glue("sst2", "sentence", None, ("negative", "positive"), "SST-2.tsv"),
    "cola": _glue(
        "cola",
        "sentence",
        None,
        ("unacceptable", "acceptable"),
        "CoLA.tsv",
        metrics=("matthews",),
        raw=RawColumns("sentence", None, "label", ("source", "label", "star", "sentence")),
    ),
    "mnli": _glue(
        "mnli",
        "premise",
        "hypothesis",
        ("entailment", "neutral", "contradiction"),
        "MNLI-m.tsv",
        dev_splits=("validation_matched", "validation_mismatched"),
        submissions=(("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")),
        submits_names=True,
        raw=RawColumns("sentence1", "sentence2", "gold_label"),
    ),
    "qqp": _glue(
        "qqp",
        "question1",
        "question2",
        ("not_duplicate", "duplicate"),
        "QQP.tsv",
        metrics=("f1", "accuracy"),
        raw=RawColumns("question1", "question2", "is_duplicate"),
    ),
    "qnli": _glue("qnli", "question", "sentence", _ENTAILED, "QNLI.tsv", submits_names=True),
    "rte": _glue("rte", "sentence1", "sentence2", _ENTAILED, "RTE.tsv", submits_names=True),
    "mrpc": _glue(
        "mrpc",
        "sentence1",
        "sentence2",
        ("not_equivalent", "equivalent"),
        "MRPC.tsv",
        metrics=("f1", "accuracy"),
        raw=RawColumns("#1 String", "#2 String", "Quality"),
    ),
    "trec6": ClassificationTask(
        "CogComp/trec", None, "text", None, "coarse_label", ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        dev_splits=("test",),
    ),
    "sst5": ClassificationTask(
        "SetFit/sst5", None, "text", None, "label",
        ("very negative", "negative", "neutral", "positive", "very positive"),
    ),
}  # fmt: skip


def find_task(name: str) -> ClassificationTask:
    """The task of this name. Raises ConfigError that lists them."""
    if name not in TASKS:
        raise ConfigError(f"task = {name!r}: allowed are {', '.join(TASKS)}.{nearest(name, list(TASKS))}")
    return TASKS[name]


def load_task(
    name: str,
    split: str = "train",
    *,
    file: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "fail",
) -> list[dict[str, Any]]:
    """Rows {text, text_pair, label} of a split of a data set; label is None where the set hides it.

    They come from the hub, or from a local `file`: a .tsv of a GLUE task is read as GLUE distributes it (one of a
    split named test* has no labels), any other file by the hub's columns. on_bad_row: `fail`, or `skip` those that
    cannot be read (QQP's training file has some).
    """
    task = find_task(name)
    if file is not None and task.raw is not None and Path(file).suffix.lower() == ".tsv":
        raw, hidden = task.raw, split.startswith("test")
        return load_labelled(
            file,
            text_column=raw.text,
            pair_column=raw.pair,
            label_column=None if hidden else raw.label,
            labels=task.labels,
            columns=None if hidden else raw.columns,
            quoted=False,
            limit=limit,
            on_bad_row=on_bad_row,
        )
    return load_labelled(
        file or task.source,
        text_column=task.text,
        pair_column=task.pair,
        label_column=task.label,
        labels=task.labels,
        split=split,
        subset=None if file else task.subset,
        limit=limit,
        on_bad_row=on_bad_row,
    )


def load_labelled(
    source: str,
    *,
    text_column: str,
    label_column: str | None,
    labels: Sequence[str] = (),
    pair_column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    quoted: bool = True,
    on_bad_row: OnBadRow = "fail",
) -> list[dict[str, Any]]:
    """Rows {text, text_pair, label} of a hub data set or a local .csv, .tsv, .jsonl, .json or .parquet file.

    columns names those of a .csv or .tsv without a header; columns, quoted and on_bad_row as in `load_rows`.

    label is the index in `labels` (given in the data by name or by index), None where it is missing or -1, and for
    every row if label_column is None: a transfer set that the teacher alone judges. Raises DataError for a column that
    does not exist or holds no text, and for labels outside the set, with the rows.
    """
    rows = load_rows(
        source, split=split, subset=subset, limit=limit, columns=columns, quoted=quoted, on_bad_row=on_bad_row
    )
    wanted = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    check_columns(rows, {role: column for role, column in wanted.items() if column is not None}, source)
    texts = [text_column] if pair_column is None else [text_column, pair_column]
    for column in texts:
        check_text_column(rows, column, source)
        empty = [i for i, text in enumerate(rows[column]) if text is None]
        if empty:
            raise DataError(f"'{source}', rows {_first(empty)}: column '{column}' is empty. Fill or remove them.")
    indices = [None] * len(rows) if label_column is None else label_indices(rows[label_column], labels, source)
    return [
        {"text": row[text_column], "text_pair": row[pair_column] if pair_column else None, "label": label}
        for row, label in zip(rows, indices, strict=True)
    ]


def find_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """The label set of a column, for data that bring none: names sorted, or the numbers from 0 (or from the smallest,
    if that is larger) to the largest.

    Take it from the training rows, so that a label that only the held-out rows know is found.
    """
    seen = {value for value in values if not _hidden(value)}
    if seen and all(type(value) is int for value in seen):
        return tuple(map(str, range(min(seen), max(seen) + 1) if min(seen) > 0 else range(max(seen) + 1)))
    return tuple(sorted(map(str, seen)))


def label_indices(values: Iterable[Any], labels: Sequence[str], source: str) -> list[int | None]:
    """The index of each value, a name of `labels` or (unless names are numbers) an index itself; None where hidden.

    Raises DataError for any other value.
    """
    names = {name: i for i, name in enumerate(labels)}
    numbered = any(re.fullmatch(r"-?\d+", name) for name in labels)
    indices: list[int | None] = []
    strangers: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        index = None if _hidden(value) else names.get(str(value))
        if index is None and not numbered and isinstance(value, int) and 0 <= value < len(labels):
            index = value
        if index is None and not _hidden(value):
            strangers.setdefault(value, []).append(i)
        indices.append(index)
    if strangers:
        found = "; ".join(f"{value!r} in rows {_first(rows)}" for value, rows in list(strangers.items())[:5])
        indices_too = "" if numbered else f", or 0 to {len(labels) - 1}"
        raise DataError(f"'{source}': labels outside the set: {found}. Allowed: {', '.join(labels)}{indices_too}.")
    return indices


def write_submission(folder: str | Path, name: str, split: str, predictions: Sequence[int]) -> Path:
    """Write the predicted labels (indices, in the split's order) as the GLUE server wants them; returns the file.

    Raises ConfigError for a split that is not one of the task's test splits.
    """
    task = find_task(name)
    files = dict(task.submissions)
    if split not in files:
        raise ConfigError(
            f"split = {split!r} of task {name!r} is not submitted: allowed are {', '.join(files) or 'none'}"
        )
    path = Path(folder) / files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [task.labels[p] if task.submits_names else str(p) for p in predictions]
    path.write_text(
        "index\tprediction\n" + "".join(f"{i}\t{label}\n" for i, label in enumerate(shown)), encoding="utf-8"
    )
    return path


def _hidden(value: Any) -> bool:
    return value is None or value == -1 or value == ""


def _first(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
