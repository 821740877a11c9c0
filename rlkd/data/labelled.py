"""Labelled texts and pairs of texts as token ids, for classifiers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..choices import ProblemType
from ..errors import DataError, ModelError
from ..tensors import length_mask, pad_stack
from .label_columns import UNLABELLED
from .splits import plain

logger = logging.getLogger(__name__)

# What the labels of a batch are, as in `evaluation.problems`.
DTYPES: dict[ProblemType, torch.dtype] = {
    "single_label_classification": torch.int64,
    "multi_label_classification": torch.float32,
    "regression": torch.float32,
    "token_classification": torch.int64,
}


class EncodedTexts(Sequence[dict[str, Any]]):
    """Rows {text, text_pair (or None), label (or None)}, tokenised, each with its index for the teacher's cache.

    Args: rows, which may bring the teacher's `logits`, one for each label; tokenizer, a fast one; max_length, tokens to
    cut texts to; num_labels, to check labels against; problem_type, what a label is: an index, a list of the indices of
    the labels that the row has, or a number. A row without a label (None) is trained on the teacher's outputs alone.
    Raises DataError if there are no rows, a text is missing or not a string, a label is not in the label set, only some
    rows are pairs, or logits are not numbers for all rows and labels; ModelError if the tokenizer has no padding token.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        max_length: int,
        num_labels: int,
        problem_type: ProblemType = "single_label_classification",
    ):
        if not rows:
            raise DataError("no rows: at least one text is needed")
        if tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer has no padding token. Set its pad_token to one in the model's vocabulary.")
        self.pad_id = int(tokenizer.pad_token_id)
        first = [row.get("text") for row in rows]
        second = [row.get("text_pair") for row in rows]
        alone = [i for i, text in enumerate(second) if text is None]
        if alone and len(alone) < len(second):
            raise DataError(
                f"rows {', '.join(map(str, alone[:5]))}: text_pair is missing, but other rows have one. A pair task "
                "needs two texts in every row."
            )
        for i, pair in enumerate(zip(first, second, strict=True)):
            if not all(isinstance(text, str) for text in pair[: 1 if alone else 2]):
                raise DataError(f"row {i}: text and text_pair must be text, found {pair}. Fix or remove the row.")
        self.texts = list(zip(first, second, strict=True))
        self.problem_type, own = problem_type, LABELS[problem_type]
        self.labels = [own(i, row.get("label"), num_labels) for i, row in enumerate(rows)]
        self.logits = _recorded_logits(rows, num_labels)
        encoded = self.encode(tokenizer, truncation=True, max_length=max_length, verbose=False)
        self.names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        self.ids = {name: encoded[name] for name in self.names}

    def encode(self, tokenizer: Any, **options: Any) -> Any:
        """The tokenizer's output for all rows."""
        first, second = ([texts[k] for texts in self.texts] for k in range(2))
        return tokenizer(first, None if second[0] is None else second, **options)

    @property
    def true(self) -> np.ndarray:
        """The labels of all rows, as in `evaluation.problems`."""
        return stacked_labels(self.labels, self.problem_type).numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return {**{name: ids[index] for name, ids in self.ids.items()}, "label": self.labels[index], "index": index}

    def inputs(self) -> Iterator[tuple[str, ...]]:
        """The texts of each row, up to case and spaces."""
        return (plain(*texts) for texts in self.texts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, special ones included."""
        return [len(ids) for ids in self.ids["input_ids"]]

    def digest(self) -> str:
        """SHA-256 of everything a model reads, without the labels."""
        digest = sha256()
        for name in self.names:
            for ids in self.ids[name]:
                digest.update(b"%d:" % len(ids) + torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all training data, labels included."""
        digest = sha256(f"{self.digest()} {self.labels}".encode())
        if self.logits is not None:
            digest.update(self.logits.numpy().tobytes())
        return digest.hexdigest()[:16]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """input_ids, attention_mask (and token_type_ids) [B, L], padded on the right; labels [B], of several
        labels [B, C], as in `evaluation.problems`; index [B];
        teacher_logits [B, C] where the rows bring them.
        """
        batch: dict[str, Tensor] = {
            name: pad_stack([torch.tensor(row[name]) for row in rows], self.pad_id if name == "input_ids" else 0)
            for name in self.names
        }
        batch["attention_mask"] = length_mask([len(row["input_ids"]) for row in rows]).long()
        batch["labels"] = stacked_labels([row["label"] for row in rows], self.problem_type)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        if self.logits is not None:
            batch["teacher_logits"] = self.logits[batch["index"]]
        return batch

    def batches(self, size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """All rows, shortest first, in batches of `size`: the rows' numbers and the model's inputs."""
        return ((numbers, model_inputs(batch)) for numbers, batch in self.collated(size))

    def collated(self, size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """As `batches`, with everything that is collated."""
        lengths = self.lengths
        order = sorted(range(len(self)), key=lambda i: (lengths[i], i))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield numbers, self.collate([self[i] for i in numbers])


def labelled_rows(rows: Sequence[Mapping[str, Any]], role: str) -> list[Mapping[str, Any]]:
    """The rows that have a label; the others are counted in a warning. Raises DataError if no row has one."""
    kept = [row for row in rows if row.get("label") is not None]
    if not kept:
        raise DataError(f"{role}: none of {len(rows)} rows has a label, and only labelled rows are used here")
    if len(kept) < len(rows):
        logger.warning("%s: skipping %d of %d rows, which have no label", role, len(rows) - len(kept), len(rows))
    return kept


def _recorded_logits(rows: Sequence[Mapping[str, Any]], num_labels: int) -> Tensor | None:
    """The teacher's logits that the rows bring [rows, C], float32; None if no row has any."""
    given = [row.get("logits") for row in rows]
    if all(values is None for values in given):
        return None
    for i, values in enumerate(given):
        numbers = [value for value in values or () if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) != num_labels or len(values or ()) != num_labels:
            raise DataError(f"row {i}: logits must be {num_labels} finite numbers, found {values}")
    return torch.tensor(given, dtype=torch.float32)


def _label(index: int, label: Any, num_labels: int) -> int:
    if label is None:
        return UNLABELLED
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
        raise DataError(
            f"row {index}: label {label!r} is not in the label set: allowed are the whole numbers 0 to "
            f"{num_labels - 1}, or None for a row that is trained on the teacher's outputs alone"
        )
    return label


def _label_set(index: int, label: Any, num_labels: int) -> list[float]:
    """1 for each label that the row has and 0 for the others; NaN for all of them if they are not known."""
    if label is None:
        return [math.nan] * num_labels
    if not isinstance(label, (list, tuple)) or None in label:
        raise DataError(
            f"row {index}: label {label!r} is not a list: a multi-label row has the list of the numbers of its labels, "
            "[] if it has none, or None for a row that is trained on the teacher's outputs alone"
        )
    mine = [_label(index, one, num_labels) for one in label]
    return [float(k in mine) for k in range(num_labels)]


def _number(index: int, label: Any, num_labels: int) -> float:
    """The number as a float; NaN if it is not known."""
    if label is None:
        return math.nan
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        raise DataError(
            f"row {index}: label {label!r} is not a finite number, or None for a row that is trained on the teacher's "
            "outputs alone"
        )
    return float(label)


def _tags(index: int, label: Any, num_labels: int) -> list[int]:
    """The tag of each word; [] if they are not known."""
    if not isinstance(label, (list, tuple, type(None))) or None in (label or ()):
        raise DataError(
            f"row {index}: label {str(label)[:60]!r} is not a list with the number of a tag for each word, or None for "
            "a row that is trained on the teacher's outputs alone"
        )
    return [_label(index, one, num_labels) for one in label or ()]


LABELS: dict[ProblemType, Callable[[int, Any, int], Any]] = {
    "single_label_classification": _label,
    "multi_label_classification": _label_set,
    "regression": _number,
    "token_classification": _tags,
}


def stacked_labels(labels: Sequence[Any], problem_type: ProblemType) -> Tensor:
    """Labels of rows, as `LABELS` gives them, in one tensor; tags beyond the end of a row are UNLABELLED."""
    kind = DTYPES[problem_type]
    if problem_type == "token_classification":
        return pad_stack([torch.tensor(tags, dtype=kind) for tags in labels], UNLABELLED)
    return torch.tensor(labels, dtype=kind)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that the model reads."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
