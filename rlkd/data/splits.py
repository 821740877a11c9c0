"""A dev set split off the training rows, for data sets that have none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def split_off(
    rows: Sequence[dict[str, Any]], fraction: float, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rest, part) of rows {text, text_pair, label}: `fraction` of every label, drawn with `seed`, order kept.

    Rows whose texts are equal up to case and spaces stay together, so that no dev text is trained on. A label with at
    least two texts has at least one in each part; texts without a label stay in the rest.
    """
    same: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        same.setdefault((_plain(row["text"]), _plain(row["text_pair"] or "")), []).append(i)
    by_label: dict[int, list[list[int]]] = {}
    for indices in same.values():
        labels = [label for i in indices if (label := rows[i]["label"]) is not None]
        if labels:
            by_label.setdefault(labels[0], []).append(indices)
    draw, part = random.Random(seed), set()
    for _, groups in sorted(by_label.items()):
        wanted = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
        part |= {i for indices in draw.sample(groups, wanted) for i in indices}
    return [row for i, row in enumerate(rows) if i not in part], [rows[i] for i in sorted(part)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
