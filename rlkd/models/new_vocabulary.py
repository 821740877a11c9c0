"""A small vocabulary of one's own, for teachers and students that are trained from scratch: byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, DataError

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5
SMALLEST = 256 + len(SPECIAL)


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A fast tokenizer with `size` tokens: pad, end and unknown, the 256 bytes, and the pieces that byte-pair encoding
    (Sennrich et al. 2016, arXiv 1508.07909) finds in the texts. Decoding gives back every text, characters that were
    never seen included; texts end with the end token.

    Raises ConfigError for a size below the bytes' or above what the texts give, DataError without texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if size < SMALLEST:
        raise ConfigError(f"size = {size}: the 256 bytes and {', '.join(SPECIAL)} alone are {SMALLEST} tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    counted = _Counted(texts)
    backend.train_from_iterator(counted, trainer)
    if not counted.texts:
        raise DataError("there is no text to train a vocabulary on: the columns are empty")
    found = backend.get_vocab_size()
    if found < size:
        raise ConfigError(f"size = {size}: {counted.texts} texts give {found} tokens at most. Lower it, or add texts")
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, SPECIAL.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


class _Counted:
    """Texts, and how many have been read that are not empty."""

    def __init__(self, texts: Iterable[str]):
        self.source, self.texts = texts, 0

    def __iter__(self) -> Any:
        for text in self.source:
            self.texts += bool(text)
            yield text
