"""Tokenizers of the usual families read words as they read running text, also when saved and loaded again."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from rlkd.data.words import EncodedWords
from rlkd.errors import ModelError
from rlkd.models.encoders.words import reading_words

WORDS = ["Anna", "ran", "home", "Anna's"]
G = "Ġ"  # a space, in byte-level vocabularies


def byte_level():
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "A", "n", "a", "r", "h", "o", "m", "e", "'", "s", G]
    return {piece: i for i, piece in enumerate(pieces)}


def roberta():
    merges = [("A", "n"), (G, "r"), (G, "A")]
    vocabulary = byte_level()
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    return RobertaTokenizer(vocab=vocabulary, merges=merges)


def modern():
    """A byte-level step within others, as in ModernBERT's and DeBERTa's kind of file."""
    backend = Tokenizer(models.BPE(vocab=byte_level(), merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", cls_token="<s>", sep_token="</s>")


def bert(lower=False):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Anna", "ran", "ho", "##me", "'", "s", "an", "##na"]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=lower)


def metaspace():
    """SentencePiece's kind: XLM-R, ALBERT, DeBERTa-v3."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁An", "na", "▁ran", "ho", "me", "'", "s"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", cls_token="<s>", sep_token="</s>")


@pytest.mark.parametrize("make", [roberta, modern, bert, lambda: bert(lower=True), metaspace])
def test_words_are_read_as_running_text(tmp_path, make):
    tokenizer = reading_words(make(), "teacher", "x")
    texts = EncodedWords([{"words": WORDS, "label": [0, 1, 0, 1]}], tokenizer, 64, 2)
    ids = texts.ids["input_ids"][0]
    running = make()(" " + " ".join(WORDS) if make in (roberta, modern) else " ".join(WORDS))["input_ids"]
    assert ids == running
    # The words between two beginnings are those of the word alone.
    ends = [*texts.starts[0][1:], len(ids) - 1]
    for word, begin, end in zip(WORDS, texts.starts[0], ends, strict=True):
        alone = make()((" " if make in (roberta, modern) else "") + word)["input_ids"][1:-1]
        assert ids[begin:end] == alone
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert EncodedWords([{"words": WORDS}], again, 64, 2).ids["input_ids"][0] == ids
    assert EncodedWords([{"words": WORDS}], reading_words(again, "teacher", "x"), 64, 2).starts == texts.starts


def test_a_tokenizer_without_word_ids_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="teacher 'x': its tokenizer does not tell which word a token is of"):
        reading_words(Slow(), "teacher", "x")
