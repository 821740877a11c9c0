"""Tokenizers written in Python (ByT5, Marian, M2M100) label, score and are shown like fast ones."""

import json

import pytest
import sentencepiece
from transformers import ByT5Tokenizer, M2M100Tokenizer, MarianTokenizer

from rlkd.evaluation.evaluator import Evaluator
from rlkd.inspection.build import reward_view
from rlkd.labels.pseudolabels import generate_pseudolabels
from rlkd.labels.store import load_pseudolabels
from rlkd.models.architectures import language_model
from rlkd.models.policy import Policy
from rlkd.models.spec import ModelSpec
from rlkd.models.teacher import Teacher
from rlkd.models.vocabulary import decode_texts, encode_texts, token_pieces, valid_vocab
from rlkd.records import Example
from rlkd.sampling.engines.protocol import Decoding
from tiny import save_pretrained, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
TEXTS = ["the cat sat on the mat", "a dog ran home", "café ñ"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model of a few words, and its pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(TEXTS * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=60, hard_vocab_limit=False,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(str(folder / "sp.model"))
    return folder, [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]


def slow_tokenizer(kind, pieces):
    folder, known = pieces
    if kind == "byt5":
        return ByT5Tokenizer()
    first, last = (["</s>", "<unk>"], ["<pad>"]) if kind == "marian" else (["<s>", "<pad>", "</s>", "<unk>"], [])
    vocabulary = folder / f"{kind}.json"
    vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate([*first, *known, *last])}))
    model = str(folder / "sp.model")
    if kind == "marian":
        return MarianTokenizer(model, model, str(vocabulary))
    return M2M100Tokenizer(str(vocabulary), model, src_lang="en", tgt_lang="fr")


@pytest.mark.parametrize("kind", ["byt5", "marian", "m2m_100"])
def test_texts_and_pieces(kind, pieces):
    tokenizer = slow_tokenizer(kind, pieces)
    assert not tokenizer.is_fast  # a control
    rows = encode_texts(tokenizer, TEXTS, 100)
    assert decode_texts(tokenizer, rows) == TEXTS
    for row in rows:
        shown = token_pieces(tokenizer, row)
        assert len(shown) == len(row)
        assert "".join(shown) == tokenizer.decode(row)
        assert "\ufffd" not in "".join(shown)


@pytest.mark.parametrize("kind", ["byt5", "marian"])
def test_labels_evaluation_and_inspection(kind, pieces, tmp_path):
    tokenizer = slow_tokenizer(kind, pieces)
    model = tiny_t5(vocab=valid_vocab(tokenizer), seed=1)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config.update(**special)
    for name, value in special.items():
        setattr(model.config, name, value)
    save_pretrained(tmp_path / "teacher", model, tokenizer)
    spec = ModelSpec(str(tmp_path / "teacher"), "teacher")
    teacher = Teacher(spec.language_model(), spec.tokenizer)
    examples = [Example(f"r{i}", text, (text,), (text,)) for i, text in enumerate(TEXTS)]
    generate_pseudolabels(
        teacher, examples, out=tmp_path / "labels", template_names=["t"], decoding=Decoding("greedy", 6)
    )
    labels = load_pseudolabels(tmp_path / "labels")["label"]
    assert labels == decode_texts(tokenizer, load_pseudolabels(tmp_path / "labels")["token_ids"])
    policy = Policy(language_model(tiny_t5(vocab=valid_vocab(tokenizer), seed=2), tokenizer))
    rows = Evaluator(teacher, tokenizer, examples, 20, 6).rows(policy, None, [0, 1, 2])
    assert [row["teacher"].strip() for row in rows] == [label.strip() for label in labels]
    view = reward_view(teacher, tokenizer, examples, student=policy, max_new_tokens=6)
    assert all(len(sample.tokens) == len(sample.ids) for sample in view.samples)
