import pytest

from rlkd.errors import ModelError
from rlkd.models.vocabulary import check_same_vocabulary, check_vocabulary_fits, encode_texts, load_tokenizer
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
