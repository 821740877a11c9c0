"""Held-out rows split off the training rows, by input: an input is never on both sides; and inputs that are."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from ..errors import DataError


def split_off(
    rows: Sequence[dict[str, Any]], fraction: float, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rest, part) of rows {text, text_pair, label}: `fraction` of every label, drawn with `seed`, order kept.

    A row with a list of labels is drawn by the rarest of them; rows with numbers are all alike. Rows whose texts are
    equal up to case and spaces stay together, so that no dev text is trained on. A label with at least two texts has at
    least one in each part; texts without a label stay in the rest.
    """
    same: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        same.setdefault(plain(row["text"], row["text_pair"]), []).append(i)
    counts = Counter(k for row in rows if isinstance(row["label"], list) for k in row["label"])
    by_label: dict[int, list[list[int]]] = {}
    for indices in same.values():
        labels = [label for i in indices if (label := rows[i]["label"]) is not None]
        if labels:
            by_label.setdefault(_stratum(labels[0], counts), []).append(indices)
    draw, part = random.Random(seed), set()
    for _, groups in sorted(by_label.items()):
        part |= {i for indices in draw.sample(groups, _share(fraction, len(groups))) for i in indices}
    return [row for i, row in enumerate(rows) if i not in part], [rows[i] for i in sorted(part)]


def _stratum(label: Any, counts: Counter[int]) -> int:
    """What a row is drawn by: its label, the rarest of several (-1 if it has none of them), or nothing (a number)."""
    if isinstance(label, list):
        return min(label, key=lambda k: (counts[k], k), default=-1)
    return label if isinstance(label, int) else -1


def held_out_inputs(inputs: Iterator[tuple[str, ...]], fraction: float, source: str) -> set[tuple[str, ...]]:
    """`fraction` of the different inputs, at least one and not all; source, the name of the rows in errors.

    Those with the lowest hash: the order and number of rows do not matter, so that the stages of a job (labels,
    warm-up, RL) that read the same inputs hold out the same ones. Raises DataError for fewer than two inputs.
    """
    different = set(inputs)
    if len(different) < 2:
        raise DataError(
            f"'{source}' has fewer than two different inputs: none can be held out of training. Set eval_dataset."
        )
    ranked = sorted(different, key=lambda texts: sha256("\0".join(texts).encode()).digest())
    return set(ranked[: _share(fraction, len(ranked))])


def inputs_of(rows: Any) -> Iterator[tuple[str, ...]]:
    """What a student reads of each row, up to case and spaces: of Examples, label rows or labelled texts; of anything
    else (), which equals nothing.
    """
    if hasattr(rows, "inputs"):
        yield from rows.inputs()
    elif "student_input" in getattr(rows, "column_names", ()):
        yield from (plain(text) for text in rows["student_input"])
    else:
        for row in rows:
            text = row.get("student_input") if isinstance(row, Mapping) else getattr(row, "student_input", None)
            yield plain(text) if isinstance(text, str) else ()


def shared_inputs(train: Any, held_out: Any) -> list[int]:
    """Numbers of the held-out rows whose input is also one of the training rows."""
    known = set(inputs_of(train)) - {()}
    return [i for i, texts in enumerate(inputs_of(held_out)) if texts in known] if known else []


def plain(*texts: str | None) -> tuple[str, ...]:
    """Texts up to case and spaces; one that is missing is empty."""
    return tuple(" ".join((text or "").casefold().split()) for text in texts)


def _share(fraction: float, total: int) -> int:
    return min(max(round(fraction * total), 1), total - 1)
