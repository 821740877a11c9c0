"""Classification data sets of single texts and pairs: GLUE, TREC and SST-5 from the hub, or your own tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import OneOf, check_choice
from ..errors import ConfigError, DataError
from .rows import OnBadRow, check_columns, check_text_column, load_table
from .text import TextFormat

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class TableLayout:
    """The columns and the format of a table of labelled texts.

    text     column of the first text; pair, of the second, None for single texts
    label    column of the label; None if there is none: a transfer set, for training on the teacher's outputs alone
    columns, quoted, delimiter, encoding  of text files, as in `TextFormat`
    """

    text: str = "text"
    label: str | None = "label"
    pair: str | None = None
    columns: tuple[str, ...] | None = None
    quoted: bool = True
    delimiter: str | None = None
    encoding: str | None = None

    @property
    def text_format(self) -> TextFormat:
        """Raises ConfigError as TextFormat does."""
        return TextFormat(self.delimiter, self.encoding, self.columns, self.quoted)

    @property
    def only(self) -> frozenset[str]:
        """The columns that are read."""
        return frozenset(name for name in (self.text, self.label, self.pair) if name is not None)


DEFAULT_LAYOUT = TableLayout()


@dataclass(frozen=True)
class ClassificationTask:
    """A data set: where it is, how it is read and how it is scored.

    source, subset   repository on the hub, and its subset
    layout           columns on the hub; raw, those of the .tsv files as GLUE distributes them (all but the test files)
    labels           names, in the order of their indices
    metrics          names in `rlkd.evaluation.task_metrics.CLASSIFICATION_METRICS`
    submissions      (test split, file name for the GLUE server); submits_names, whether the file has labels by name
    """

    source: str
    subset: str | None
    layout: TableLayout
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    dev_splits: tuple[str, ...] = ("validation",)
    submissions: tuple[tuple[str, str], ...] = ()
    submits_names: bool = False
    raw: TableLayout | None = None


def _glue(
    subset: str, text: str, pair: str | None, labels: tuple[str, ...], file: str, **more: Any
) -> ClassificationTask:
    more.setdefault("raw", TableLayout(text, "label", pair, quoted=False))
    more.setdefault("submissions", (("test", file),))
    return ClassificationTask("nyu-mll/glue", subset, TableLayout(text, "label", pair), labels, **more)


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
        raw=TableLayout("sentence", columns=("source", "label", "star", "sentence"), quoted=False),
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
        raw=TableLayout("sentence1", "gold_label", "sentence2", quoted=False),
    ),
    "qqp": _glue(
        "qqp",
        "question1",
        "question2",
        ("not_duplicate", "duplicate"),
        "QQP.tsv",
        metrics=("f1", "accuracy"),
        raw=TableLayout("question1", "is_duplicate", "question2", quoted=False),
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
        raw=TableLayout("#1 String", "Quality", "#2 String", quoted=False),
    ),
    "trec6": ClassificationTask(
        "CogComp/trec", None, TableLayout("text", "coarse_label"), ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        dev_splits=("test",),
    ),
    "sst5": ClassificationTask(
        "SetFit/sst5", None, DEFAULT_LAYOUT, ("very negative", "negative", "neutral", "positive", "very positive"),
    ),
}  # fmt: skip
TaskName = Annotated[str, OneOf(TASKS)]


def find_task(task: TaskName) -> ClassificationTask:
    """The task of this name. Raises ConfigError that lists them."""
    check_choice("task", task, TASKS)
    return TASKS[task]


def load_task(
    task: TaskName,
    split: str = "train",
    *,
    file: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "fail",
) -> list[dict[str, Any]]:
    """Rows {text, text_pair, label} of a split of a data set; label is None where the data set hides it.

    They come from the hub, or from a local `file`: a .tsv file of a GLUE task is read in GLUE's own format (without
    labels if the split is named test*), any other file with the columns of the hub. on_bad_row: `fail`, or `skip` rows
    that cannot be read (QQP's training file has some). Raises as `load_labelled` does.
    """
    found = find_task(task)
    layout = found.layout
    if file is not None and found.raw is not None and Path(file).suffix.lower() == ".tsv":
        # The test files have a header, and no labels.
        layout = replace(found.raw, label=None, columns=None) if split.startswith("test") else found.raw
    return load_labelled(
        file or found.source,
        layout,
        labels=found.labels,
        split=split,
        subset=None if file else found.subset,
        limit=limit,
        on_bad_row=on_bad_row,
    )


def load_labelled(
    source: str,
    layout: TableLayout = DEFAULT_LAYOUT,
    *,
    labels: Sequence[str] = (),
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "fail",
) -> list[dict[str, Any]]:
    """Rows {text, text_pair, label} of a hub data set or of local files.

    split, subset, limit and on_bad_row as in `load_rows`. label is the index in `labels` (given in the data by name or
    by index), None where it is missing or -1.
    Raises DataError for a column that does not exist or holds no text, and for labels not in the label set, with the
    rows; ConfigError for another on_bad_row.
    """
    rows, names = load_table(
        source,
        {"split": split, "subset": subset},
        limit=limit,
        text_format=layout.text_format,
        only=layout.only,
        on_bad_row=on_bad_row,
    )
    wanted = {"text_column": layout.text, "pair_column": layout.pair, "label_column": layout.label}
    check_columns(names, {role: column for role, column in wanted.items() if column is not None}, source)
    for column in [layout.text] if layout.pair is None else [layout.text, layout.pair]:
        check_text_column(rows, column, source)
        empty = [i for i, text in enumerate(rows[column]) if text is None]
        if empty:
            raise DataError(f"'{source}', rows {_first(empty)}: column '{column}' is empty. Fill or remove them.")
    indices: list[int | None] = [None] * len(rows)
    if layout.label is not None:
        indices = label_indices(label_values(rows, layout.label, source), labels, source)
    return [
        {"text": row[layout.text], "text_pair": row[layout.pair] if layout.pair else None, "label": label}
        for row, label in zip(rows, indices, strict=True)
    ]


def label_values(rows: datasets.Dataset, column: str, source: str) -> list[Any]:
    """The values of a label column: names where the data set names its classes, whole numbers as integers.

    Raises DataError for a list of labels or a fraction: rows of a multi-label or a regression task.
    """
    names: list[str] = getattr(rows.features[column], "names", None) or []
    values = []
    for i, value in enumerate(rows[column]):
        if isinstance(value, (list, dict)) or (isinstance(value, float) and math.isfinite(value) and value % 1):
            kind = "a number for regression" if isinstance(value, float) else "not one label"
            raise DataError(
                f"'{source}', row {i}: column '{column}' contains {str(value)[:60]}, {kind}. Only single-label "
                "classification is supported: name a column with one label in each row."
            )
        if isinstance(value, float):
            value = int(value) if math.isfinite(value) else None
        named = isinstance(value, int) and 0 <= value < len(names)
        values.append(names[value] if named else value)
    return values


def find_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """The label set of a column, for data without one: the names, sorted, or the numbers from 0 (or from the smallest,
    if that is larger) to the largest.

    Take it from the training rows, so that a label that only held-out rows have is detected.
    """
    seen = {value for value in values if not _hidden(value)}
    if seen and all(type(value) is int for value in seen):
        return tuple(map(str, range(min(seen), max(seen) + 1) if min(seen) > 0 else range(max(seen) + 1)))
    return tuple(sorted(map(str, seen)))


def label_indices(values: Iterable[Any], labels: Sequence[str], source: str) -> list[int | None]:
    """The index of each value: a name of `labels` or, unless names are numbers, an index itself; None if hidden.

    Raises DataError for any other value.
    """
    names = {name: i for i, name in enumerate(labels)}
    numbered = any(re.fullmatch(r"-?\d+", name) for name in labels)
    indices: list[int | None] = []
    unknown: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        index = None if _hidden(value) else names.get(str(value))
        if index is None and not numbered and isinstance(value, int) and 0 <= value < len(labels):
            index = value
        if index is None and not _hidden(value):
            unknown.setdefault(value, []).append(i)
        indices.append(index)
    if unknown:
        found = "; ".join(f"{value!r} in rows {_first(rows)}" for value, rows in list(unknown.items())[:5])
        indices_too = "" if numbered else f", or 0 to {len(labels) - 1}"
        raise DataError(f"'{source}': labels not in the label set: {found}. Allowed: {', '.join(labels)}{indices_too}.")
    return indices


def write_submission(folder: str | Path, task: TaskName, split: str, predictions: Sequence[int]) -> Path:
    """Write predicted labels (indices, in the order of the split) in the GLUE server's format; returns the file.

    Raises ConfigError for an unknown task, and for a split that is not one of its test splits.
    """
    found = find_task(task)
    files = dict(found.submissions)
    if split not in files:
        raise ConfigError(
            f"split = {split!r} of task {task!r} is not submitted: allowed are {', '.join(files) or 'none'}"
        )
    path = Path(folder) / files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [found.labels[p] if found.submits_names else str(p) for p in predictions]
    path.write_text(
        "index\tprediction\n" + "".join(f"{i}\t{label}\n" for i, label in enumerate(shown)), encoding="utf-8"
    )
    return path


def _hidden(value: Any) -> bool:
    return value is None or value == -1 or value == ""


def _first(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
