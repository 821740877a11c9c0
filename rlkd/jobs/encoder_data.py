"""Labelled rows for the recipe of encoder-only students: a task from the hub by name, or the user's own files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import check_choice, tag_fault
from ..choices import ProblemType
from ..data.glue import TableLayout, find_task, load_labelled, load_task
from ..data.label_columns import find_labels, label_sets, label_values, word_lists, word_tags
from ..data.rows import check_columns, load_table, local_path
from ..data.splits import split_off
from ..data.text import text_format
from ..errors import ConfigError, DataError, nearest
from ..evaluation.classes import in_words
from ..evaluation.problems import PROBLEMS, classification_metrics
from .encoder_data_arguments import LabelledDataArguments
from .encoder_label_folder import read_label_folder

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
# A file that has both of these columns contains pairs.
PAIRED = {"sentence1": "sentence2", "question1": "question2", "premise": "hypothesis", "text": "text_pair"}


@dataclass
class LabelledData:
    """Loaded rows. dev has the rows of each held-out split; checkpoints are selected on the first. test has further
    rows, which are scored at the end; recorded, whether the training rows bring a teacher's logits. labels: of
    regression, what its number is.
    """

    name: str
    train: Rows
    dev: dict[str, Rows]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    note: str
    test: dict[str, Rows] = field(default_factory=dict)
    problem_type: ProblemType = "single_label_classification"

    def __post_init__(self) -> None:
        check_choice("problem_type", self.problem_type, ProblemType)

    @property
    def recorded(self) -> bool:
        return "logits" in self.train[0]

    @property
    def held_out(self) -> dict[str, Rows]:
        """The dev and the test rows of every split."""
        return {**self.dev, **self.test}

    @property
    def first_dev(self) -> Rows:
        return next(iter(self.dev.values()))

    @property
    def measured(self) -> list[str]:
        """The chosen metrics, and those that the problem always has."""
        return list(dict.fromkeys([*self.metrics, *PROBLEMS[self.problem_type].always]))

    def compute_metrics(self) -> Callable[[Any], dict[str, float]]:
        """`compute_metrics` of the Trainer: the chosen metrics, their mean as `score`, and those always measured."""
        compute = classification_metrics(self.measured, self.problem_type, self.labels)

        def scored(prediction: Any) -> dict[str, float]:
            values = compute(prediction)
            return {"score": sum(values[name] for name in self.metrics) / len(self.metrics), **values}

        return scored


def load_labelled_data(data: LabelledDataArguments, teacher_labels: tuple[str, ...] = ()) -> LabelledData:
    """Rows and label names, every column, label and text checked.

    Args: teacher_labels, the names of a teacher that is fine-tuned already, in the order that the data must follow.
    Raises DataError or ConfigError.
    """
    if data.pseudo_labels is not None:
        loaded = _load_label_folder(data)
    elif data.train_file is not None:
        loaded = _load_files(data, teacher_labels)
    else:
        loaded = _load_task(data, teacher_labels)
    for source in data.test_files:
        name = Path(source).stem
        if name in loaded.held_out:
            raise ConfigError(f"test_files: two held-out sets are called '{name}'. Rename the file {source}.")
        loaded.test[name] = _held_out(data, "test_files", source, loaded.labels)
    return loaded


def _load_label_folder(data: LabelledDataArguments) -> LabelledData:
    assert data.pseudo_labels is not None
    task = None if data.task is None else find_task(data.task)
    labels = task.labels if task else tuple(data.labels or ())
    if data.dev_file is not None and not labels:
        _check_local("dev_file", data.dev_file)
        labels = _labels_of_file(data, data.dev_file)
    choices: Any = data.choice_labels
    train, labels, note = read_label_folder(
        data.pseudo_labels, labels, choices, data.content_free_labels, data.train_limit
    )
    _check_text(train, data.pseudo_labels)
    if data.task is not None and task is not None:
        dev = {split: load_task(data.task, split, limit=data.dev_limit) for split in task.dev_splits}
        held_out = "the task's own split"
    elif data.dev_file is not None:
        dev, held_out = {"dev": _held_out(data, "dev_file", data.dev_file, labels)}, f"rows of {data.dev_file}"
    else:
        train, part = split_off(train, data.dev_fraction, data.dev_seed)
        dev = {"dev": [row for row in part if row["label"] is not None][: data.dev_limit]}
        held_out = f"{len(dev['dev'])} rows with a gold label split off"
        if not dev["dev"]:
            raise DataError(
                f"'{data.pseudo_labels}' has no gold labels to hold out: set task, or dev_file to labelled rows."
            )
    name = Path(data.pseudo_labels).name
    metrics = tuple(data.metrics or (task.metrics if task else ["accuracy"]))
    return LabelledData(name, train, dev, labels, metrics, f"{held_out}; training: {note}")


def _check_text(rows: Rows, source: str) -> None:
    if blank := [i for i, row in enumerate(rows) if not row["text"].strip()]:
        raise DataError(f"'{source}': {len(blank)} texts are empty (first: row {blank[0]}). Label others.")


def _held_out(data: LabelledDataArguments, role: str, source: str, labels: tuple[str, ...]) -> Rows:
    """The labelled rows of a file. Raises DataError if there are none."""
    _check_local(role, source)
    _check_pairs(data, role, source)
    rows = load_labelled(source, _layout(data, source), labels=labels, limit=data.dev_limit, on_bad_row=data.on_bad_row)
    _check_texts(rows, data, source)
    return _with_labels(rows, source)


def _with_labels(rows: Rows, source: str) -> Rows:
    found = [row for row in rows if row["label"] is not None]
    if not found:
        raise DataError(f"'{source}': no row has a label. Held-out rows need them.")
    return found


def _load_task(data: LabelledDataArguments, teacher_labels: tuple[str, ...]) -> LabelledData:
    assert data.task is not None
    task = find_task(data.task)
    if teacher_labels and task.problem_type != "regression":
        _check_order(task.labels, teacher_labels, f"task {data.task}")
    train = load_task(data.task, limit=data.train_limit)
    dev = {split: load_task(data.task, split, limit=data.dev_limit) for split in task.dev_splits}
    _check_labels(train, task.labels, data.task)
    metrics, note = tuple(data.metrics or task.metrics), "the task's own split"
    return LabelledData(data.task, train, dev, task.labels, metrics, note, problem_type=task.problem_type)


def _load_files(data: LabelledDataArguments, teacher_labels: tuple[str, ...]) -> LabelledData:
    files = {"train_file": data.train_file, "dev_file": data.dev_file}
    sources = {role: source for role, source in files.items() if source is not None}
    for role, source in sources.items():
        _check_local(role, source)
    if data.problem == "regression":
        labels: tuple[str, ...] = (data.label_column,)
    else:
        labels = tuple(data.labels or ()) or teacher_labels or _labels_of_file(data, str(data.train_file))
    if teacher_labels and data.problem != "regression":
        _check_order(labels, teacher_labels, "labels")
    if data.problem == "token_classification" and (fault := tag_fault(labels)):
        raise DataError(f"'{data.train_file}', column '{data.label_column}' (label_column): {fault}.")
    loaded = {}
    for role, source in sources.items():
        _check_pairs(data, role, source)
        try:
            loaded[role] = load_labelled(
                source,
                _layout(data, source),
                labels=labels,
                limit=data.train_limit if role == "train_file" else data.dev_limit,
                on_bad_row=data.on_bad_row,
            )
        except DataError as error:
            if "labels not in the label set" not in str(error) or data.labels:
                raise
            whose = "the teacher's" if teacher_labels else f"those of '{data.train_file}'"
            raise DataError(f"{error} (The labels are {whose}; set labels to name others.)") from None
        _check_texts(loaded[role], data, source)
    if teacher_labels and not data.labels and data.problem != "regression":
        _warn_of_numbers(data, teacher_labels)
    train = loaded["train_file"]
    if data.problem != "token_classification" or not teacher_labels:  # whose tags alone can teach words
        _check_labels(train, labels, sources["train_file"])
    if "dev_file" in loaded:
        dev, note = _with_labels(loaded["dev_file"], str(data.dev_file)), f"rows of {data.dev_file}"
    else:
        train, dev = split_off(train, data.dev_fraction, data.dev_seed)
        dev = [row for row in dev if row["label"] is not None][: data.dev_limit]
        each = "" if data.problem == "regression" else " of each label"
        note = (
            f"{len(dev)} of {len(loaded['train_file'])} rows split off {data.train_file}, "
            f"{data.dev_fraction:.0%}{each}, dev_seed {data.dev_seed}"
        )
        if not dev:
            raise DataError(f"'{data.train_file}' has too few rows to split any off: set dev_file.")
    name, kind = Path(sources["train_file"]).stem, data.problem
    note += _described(loaded["train_file"], labels, kind)
    return LabelledData(
        name, train, {"dev": dev}, labels, tuple(data.metrics or PROBLEMS[kind].chosen), note, problem_type=kind
    )


def _described(rows: Rows, labels: tuple[str, ...], problem_type: ProblemType) -> str:
    """What was found in a label column that holds more than one label in each row."""
    known = [row["label"] for row in rows if row["label"] is not None]
    if problem_type == "regression":
        return f"; numbers from {min(known):g} to {max(known):g}, {len(rows) - len(known)} rows without one"
    if problem_type == "multi_label_classification":
        none = sum(not label for label in known)
        return (
            f"; {len(labels)} labels: {', '.join(labels)}; {none} of {len(rows)} rows have none of them, and of "
            f"{len(rows) - len(known)} they are not known"
        )
    if problem_type == "token_classification":
        types = sorted({name.partition("-")[2] for name in labels} - {""})
        words = sum(len(row["words"]) for row in rows)
        return (
            f"; {len(labels)} tags of {len(types)} types of entities: {', '.join(types)}; {words} words, and "
            f"{len(rows) - len(known)} of {len(rows)} rows without tags"
        )
    return ""


def _check_local(role: str, source: str) -> None:
    if local_path(source) is None:
        raise DataError(f"{role} = '{source}': no such file. For a data set of the hub, set task.")


def _labels_of_file(data: LabelledDataArguments, source: str) -> tuple[str, ...]:
    layout = _layout(data, source)
    rows, names = _table(data, source, limit=data.train_limit, only=layout.only)
    check_columns(names, {"label_column": data.label_column, "text_column": data.text_column}, source)
    labels = find_labels(_values(data, rows, source))
    if data.problem == "token_classification":
        return labels
    if len(labels) * 2 > max(len(rows), 4):
        raise DataError(
            f"'{source}': column '{data.label_column}' has {len(labels)} values in {len(rows)} rows, e.g. "
            f"'{labels[0][:40]}'. Is it the label? Name another label_column, or give labels."
        )
    return labels


def _layout(data: LabelledDataArguments, source: str) -> TableLayout:
    found = text_format(vars(data), beside=data.train_file, path=source)
    return TableLayout(
        data.text_column,
        data.label_column,
        data.pair_column,
        columns=None if found.columns is None else tuple(found.columns),
        delimiter=found.delimiter,
        encoding=found.encoding,
        problem_type=data.problem,
        separator=data.label_separator,
    )


def _table(data: LabelledDataArguments, source: str, **options: Any) -> Any:
    """The rows of a file and the names of its columns."""
    return load_table(source, text_format=_layout(data, source).text_format, on_bad_row=data.on_bad_row, **options)


def _values(data: LabelledDataArguments, rows: Any, source: str) -> list[Any]:
    """The labels in a file, of all rows together."""
    if data.problem == "single_label_classification":
        return label_values(rows, data.label_column, source)
    if data.problem == "token_classification":
        words = word_lists(rows, data.text_column, source)
        return [tag for tags in word_tags(rows, data.label_column, words, source) for tag in tags or ()]
    sets = label_sets(rows, data.label_column, source, data.label_separator)
    return [label for own in sets for label in own or ()]


def _warn_of_numbers(data: LabelledDataArguments, labels: tuple[str, ...]) -> None:
    """Which label a number stands for is the teacher's order, unless the file names its labels."""
    assert data.train_file is not None
    rows, _ = _table(data, data.train_file, limit=data.train_limit, only=_layout(data, data.train_file).only)
    numbers = any(isinstance(value, int) for value in _values(data, rows, data.train_file))
    if numbers and not all(name.isdigit() for name in labels):
        logger.warning(
            "'%s' numbers its labels: they are taken for the fine-tuned teacher's, %s. If they mean others, write the "
            "names into the column.", data.train_file, ", ".join(f"{i} = {name}" for i, name in enumerate(labels)),
        )  # fmt: skip


def _check_pairs(data: LabelledDataArguments, role: str, source: str) -> None:
    """pair_column must be set if, and only if, the file has pairs. Raises DataError."""
    _, names = _table(data, source, limit=1, only=_layout(data, source).only)
    partner = PAIRED.get(data.text_column)
    if data.pair_column is None:
        if partner in names:
            raise DataError(
                f"'{source}' has pairs: the columns '{data.text_column}' and '{partner}'. Set pair_column: {partner}, "
                f"or remove the column '{partner}' if the sentences are not pairs."
            )
    elif data.pair_column not in names:
        raise DataError(
            f"{role} '{source}' has single sentences: no column '{data.pair_column}' "
            f"(pair_column).{nearest(data.pair_column, names)} "
            f"Found: {', '.join(names)}. Name the second sentence's column, or leave pair_column out."
        )
    elif len({data.text_column, data.pair_column, data.label_column}) < 3:
        raise ConfigError("text_column, pair_column and label_column must be three different columns")


def _check_texts(rows: Rows, data: LabelledDataArguments, source: str) -> None:
    for key, column in (("text", data.text_column), ("text_pair", data.pair_column)):
        blank = [i for i, row in enumerate(rows) if column is not None and not row[key].strip()]
        if blank:
            shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
            raise DataError(f"'{source}', rows {shown}: column '{column}' is empty. Fill or remove them.")


def _check_labels(rows: Rows, labels: tuple[str, ...], source: str) -> None:
    known = [row["label"] for row in rows if row["label"] is not None]
    if rows[0].get("words"):
        known = [tag for tags in known for tag in tags]
    if len({str(label) for label in known}) < 2:
        label = next(iter(known), None)
        found = "no label" if label is None else f"only the label '{in_words(label, labels)}'"
        raise DataError(f"'{source}' has {found} in its {len(rows)} rows. A classifier needs at least two labels.")


def _check_order(labels: tuple[str, ...], teacher_labels: tuple[str, ...], whose: str) -> None:
    if [name.casefold() for name in labels] != [name.casefold() for name in teacher_labels]:
        raise ConfigError(
            f"the fine-tuned teacher has the labels {', '.join(teacher_labels)}, in this order, and {whose} has "
            f"{', '.join(labels)}. Use a teacher with these labels, or let the recipe fine-tune one."
        )
