"""Rows of a probing task, from tables or from one file in SentEval's format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .glue import DEFAULT_LAYOUT, TableLayout, load_labelled
from .label_columns import find_labels, label_values
from .readers import Cells
from .rows import check_columns, check_limit, load_table
from .text import TextFile, TextFormat
from .values import BadRowError

SPLITS = {"tr": "train", "va": "validation", "te": "test"}
HELD_OUT = 0.1  # share of the training rows, if there are no validation rows
Row = dict[str, Any]


@dataclass(frozen=True)
class ProbeRows:
    """Rows {text, text_pair, label, where} of each split; label is the index in `classes`."""

    classes: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def read_task_file(file: str, *, limit: int | None = None, seed: int = 0) -> ProbeRows:
    """A file in SentEval's format: lines `split<TAB>label<TAB>text`, split tr, va or te, without header or quoting.

    limit keeps the first rows of each split. Raises DataError with the file and line of the first bad row.
    """
    check_limit(limit)
    path = Path(file)
    if not path.is_file():
        raise DataError(f"'{file}' is not a file. Give one with lines split<TAB>label<TAB>text, split tr, va or te.")
    text_format = TextFormat("\t", columns=("split", "label", "text"), quoted=False)
    reader = Cells(TextFile(path, text_format), text_format)
    rows: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for place, raw in reader.records():
        row = reader.parse(place, raw)
        if row["split"] not in SPLITS:
            raise BadRowError(f"{reader.where(place)}: split '{row['split']}': allowed are {', '.join(SPLITS)}.")
        if limit is None or len(rows[row["split"]]) < limit:
            where = reader.where(place)
            rows[row["split"]].append({"text": row["text"], "text_pair": None, "label": row["label"], "where": where})
    for name in ("tr", "te"):
        if not rows[name]:
            raise DataError(f"{file} has no rows of split '{name}' ({SPLITS[name]}). At least one is needed.")
    classes = find_labels(row["label"] for split in rows.values() for row in split)
    for row in (row for split in rows.values() for row in split):
        row["label"] = classes.index(row["label"]) if row["label"] else None
    return _checked(classes, rows["tr"], rows["va"], rows["te"], seed)


def read_tables(
    train: str,
    test: str,
    validation: str | None = None,
    *,
    layout: TableLayout = DEFAULT_LAYOUT,
    limit: int | None = None,
    seed: int = 0,
) -> ProbeRows:
    """Tables as `load_labelled` reads them. Without validation rows, a tenth of the training rows, drawn with `seed`.

    limit keeps the first rows of each table. Raises DataError for rows and labels that cannot be used.
    """
    assert layout.label is not None
    values: list[Any] = []
    sources = [train, test] if validation is None else [train, test, validation]
    for source in sources:
        rows, names = load_table(source, limit=limit, text_format=layout.text_format, only=[layout.label])
        check_columns(names, {"label_column": layout.label}, source)
        values += label_values(rows, layout.label, source)
    classes = find_labels(values)

    def read(source: str) -> list[Row]:
        found = load_labelled(source, layout, labels=classes, limit=limit)
        return [row | {"where": f"{source}, row {i}"} for i, row in enumerate(found)]

    return _checked(classes, read(train), [] if validation is None else read(validation), read(test), seed)


def _checked(
    classes: tuple[str, ...], train: list[Row], validation: list[Row], test: list[Row], seed: int
) -> ProbeRows:
    for row in (*train, *validation, *test):
        if row["label"] is None:
            raise DataError(f"{row['where']} has no label. Probing needs one in every row: add it or remove the row.")
    known = _labels(train)
    for row in (*validation, *test):
        if row["label"] not in known:
            raise DataError(
                f"{row['where']}: the label '{classes[row['label']]}' never occurs in the training rows (those have "
                f"{', '.join(classes[i] for i in sorted(known)[:10])}), so no probe can predict it. Remove such rows, "
                "or train on more."
            )
    if not validation:
        order = np.random.default_rng(seed).permutation(len(train)).tolist()
        held_out = set(order[: max(1, int(HELD_OUT * len(train)))])
        validation = [row for i, row in enumerate(train) if i in held_out]
        train = [row for i, row in enumerate(train) if i not in held_out]
    if len(_labels(train)) < 2:
        found = ", ".join(classes[i] for i in _labels(train)) or "none"
        raise DataError(f"the training rows have fewer than 2 labels ({found}): a probe needs at least two.")
    return ProbeRows(classes, train, validation, test)


def _labels(rows: Iterable[Row]) -> set[int]:
    return {row["label"] for row in rows}
