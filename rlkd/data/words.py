"""Tagged words as token ids, for token classifiers: a word's tag is read at its first token, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..checks import OUTSIDE
from ..choices import ProblemType
from ..errors import DataError
from ..tensors import pad_stack
from .labelled import UNLABELLED, EncodedTexts, model_inputs

logger = logging.getLogger(__name__)

UNREAD = -1  # the position of a word that the model does not read


def by_word(logits: Tensor, words: Tensor) -> Tensor:
    """Logits [N, C] of the words that the model reads, of all rows in order; logits [B, L, C] of tokens, words [B, W],
    the position of each word's first token or UNREAD.
    """
    rows, places = (words != UNREAD).nonzero(as_tuple=True)
    return logits[rows, words[rows, places]]


def with_unread(logits: Tensor, words: Tensor, outside: int) -> Tensor:
    """Logits [B, W, C] of every word: as in `by_word`, and 1 for the tag O of a word that the model does not read."""
    found = logits.new_zeros(*words.shape, logits.shape[-1])
    found[..., outside] = 1.0
    found[words != UNREAD] = by_word(logits, words)
    return found


def label_logits(model: Any, batch: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Logits [B, C] of a collated batch, float32; of words [B, W, C], as in `with_unread`. names: of the labels."""
    logits: Tensor = model(**model_inputs(batch)).logits.float()
    return with_unread(logits, batch["words"], names.index(OUTSIDE)) if "words" in batch else logits


class EncodedWords(EncodedTexts):
    """Rows {words, label (or None)}, tokenised: words, a list of texts; label, the index of a tag for each word.

    starts   of each row, the position of each word's first token; UNREAD where max_length cuts the word off, or it has
             no token
    labels   of each row, a tag for each word, UNLABELLED in a row without a label
    Raises DataError as `EncodedTexts`, for rows without words and for other numbers of tags and words; ModelError if
    the tokenizer has no padding token. It must tell words apart: `models.encoders.words.reading_words`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, num_labels: int):
        for i, row in enumerate(rows):
            words = row.get("words")
            if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
                raise DataError(f"row {i}: words must be a list of at least one text, found {str(words)[:60]}")
            if row.get("logits") is not None:
                raise DataError(f"row {i}: logits of words are not supported. Name the teacher, which may be cached.")
            if row.get("label") is not None and len(row["label"]) != len(words):
                raise DataError(f"row {i}: {len(words)} words and {len(row['label'])} tags. Give each word one tag.")
        self.words = [list(row["words"]) for row in rows]
        pairs = zip(self.words, rows, strict=True)
        texts = [{"text": " ".join(words), "label": row.get("label")} for words, row in pairs]
        super().__init__(texts, tokenizer, max_length, num_labels, "token_classification")
        self.labels = [tags or [UNLABELLED] * len(words) for tags, words in zip(self.labels, self.words, strict=True)]

    def encode(self, tokenizer: Any, **options: Any) -> Any:
        """As in `EncodedTexts`, word by word."""
        encoded = tokenizer(self.words, is_split_into_words=True, **options)
        self.starts = [_starts(encoded.word_ids(i), len(words)) for i, words in enumerate(self.words)]
        return encoded

    def __getitem__(self, index: Any) -> Any:
        return {**super().__getitem__(index), "words": self.starts[index]}

    def digest(self) -> str:
        """As in `EncodedTexts`, and of where words begin."""
        return sha256(f"{super().digest()} {self.starts}".encode()).hexdigest()

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As in `EncodedTexts`, with labels and words [B, W], the position of each word's first token or UNREAD."""
        batch = super().collate(rows)
        batch["words"] = pad_stack([torch.tensor(row["words"]) for row in rows], UNREAD)
        return batch

    @property
    def unread(self) -> list[int]:
        """Of each row, the number of words that the model does not read."""
        return [starts.count(UNREAD) for starts in self.starts]


def encoded_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, num_labels: int, problem_type: ProblemType
) -> EncodedTexts:
    """The rows of a problem, tokenised; arguments and errors as in `EncodedTexts` and `EncodedWords`."""
    if problem_type == "token_classification":
        return EncodedWords(rows, tokenizer, max_length, num_labels)
    return EncodedTexts(rows, tokenizer, max_length, num_labels, problem_type)


def read_the_same_words(one: EncodedWords, other: EncodedWords) -> None:
    """Mark words as UNREAD in both where one does not read them: models with different tokenizers are compared word by
    word. Raises DataError for a row of which no word is left.
    """
    for i, (own, theirs) in enumerate(zip(one.starts, other.starts, strict=True)):
        for k, pair in enumerate(zip(own, theirs, strict=True)):
            if UNREAD in pair:
                own[k] = theirs[k] = UNREAD
        if not any(start != UNREAD for start in own):
            raise DataError(f"row {i}: the tokenizer has a token for none of its words. Fix or remove the row.")


def warn_of_unread(texts: EncodedWords, role: str, max_length: int, what: str) -> None:
    """Say how many words are not read, if there are any, and what becomes of them."""
    if words := sum(texts.unread):
        rows = sum(count > 0 for count in texts.unread)
        logger.warning(
            "%s: %d of %d words, in %d of %d rows, are not read (beyond max_length = %d, or without a token): %s",
            role, words, sum(map(len, texts.words)), rows, len(texts), max_length, what,
        )  # fmt: skip


def _starts(word_ids: Sequence[int | None], words: int) -> list[int]:
    starts = [UNREAD] * words
    for position, word in reversed([*enumerate(word_ids)]):
        if word is not None:
            starts[word] = position
    return starts
