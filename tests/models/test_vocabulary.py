import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlkd.errors import ModelError
from rlkd.models.architectures import language_model
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import (
    check_same_vocabulary,
    check_vocabulary_fits,
    encode_texts,
    load_tokenizer,
    token_pieces,
    valid_vocab,
)
from rlkd.records import Example
from rlkd.sampling.engines.protocol import Decoding
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.trainers.arguments import ReinforceArguments
from rlkd.trainers.reinforce import ReinforceTrainer
from tiny import EOS, VALID, WORDS, save_pretrained, tiny_t5, tiny_tokenizer


def test_equal_vocabularies_give_the_number_of_valid_ids_not_the_padded_one():
    assert check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(), "t", "s") == VALID


def with_holes() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, three ids higher from the tenth word on."""
    backend = Tokenizer(models.WordLevel({w: i + 3 * (i > 9) for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def test_an_id_beyond_the_number_of_tokens_counts_everywhere(tmp_path):
    """With holes, ids reach beyond len(tokenizer): head, rollouts, labels and scores agree on what V is."""
    tokenizer, model = with_holes(), tiny_t5(tied=False, vocab=VALID + 8)
    size, last = VALID + 3, VALID + 2
    assert len(tokenizer) == VALID
    assert valid_vocab(tokenizer) == check_same_vocabulary(tokenizer, with_holes(), "t", "s") == size
    with torch.no_grad():
        model.lm_head.weight[last] *= 2.0  # often chosen, and often the best
        model.lm_head.weight[size:] *= 50.0  # never: not a token
    lm = language_model(model, tokenizer)
    assert lm.valid_vocab == lm.head().logits(torch.zeros(1, lm.width)).shape[-1] == size

    examples = [Example(str(i), "a b c"[: 2 * i + 1], ("a b c"[: 2 * i + 1],)) for i in range(3)]
    args = ReinforceArguments(
        str(tmp_path), use_cpu=True, disable_tqdm=True, max_new_tokens=6, rollouts_per_prompt=8,
        per_device_train_batch_size=24, weak_start="ignore",
    )  # fmt: skip
    teacher = Teacher(lm, tokenizer)
    trainer = ReinforceTrainer(model, args, teacher=teacher, tokenizer=tokenizer, train_examples=examples)
    rollouts = trainer.sample(0)
    assert (rollouts.answer_ids == last).any()
    assert (rollouts.answer_ids < size).all()

    mask = rollouts.answer_mask
    scores = teacher.score([e.teacher_inputs for e in rollouts.examples], rollouts.answer_ids, mask)
    logps = ((scores.chosen - scores.logsumexp) * mask).sum(1)
    torch.testing.assert_close(logps, rollouts.behaviour_logps.sum(1), atol=1e-4, rtol=1e-5)
    engine = TorchEngine(lm)
    prompts = encode_texts(tokenizer, [e.student_input for e in rollouts.examples], 10)
    answers = [ids[m].tolist() for ids, m in zip(rollouts.answer_ids, mask, strict=True)]
    for prompt, answer, row, total in zip(prompts, answers, engine.score(prompts, answers), logps, strict=True):
        decoder_input = torch.tensor([[lm.model.config.decoder_start_token_id, *answer[:-1]]])
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits
        want = logits[0, :, :size].log_softmax(-1)[range(len(answer)), answer]
        assert row == pytest.approx(want.tolist(), abs=1e-5)
        assert float(total) == pytest.approx(float(want.sum()), abs=1e-4)

    (labels,) = engine.answer(prompts[:1], [[*range(20)]], Decoding("sample", 6, labels_per_input=20))
    assert last in {token for label in labels for token in label.ids} <= set(range(size))


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
    with pytest.raises(ModelError, match=r"student '.*nothing' is neither a local folder"):
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
