import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlkd.errors import ModelError
from rlkd.models.vocabulary import (
    check_same_vocabulary,
    check_vocabulary_fits,
    encode_texts,
    load_tokenizer,
    token_pieces,
)
from tiny import EOS, VALID, WORDS, save_pretrained, tiny_t5, tiny_tokenizer


def test_equal_vocabularies_give_the_number_of_valid_ids_not_the_padded_one():
    assert check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(), "t", "s") == VALID


def test_different_vocabularies_are_refused_with_sizes_and_the_first_difference():
    swapped = [*WORDS[:5], "zebra", *WORDS[6:]]
    with pytest.raises(
        ModelError, match=f"'t' and student 's' .* {VALID} and {VALID} tokens; .* id 5: 'c' against 'zebra'"
    ):
        check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(swapped), "t", "s")
    message = f"{VALID} and {VALID + 1} tokens; first difference at id {VALID}: None against 'more'"
    with pytest.raises(ModelError, match=message):
        check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer([*WORDS, "more"]), "t", "s")


def test_a_model_smaller_than_its_tokenizer_is_refused():
    config = tiny_t5().config
    check_vocabulary_fits(config, config.vocab_size, "teacher", "t")
    with pytest.raises(ModelError, match="ids up to 99 but the model's vocab_size is 38"):
        check_vocabulary_fits(config, 100, "teacher", "t")


def test_load_tokenizer_finds_what_was_saved_or_names_the_role(tmp_path):
    folder = save_pretrained(tmp_path / "model", tiny_t5())
    assert load_tokenizer(folder, "teacher").get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ModelError, match=r"student '.*nothing' has no tokenizer that loads"):
        load_tokenizer(str(tmp_path / "nothing"), "student")


def test_encode_texts_cuts_and_keeps_the_end():
    tokenizer = tiny_tokenizer()
    a, b, c = (WORDS.index(x) for x in "abc")
    texts = ["a b c", "a", ""]
    assert encode_texts(tokenizer, texts, 10) == [[a, b, c, EOS], [a, EOS], [EOS]]
    assert encode_texts(tokenizer, texts, 3) == [[a, b, EOS], [a, EOS], [EOS]]
    # T0's inputs end without one; an empty prompt still has a token to attend to.
    assert encode_texts(tokenizer, texts, 2, append_eos=False) == [[a, b], [a], [EOS]]


def byte_level() -> Tokenizer:
    """As BART's: pieces of UTF-8 bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["hello there"] * 3, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return made


def byte_fallback() -> Tokenizer:
    """As Llama's: SentencePiece, with single bytes for what it does not know."""
    pieces = [("<unk>", 0.0), ("▁hello", -1.0), ("▁", -2.0), ("there", -2.0)]
    made = Tokenizer(models.Unigram([*pieces, *((f"<0x{i:02X}>", -9.0) for i in range(256))], 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["hello there hello", "hello 👩‍👩‍👧 漢字", "é", ""])
def test_pieces_join_to_the_text_one_per_token(kind, text):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kind())
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_pieces_show_special_tokens_and_survive_broken_bytes():
    assert token_pieces(tiny_tokenizer(), [3, 4, 1]) == ["a", " b", " </s>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    half = tokenizer("👩")["input_ids"][:2]
    pieces = token_pieces(tokenizer, [*half, *tokenizer("hello")["input_ids"]])
    assert "".join(pieces).endswith("hello")
