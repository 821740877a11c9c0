"""Scores of tagged words: entities, as seqeval and CoNLL count them, and the tags themselves.

Arguments are the tags of each row, by name; words without a known tag are left out. An entity is right if its type, its
first and its last word are. A tag I- that begins an entity counts as its beginning (seqeval's default mode).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..checks import OUTSIDE
from .classes import ClassScore

Tags = Sequence[Sequence[str]]


def _entity_score(name: str) -> Callable[[Tags, Tags], float]:
    def score(predicted: Tags, true: Tags) -> float:
        from seqeval import metrics

        of: Callable[..., Any] = getattr(metrics, f"{name}_score")
        return float(of(list(true), list(predicted), zero_division=0)) if true else 0.0

    score.__doc__ = f"{name} of the entities of all rows and types together; 0 where it is not defined."
    return score


entity_f1, entity_precision, entity_recall = map(_entity_score, ("f1", "precision", "recall"))


def token_accuracy(predicted: Tags, true: Tags) -> float:
    """Share of words that have their tag."""
    words = sum(map(len, true))
    right = sum(one == other for pair in zip(predicted, true, strict=True) for one, other in zip(*pair, strict=True))
    return right / words if words else 0.0


def sequence_accuracy(predicted: Tags, true: Tags) -> float:
    """Share of rows whose words all have their tags."""
    return sum(one == other for one, other in zip(predicted, true, strict=True)) / max(len(true), 1)


def entity_scores(predicted: Tags, true: Tags, names: Sequence[str]) -> list[ClassScore]:
    """Scores of each type of entity, by name; `rows` are entities. names: of all tags."""
    from seqeval.metrics.sequence_labeling import get_entities

    # Of all rows at once: seqeval puts an O between them. A tag without a type has the type _.
    given, gold = set(get_entities([*map(list, predicted)])), set(get_entities([*map(list, true)]))
    of_type = {kind: [0, 0, 0] for kind in sorted({name.partition("-")[2] or "_" for name in names if name != OUTSIDE})}
    for k, entities in enumerate((gold, given, given & gold)):
        for kind, _, _ in entities:
            of_type[kind][k] += 1
    return [ClassScore.of(kind, rows=n, predicted=g, right=r) for kind, (n, g, r) in of_type.items()]
