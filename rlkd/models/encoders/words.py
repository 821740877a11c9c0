"""Tokenizers that read words, so that every token knows its word."""

from __future__ import annotations

from typing import Any, cast

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.pre_tokenizers import Sequence as Steps

from ...errors import ModelError


def reading_words(tokenizer: Any, role: str, name: str) -> Any:
    """The tokenizer, made ready for lists of words: one of a byte-level family (RoBERTa) from now on puts a space
    before each word, as there is in running text, also when it is saved and loaded again.

    Raises ModelError if it does not tell which word a token is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{role} '{name}': its tokenizer does not tell which word a token is of (no word_ids). Token "
            "classification needs a model with a fast tokenizer (tokenizer.json)."
        )
    step = tokenizer.backend_tokenizer.pre_tokenizer
    for one in cast(Any, step) if isinstance(step, Steps) else [step]:
        if isinstance(one, ByteLevel) and not one.add_prefix_space:
            one.add_prefix_space = True
            tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
    return tokenizer
