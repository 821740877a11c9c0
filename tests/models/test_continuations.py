"""Where a prompt ends and its answer begins, for models whose answers continue their prompts."""

import json

import pytest
import torch
from models.decoder_families import continuing_tokenizer, tiny_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlkd.errors import ConfigError, ModelError
from rlkd.models.architectures import language_model
from rlkd.models.generation import AnswerRules
from rlkd.models.spec import ModelSpec, TeacherSpec, check_pair
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import decode_texts, encode_answers, encode_texts, end_of_prompts
from rlkd.sampling.decode import decode, greedy
from tiny import WORDS, save_pretrained, tiny_t5, tiny_tokenizer

CONTINUES = AnswerRules(start_id=None, eos_ids=(1,), pad_id=1)
HAS_WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "copy", ":"]


def byte_level(**special):
    """As GPT-2's: a space belongs to the word after it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    made.train_from_iterator([" yes no yes no"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", **special)


def sentence_piece():
    """As Llama's: every text begins with a space, and with `<s>`."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁yes", -1.0), ("▁", -3.0), ("▁a", -1.0), ("yes", -2.0)]
    made = Tokenizer(models.Unigram(pieces, 2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_prompts_begin_as_the_tokenizer_says_and_do_not_end():
    assert encode_texts(continuing_tokenizer(HAS_WORDS), ["a b", ""], 9, append_eos=False) == [[0, 3, 4], [0]]
    # A tokenizer that ends texts, as T5's does: cut to the same number of tokens.
    a, b, c = (WORDS.index(word) for word in "abc")
    assert encode_texts(tiny_tokenizer(), ["a b c", "a b", "a"], 2, append_eos=False) == [[a, b], [a, b], [a]]
    assert encode_texts(continuing_tokenizer(HAS_WORDS), ["a b c"], 3, append_eos=False) == [[0, 3, 4]]
    assert c


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_answers_follow_after_a_space_and_end(make):
    tokenizer = make()
    end = tokenizer.eos_token_id
    rules = AnswerRules(start_id=None, eos_ids=(end,))
    joined = tokenizer("a yes", add_special_tokens=False)["input_ids"][1:]
    bare, spaced = encode_answers(tokenizer, ["yes", " yes"], 9, rules)
    assert bare == spaced == [*joined, end]
    assert tokenizer.bos_token_id not in bare
    assert encode_answers(tokenizer, [""], 9, rules) == [[end]]
    assert [text.strip() for text in decode_texts(tokenizer, [bare])] == ["yes"]
    long = encode_answers(tokenizer, ["yes yes yes yes"], 3, rules)[0]
    assert (len(long), long[-1]) == (3, end)


def test_an_answer_ends_with_a_token_that_ends_answers():
    """A tokenizer's own end need not be one: a chat model may end its turns otherwise."""
    tokenizer = continuing_tokenizer(HAS_WORDS)
    other = AnswerRules(start_id=None, eos_ids=(7, 5))
    assert encode_answers(tokenizer, ["a"], 9, other) == [[3, 7]]
    assert encode_answers(tokenizer, ["a"], 9, CONTINUES) == [[3, 1]]


def test_an_end_in_mid_text_is_refused():
    assert end_of_prompts(None, AnswerRules()) is True
    assert end_of_prompts(False, AnswerRules()) is False
    assert end_of_prompts(None, CONTINUES) is False
    with pytest.raises(ConfigError, match=r"append_eos = True: the answers of a decoder-only teacher .* Leave it out"):
        end_of_prompts(True, CONTINUES)
    tokenizer = continuing_tokenizer(HAS_WORDS)
    lm = language_model(tiny_decoder(words=len(HAS_WORDS)), tokenizer)
    assert Teacher(lm, tokenizer).append_eos is False
    with pytest.raises(ConfigError, match="append_eos = True"):
        Teacher(lm, tokenizer, append_eos=True)


def test_it_is_refused_before_weights_load(tmp_path):
    tokenizer = continuing_tokenizer(HAS_WORDS)
    spec = ModelSpec(save_pretrained(tmp_path, tiny_decoder(words=len(HAS_WORDS)), tokenizer), "teacher")
    assert TeacherSpec(spec).append_eos is False
    with pytest.raises(ConfigError, match="append_eos = True"):
        _ = TeacherSpec(spec, input_eos=True).append_eos
    assert TeacherSpec(ModelSpec(save_pretrained(tmp_path / "t5", tiny_t5()), "teacher")).append_eos is True


def test_a_start_is_no_part_of_an_answer_and_an_end_is():
    """T5Gemma's answers begin after `<bos>`, which its tokenizer writes; it writes no end."""
    tokenizer = continuing_tokenizer(HAS_WORDS)
    rules = AnswerRules(start_id=0, eos_ids=(1,))
    assert encode_answers(tokenizer, ["a b", ""], 9, rules) == [[3, 4, 1], [1]]
    assert encode_answers(tokenizer, ["a b c"], 2, rules) == [[3, 1]]
    # T5's are as they were.
    a, b = (WORDS.index(word) for word in "ab")
    assert encode_answers(tiny_tokenizer(), ["a b"], 2, AnswerRules(start_id=0, eos_ids=(1,))) == [[a, 1]]
    assert encode_answers(tiny_tokenizer(), ["a b"], 9, AnswerRules(start_id=0, eos_ids=(1,))) == [[a, b, 1]]


def test_special_tokens_that_a_text_model_lacks(tmp_path):
    """As in Gemma 3, whose tokenizer ends with one for images: no action, no row of a label, no index error."""
    tokenizer = continuing_tokenizer(HAS_WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = tiny_decoder(words=len(HAS_WORDS) - 4)  # no rows to spare
    lm = language_model(model, tokenizer)
    assert lm.valid_vocab == model.config.vocab_size == len(HAS_WORDS) < len(tokenizer)
    assert decode(lm, lm.prompt_states([[0, 3]]), greedy, max_new_tokens=3).ids.max() < len(HAS_WORDS)
    with pytest.raises(ModelError, match=r"1 of 2 prompts hold a special token .* first id 8: remove its text"):
        Teacher(lm, tokenizer).lm.prompt_states([[0, 3], [0, len(HAS_WORDS)]])
    teacher, student = (
        ModelSpec(save_pretrained(tmp_path / role, made, tokenizer), role)
        for role, made in (("teacher", model), ("student", tiny_decoder(words=len(HAS_WORDS))))
    )
    assert teacher.valid_vocab == len(HAS_WORDS)
    assert check_pair(teacher, teacher) == len(HAS_WORDS)
    with pytest.raises(ModelError, match=r"has embeddings for 8 of the tokens that they share, and student '.*' for 9"):
        check_pair(teacher, student)
    tokenizer.add_tokens(["word"])
    with pytest.raises(ModelError, match="the tokenizer has ids up to 9 but the model's vocab_size is 8"):
        language_model(model, tokenizer)


# -- the context window ------------------------------------------------------------------------------------------------


def test_prompt_and_answer_share_the_window(tmp_path):
    tokenizer = continuing_tokenizer(HAS_WORDS)
    model = tiny_decoder("gpt2", words=len(HAS_WORDS), eos_token_id=1)
    spec = ModelSpec(save_pretrained(tmp_path, model, tokenizer), "teacher")
    spec.check_lengths(56, 8)
    with pytest.raises(ConfigError, match=r"max_input_tokens = 57 and max_new_tokens = 8: prompt and answer share"):
        spec.check_lengths(57, 8)
    with pytest.raises(ConfigError, match=r"the context window of teacher '.*' \('gpt2'\), 64 tokens"):
        spec.check_lengths(64)
    assert TeacherSpec(spec, max_input_tokens=60).longest_answer == 4
    assert json.loads((tmp_path / "config.json").read_text())["n_positions"] == 64


def test_what_does_not_fit_is_said_and_no_index_error():
    lm = language_model(tiny_decoder("gpt2", words=len(HAS_WORDS), eos_token_id=1), continuing_tokenizer(HAS_WORDS))
    prompt = [3] * 60
    message = r"a prompt of \d+ and an answer of \d+ tokens do not fit into the model's context window of 64: lower"
    states = lm.prompt_states([prompt])
    for what in (
        lambda: lm.prompt_states([[3] * 65]),
        lambda: lm.answer_hidden(states, torch.full((1, 5), 3), torch.ones(1, 5, dtype=torch.bool)),
        lambda: lm.beam_search([prompt], num_beams=2, num_answers=1, max_new_tokens=5),
    ):
        with pytest.raises(ModelError, match=message):
            what()
    lm.model.generation_config.suppress_tokens = [1]  # no end
    with pytest.raises(ModelError, match=message):
        decode(lm, states, greedy, max_new_tokens=5)
    assert decode(lm, states, greedy, max_new_tokens=4).ids.shape == (1, 4)
    assert len(lm.beam_search([prompt], num_beams=2, num_answers=1, max_new_tokens=4)[0]) == 4
