"""Vocabularies trained on texts, and models whose vocabulary is cut to what texts use."""

import json
from itertools import pairwise
from types import MappingProxyType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rlkd.cli.main import main
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.cut_vocabulary import configs_of, cut_model, cut_tokenizer, kept_ids, parameters_of
from rlkd.models.new_vocabulary import train_tokenizer
from rlkd.models.vocabulary import decode_texts, encode_texts, valid_vocab, vocabulary_record
from tiny import KINDS, save_pretrained, tiny_model, tiny_t5, tiny_tokenizer

VERBS, NOUNS = ("packs", "takes", "leaves", "finds"), ("lamp", "rope", "kettle", "lantern", "map", "umbrella")
CORPUS = [f"She {verb} the {noun}, {i} of them." for i, verb in enumerate(VERBS) for noun in NOUNS] * 4
ODD = ["naïve café", "  two  spaces\nand a line\t", "日本語 🎉", "▁ _ <pad> </s>", "ZQX 987", ""]
SPECIALS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(3))]


# Training


def test_a_trained_vocabulary_gives_back_every_text_and_is_of_the_size():
    tokenizer = train_tokenizer(iter(CORPUS), 300)
    assert (len(tokenizer), valid_vocab(tokenizer)) == (300, 300)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    texts = [*CORPUS[:5], *ODD[:3], "▁ _", *ODD[4:]]
    rows = encode_texts(tokenizer, texts, 512)
    assert decode_texts(tokenizer, rows) == texts
    assert all(row[-1] == 1 and 2 not in row for row in rows)
    # It has learned the texts: less than half as many tokens as bytes.
    assert len(rows[0]) < len(texts[0]) / 2
    assert vocabulary_record(tokenizer) == vocabulary_record(train_tokenizer(CORPUS, 300))


@pytest.mark.parametrize(
    ("texts", "size", "error", "message"),
    [
        (CORPUS, 258, ConfigError, r"^size = 258: the 256 bytes and <pad>, </s>, <unk> alone are 259 tokens"),
        (CORPUS, 5000, ConfigError, r"^size = 5000: 96 texts give \d+ tokens at most"),
        (["", ""], 300, DataError, "there is no text to train a vocabulary on"),
    ],
)
def test_sizes_that_the_texts_do_not_give_are_refused(texts, size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(texts, size)


# Cutting


def wrapped(backend):
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def unigram():
    """As T5's: Metaspace, no bytes, sentinels at the end."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = SPECIALS[:3]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([*CORPUS, "wholly other words: giraffe zebra quokka"] * 3, trainer)
    backend.add_special_tokens(SPECIALS[3:])
    return wrapped(backend)


def bpe(**options):
    backend = Tokenizer(models.BPE(unk_token="<unk>", **options))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    extra = [f"<0x{i:02X}>" for i in range(256)] if options else []
    trainer = trainers.BpeTrainer(vocab_size=220 + len(extra), special_tokens=[*SPECIALS, *extra], show_progress=False)
    backend.train_from_iterator([*CORPUS, "wholly other words: giraffe zebra quokka"] * 3, trainer)
    return wrapped(backend)


def byte_level():
    return train_tokenizer([*CORPUS, "wholly other words: giraffe zebra quokka"] * 3, 340)


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator([*CORPUS, "wholly other words: giraffe zebra quokka"] * 3, trainer)
    return wrapped(backend)


TOKENIZERS = {
    "Unigram": unigram, "BPE": bpe, "BPE, byte fallback": lambda: bpe(byte_fallback=True), "bytes": byte_level,
    "WordPiece": word_piece, "words": tiny_tokenizer,
}  # fmt: skip
TEXTS = [*CORPUS[:7], "She finds a café."]


def texts_of(kind):
    return ["a b : is copy", "c 1 2"] if kind == "words" else TEXTS


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_cut_tokenizer_splits_the_texts_as_before_and_can_spell_others(kind, tmp_path):
    tokenizer, texts = TOKENIZERS[kind](), texts_of(kind)
    keep = kept_ids(tokenizer, lambda: texts, [])
    cut = cut_tokenizer(tokenizer, keep, lambda: texts)
    assert len(keep) == len(cut) == valid_vocab(cut) < len(tokenizer)
    cut.save_pretrained(tmp_path)
    cut = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        old, new = tokenizer(text)["input_ids"], cut(text)["input_ids"]
        assert [keep[i] for i in new] == old
        assert cut.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
        assert decode_texts(cut, [new]) == decode_texts(tokenizer, [old])
    assert [cut.convert_tokens_to_ids(token) for token in SPECIALS[:3]] == [0, 1, 2]
    assert "<extra_id_0>" not in cut.get_vocab()
    if kind != "words":
        # New words of letters that the texts have.
        assert (
            cut.unk_token_id not in cut("Then he packs phantoms"[5:] if kind == "bytes" else "She theft")["input_ids"]
        )


def test_the_merges_on_the_way_to_a_piece_are_kept():
    """The text has the whole word only."""
    tokenizer = TOKENIZERS["BPE"]()
    word = next(word for word in (*NOUNS, *VERBS) if len(word) > 3 and len(tokenizer(word)["input_ids"]) == 2)
    texts = [word]
    keep = kept_ids(tokenizer, lambda: texts, [])
    merges = json.loads(cut_tokenizer(tokenizer, keep, lambda: texts).backend_tokenizer.to_str())["model"]["merges"]
    assert "".join(merges[-1]) == f"▁{word}"
    known = {"▁", *word}
    for left, right in merges:
        assert {left, right} <= known
        known.add(left + right)


def test_an_unknown_character_costs_what_it_did():
    """Unigram: the penalty follows the lowest score of the vocabulary, and decides how a text beside it is split."""
    tokenizer = TOKENIZERS["Unigram"]()
    texts = ["She packs ☃ the ☃☃lamp"]
    keep = kept_ids(tokenizer, lambda: texts, [])
    scores = [score for _, score in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]]
    assert min(range(len(scores)), key=scores.__getitem__) in keep
    assert tokenizer.unk_token_id in tokenizer(texts[0])["input_ids"]
    cut_tokenizer(tokenizer, keep, lambda: texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_has_the_logits_of_the_kept_tokens(kind):
    """Before the normaliser: log-probabilities grow by the log of the mass that the kept tokens had."""
    tokenizer, model, texts = tiny_tokenizer(), tiny_model(kind), texts_of("words")
    model.generation_config.suppress_tokens = [7, 20, 30]
    keep = kept_ids(tokenizer, lambda: texts, configs_of(model))
    small, cut = cut_tokenizer(tokenizer, keep, lambda: texts), cut_model(model, keep)
    for one in (cut, cut.get_encoder()):
        assert one.get_input_embeddings().num_embeddings == len(keep) == cut.config.vocab_size
    tied = cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    old, new = ([t(text)["input_ids"] for text in texts] for t in (tokenizer, small))
    for before, after in pairwise_of(old, new):
        wide, narrow = logits(model, *before), logits(cut, *after)
        torch.testing.assert_close(narrow, wide[..., keep], rtol=0, atol=1e-5)
        mass = wide.softmax(-1)[..., keep].sum(-1, keepdim=True).log()
        torch.testing.assert_close(narrow.log_softmax(-1), wide.log_softmax(-1)[..., keep] - mass, rtol=0, atol=1e-4)
    assert [keep[i] for i in cut.generation_config.suppress_tokens] == [i for i in (7, 20, 30) if i in keep]
    for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
        assert keep[getattr(cut.config, name)] == getattr(model.config, name)
    assert parameters_of(cut)[1] == parameters_of(model)[1] * len(keep) / model.config.vocab_size


def pairwise_of(old, new):
    """((prompt, answer) before, (prompt, answer) after) of neighbouring texts."""
    return zip(pairwise([*old, old[0]]), pairwise([*new, new[0]]), strict=True)


def logits(model, prompt, answer):
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        decoder = torch.tensor([[start, *answer[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]


def test_forbidden_words_and_several_ends_follow():
    model, tokenizer = tiny_t5(), tiny_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 5], pad_token_id=0, decoder_start_token_id=0, bad_words_ids=[[3, 4], [3, 30]]
    )
    keep = kept_ids(tokenizer, lambda: ["a b"], configs_of(model))
    cut = cut_model(model, keep).generation_config
    assert [keep[i] for i in cut.eos_token_id] == [1, 5]
    assert [[keep[i] for i in row] for row in cut.bad_words_ids] == [[3, 4]]


class _Slow:
    is_fast = False


class _Translates(PreTrainedTokenizerFast):
    tgt_lang = "xx"
    lang_code_to_id = MappingProxyType({"xx": 3})


def test_tokenizers_that_cannot_be_cut_are_refused():
    with pytest.raises(ModelError, match="a _Slow is written in Python"):
        kept_ids(_Slow(), lambda: ["a"], [])
    translates = _Translates(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.raises(ModelError, match="a model that translates is not cut"):
        kept_ids(translates, lambda: ["a"], [])
    tokenizer = TOKENIZERS["Unigram"]()
    keep = sorted({*kept_ids(tokenizer, lambda: TEXTS, [])} - {tokenizer.convert_tokens_to_ids("▁the")})
    with pytest.raises(ModelError, match="this Unigram tokenizer cannot be cut: 'She packs the"):
        cut_tokenizer(tokenizer, keep, lambda: ["She packs the"])


# Commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text, "answers": [text[:9], text[9:]], "n": i} for i, text in enumerate(CORPUS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in CORPUS))
    return tmp_path


def rlkd(*words):
    with pytest.raises(SystemExit) as end:
        main([*words])
    return end.value.code


def test_the_command_trains_on_files_of_any_kind(here, capsys):
    what = ["train-vocabulary", "--dataset", "rows.jsonl", "--column", "text", "--size", "300", "--out"]
    assert rlkd(*what, "a") == 0
    assert "300 tokens; 96 texts have" in capsys.readouterr().out
    assert rlkd(*what[:1], "--dataset", "rows.csv", *what[3:], "b") == 0
    assert rlkd(*what[:3], "--column", "answers", *what[3:], "c") == 0
    records = [vocabulary_record(AutoTokenizer.from_pretrained(name)) for name in "abc"]
    assert records[0] == records[1] != records[2]
    for more, said in (
        (("--column", "n", "d"), "column 'n' contains 0, not text"),
        (("--column", "txt", "d"), "'txt'. Did you mean 'text'?"),
        (("a",), "a exists and is not an empty folder"),
    ):
        command = [*what[:-1], *more[:-1], "--out", more[-1]]
        assert rlkd(*command) in (2, 3)
        assert said in capsys.readouterr().err
    assert not (here / "d").exists()


def test_the_command_cuts_a_model_that_then_answers_as_before(here, capsys):
    tokenizer = byte_level()
    model = tiny_t5(tied=False, vocab=len(tokenizer) + 4)
    save_pretrained(here / "model", model, tokenizer)
    (here / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    what = ["cut-vocabulary", "--model", "model", "--column", "text", "--dataset"]
    assert rlkd(*what, "few.jsonl", "--out", "small") == 0
    assert "embedding and head were" in capsys.readouterr().out
    cut, small = AutoModelForSeq2SeqLM.from_pretrained("small"), AutoTokenizer.from_pretrained("small")
    assert cut.config.vocab_size == len(small) < len(tokenizer)
    prompt, answer = (small(text)["input_ids"] for text in TEXTS[:2])
    before = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in small.convert_ids_to_tokens(range(len(small)))]
    torch.testing.assert_close(logits(cut, prompt, answer), logits(model, *before)[..., ids], rtol=0, atol=1e-4)
    assert rlkd(*what, "few.jsonl", "--out", "small") == 2
    assert "small exists and is not an empty folder" in capsys.readouterr().err
    small.save_pretrained(here / "model")
    cut.save_pretrained(here / "model")
    assert rlkd(*what, "few.jsonl", "--out", "none") == 2
    assert "there is nothing to cut" in capsys.readouterr().err
