"""Classification data sets of single texts and pairs: GLUE, TREC and SST-5 from the hub, or your own tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import OneOf, check_choice
from ..choices import ProblemType
from ..errors import ConfigError, DataError
from .label_columns import first, label_indices, label_sets, label_values, numbers, word_lists, word_tags
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
    problem_type, separator  what the label column holds (see `label_columns`): one label, lists of labels (or, with a
                             separator, their names as text), numbers, or lists of tags, for the words in the text
                             column
    """

    text: str = "text"
    label: str | None = "label"
    pair: str | None = None
    columns: tuple[str, ...] | None = None
    quoted: bool = True
    delimiter: str | None = None
    encoding: str | None = None
    problem_type: ProblemType = "single_label_classification"
    separator: str | None = None

    def __post_init__(self) -> None:
        check_choice("problem_type", self.problem_type, ProblemType)

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
    labels           names, in the order of their indices; of a regression task, what its number is
    metrics          names in `rlkd.evaluation.problems.CLASSIFICATION_METRICS`
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

    @property
    def problem_type(self) -> ProblemType:
        return self.layout.problem_type


def _glue(
    subset: str, text: str, pair: str | None, labels: tuple[str, ...], file: str, **more: Any
) -> ClassificationTask:
    kind = more.pop("problem_type", TableLayout.problem_type)
    more.setdefault("raw", TableLayout(text, "label", pair, quoted=False))
    more.setdefault("submissions", (("test", file),))
    layout = TableLayout(text, "label", pair, problem_type=kind)
    return ClassificationTask("nyu-mll/glue", subset, layout, labels, **more)


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
    "stsb": _glue(
        "stsb",
        "sentence1",
        "sentence2",
        ("similarity",),
        "STS-B.tsv",
        metrics=("pearson", "spearman"),
        problem_type="regression",
        raw=TableLayout("sentence1", "score", "sentence2", quoted=False, problem_type="regression"),
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
    """Rows {text, text_pair, label} of a split of a data set; label is None where the data set hides it (the test rows
    of a regression task, which have -1 as any number, too).

    They come from the hub, or from a local `file`: a .tsv file of a GLUE task is read in GLUE's own format (without
    labels if the split is named test*), any other file with the columns of the hub. on_bad_row: `fail`, or `skip` rows
    that cannot be read (QQP's training file has some). Raises as `load_labelled` does.
    """
    found = find_task(task)
    layout = found.layout
    if file is not None and found.raw is not None and Path(file).suffix.lower() == ".tsv":
        # The test files have a header, and no labels.
        layout = replace(found.raw, label=None, columns=None) if split.startswith("test") else found.raw
    if layout.problem_type == "regression" and split.startswith("test"):
        layout = replace(layout, label=None)
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
    by index), None where it is missing or -1; by `layout.problem_type` a list of such indices, or a number. Rows of
    tagged words have `words`, too, of which text is the line.
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
    if layout.problem_type == "token_classification":
        return _tagged(rows, layout, labels, source)
    for column in [layout.text] if layout.pair is None else [layout.text, layout.pair]:
        check_text_column(rows, column, source)
        empty = [i for i, text in enumerate(rows[column]) if text is None]
        if empty:
            raise DataError(f"'{source}', rows {first(empty)}: column '{column}' is empty. Fill or remove them.")
    return [
        {"text": row[layout.text], "text_pair": row[layout.pair] if layout.pair else None, "label": label}
        for row, label in zip(rows, _labels(rows, layout, labels, source), strict=True)
    ]


def _tagged(rows: datasets.Dataset, layout: TableLayout, labels: Sequence[str], source: str) -> list[dict[str, Any]]:
    """Rows {text, text_pair, words, label}."""
    words = word_lists(rows, layout.text, source)
    tags: list[Any] = [None] * len(words)
    if layout.label is not None:
        tags = word_tags(rows, layout.label, words, source)
        owner = [i for i, own in enumerate(tags) for _ in own or ()]
        found = iter(label_indices([tag for own in tags for tag in own or ()], labels, source, owner))
        tags = [None if own is None else [next(found) for _ in own] for own in tags]
    pairs = zip(words, tags, strict=True)
    return [{"text": " ".join(own), "text_pair": None, "words": own, "label": label} for own, label in pairs]


def _labels(rows: datasets.Dataset, layout: TableLayout, labels: Sequence[str], source: str) -> list[Any]:
    """The label of each row, in the form that the problem has."""
    if layout.label is None:
        return [None] * len(rows)
    if layout.problem_type == "regression":
        return numbers(rows[layout.label], layout.label, source)
    if layout.problem_type == "multi_label_classification":
        sets = label_sets(rows, layout.label, source, layout.separator)
        owner = [i for i, names in enumerate(sets) for _ in names or ()]
        found = label_indices([name for names in sets for name in names or ()], labels, source, owner)
        indices = iter(found)
        return [None if names is None else sorted({next(indices) for _ in names}) for names in sets]  # type: ignore[type-var]
    return label_indices(label_values(rows, layout.label, source), labels, source)


def write_submission(folder: str | Path, task: TaskName, split: str, predictions: Sequence[float]) -> Path:
    """Write predicted labels (indices, or numbers; in the order of the split) in the GLUE server's format; returns the
    file.

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
    shown = [found.labels[int(p)] if found.submits_names else str(p) for p in predictions]
    path.write_text(
        "index\tprediction\n" + "".join(f"{i}\t{label}\n" for i, label in enumerate(shown)), encoding="utf-8"
    )
    return path
