"""Whose the recorded token ids of labels are: those of a tokenizer only if it has the labels' vocabulary."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import DataError
from ..io.provenance import origins
from ..models.vocabulary import NO_LIMIT, decode_texts, encode_texts, valid_vocab, vocabulary_record

logger = logging.getLogger(__name__)
BATCH = 1000


def own_generations(rows: Any, tokenizer: Any) -> frozenset[str | None]:
    """The generations of labels whose token ids are those of the tokenizer: the other labels are to be encoded from
    their text, and are counted in a warning.

    Labels without a recorded vocabulary (older folders, rows from elsewhere; generation None) are the tokenizer's if
    every row's ids give its text. rows: a data set, or dicts.
    """
    own, foreign = _divide(rows, tokenizer)
    for generation, (count, why) in foreign.items():
        logger.warning(
            "%d of %d labels (generation %s): %s, so their texts are tokenised anew with the student's tokenizer",
            count, len(rows), generation, why,
        )  # fmt: skip
    return own


def check_own(rows: Any, tokenizer: Any, name: str) -> None:
    """Raise DataError unless the token ids of all labels are those of the tokenizer of the model `name`."""
    _, foreign = _divide(rows, tokenizer)
    if foreign:
        count, why = next(iter(foreign.values()))
        raise DataError(
            f"{count} of {len(rows)} labels: {why}, but '{name}' is to read their token ids. Name the model that wrote "
            "them, or one with its vocabulary."
        )


def _divide(rows: Any, tokenizer: Any) -> tuple[frozenset[str | None], dict[str | None, tuple[int, str]]]:
    """(generations with the tokenizer's ids, other generations -> their number of labels and why)."""
    if rows is None or not len(rows) or "token_ids" not in _columns(rows):
        return frozenset(), {}
    recorded = {origin["generation"]: origin.get("vocabulary") for origin in origins(rows)}
    counts = Counter(row.get("generation") for batch in _batches(rows, ("generation",)) for row in batch)
    ours, foreign = vocabulary_record(tokenizer), {}
    for generation in counts:
        if (theirs := recorded.get(generation)) and theirs != ours:
            foreign[generation] = f"their vocabulary ({_shown(theirs)}) is not this one ({_shown(ours)})"
    unknown = {generation for generation in counts if not recorded.get(generation)}
    for generation in _without_their_texts(rows, tokenizer, unknown) if unknown else ():
        foreign[generation] = "no vocabulary is recorded, and their token ids do not give their texts"
    return frozenset(counts) - frozenset(foreign), {name: (counts[name], why) for name, why in foreign.items()}


def _shown(vocabulary: dict[str, Any]) -> str:
    return f"{vocabulary.get('tokens')} tokens, end {vocabulary.get('eos')}, digest {vocabulary.get('sha256')}"


def _without_their_texts(rows: Any, tokenizer: Any, asked: set[str | None]) -> set[str | None]:
    """Which of the generations `asked` have token ids that are not the label to the tokenizer."""
    found: set[str | None] = set()
    for batch in _batches(rows, ("generation", "token_ids", "label", "finish_reason")):
        labels = [row for row in batch if row.get("generation") in asked - found and row["token_ids"] is not None]
        found |= {row.get("generation") for row in _unlike(labels, tokenizer)}
    return found


def _unlike(labels: list[dict[str, Any]], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Labels whose ids do not give their text, or do not end as they should."""
    size = valid_vocab(tokenizer)
    known = []
    for row in labels:
        if all(0 <= token < size for token in row["token_ids"]):
            known.append(row)
        else:
            yield row
    encoded = encode_texts(tokenizer, [row["label"] for row in known], NO_LIMIT) if known else []
    decoded = decode_texts(tokenizer, [list(row["token_ids"]) for row in known])
    for row, ids, text in zip(known, encoded, decoded, strict=True):
        reason, own = row.get("finish_reason"), list(row["token_ids"])
        # Ranked choices are encoded, answers are decoded.
        like = own == ids if reason == "ranked" else text == row["label"]
        if not like or (reason == "eos" and own[-1:] != [tokenizer.eos_token_id]):
            yield row


def _columns(rows: Any) -> Any:
    return rows.column_names if hasattr(rows, "column_names") else rows[0]


def _batches(rows: Any, names: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """The named columns of all rows, as far as they exist."""
    names = tuple(name for name in names if name in _columns(rows))
    for start in range(0, len(rows), BATCH):
        if not hasattr(rows, "column_names"):
            yield [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        elif names:
            batch = rows.select_columns(list(names))[start : start + BATCH]
            yield [dict(zip(names, values, strict=True)) for values in zip(*(batch[n] for n in names), strict=True)]
        else:
            yield [{}] * min(BATCH, len(rows) - start)
