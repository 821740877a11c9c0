"""Pooled layers are those of a plain forward of each text alone; what cannot be probed is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from rlkd.data.labelled import EncodedTexts
from rlkd.errors import ConfigError, ModelError
from rlkd.evaluation.probing import Split, linear_probe, majority_baseline
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.classifiers import check_length
from rlkd.models.encoders.representations import load_encoder, load_encoder_config, pooled_layers
from tiny import CLASSIFIER_WORDS, classifier_tokenizer, save_pretrained, tiny_classifier, tiny_t5

LETTERS = CLASSIFIER_WORDS[4:]
TEXTS = ["a b c d e f", "g", "h i j", "", "k l", "m n o p q r s t"]


def encoded(texts=TEXTS, pairs=None, max_length=30):
    rows = [{"text": text, "text_pair": pairs[i] if pairs else None, "label": 0} for i, text in enumerate(texts)]
    return EncodedTexts(rows, classifier_tokenizer(), max_length, 2)


def bilstm():
    torch.manual_seed(0)
    shape = {"vocab_size": len(CLASSIFIER_WORDS), "embedding_size": 8, "hidden_size": 6, "classifier_size": 5}
    return BiLSTMForSequenceClassification(BiLSTMConfig(**shape, num_hidden_layers=2)).eval()


def make(kind):
    return bilstm() if kind == "bilstm" else tiny_classifier(kind, layers=2)


@pytest.mark.parametrize("pairs", [None, ["x y", "z", "u v w", "a", "b", "c"]])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bilstm"])
def test_features_are_those_of_each_text_alone(kind, pairs):
    model, tokenizer = make(kind), classifier_tokenizer()
    wanted = [(layer, pool) for layer in (2, 0, 1) for pool in ("cls", "mean")]
    found = {size: pooled_layers(model, encoded(pairs=pairs).batches(size), wanted) for size in (1, 4)}
    for i, text in enumerate(TEXTS):
        inputs = tokenizer(text, *([pairs[i]] if pairs else []), return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == 3
        for size in found:
            for layer, pool in wanted:
                alone = states[layer][0, 0] if pool == "cls" else states[layer][0].mean(0)
                np.testing.assert_allclose(found[size][layer, pool][i], alone.numpy(), atol=1e-5)


def features(model, texts):
    return pooled_layers(model, encoded(texts).batches(32), [(0, "mean"), (0, "cls"), (1, "cls")])


def test_layers_know_the_first_token_where_they_can_and_not_a_shuffled_label():
    """Layer 0 of [CLS] is one constant vector; the mean of the embeddings and layer 1 see the other tokens."""
    random = np.random.default_rng(0)
    model = tiny_classifier(layers=1, width=32)
    parts = []
    for n in (300, 100, 200):
        first = random.integers(0, len(LETTERS), n)
        made = features(model, [f"{LETTERS[i]} x y"[: random.choice([1, 3])] for i in first])
        parts.append((made, (first < 10).astype(int), random.integers(0, 2, n)))
    train, _, test = parts
    baseline = majority_baseline(train[1], test[1])
    scores = {c: linear_probe(*(Split(made[c], label) for made, label, _ in parts)) for c in train[0]}
    assert scores[0, "cls"].accuracy == baseline.accuracy
    assert scores[0, "mean"].low > baseline.high
    assert scores[1, "cls"].low > baseline.high
    shuffled = majority_baseline(train[2], test[2])
    for choice in train[0]:
        assert linear_probe(*(Split(made[choice], noise) for made, _, noise in parts)).low <= shuffled.high


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bilstm"])
def test_classifiers_and_bare_encoders_load_without_training(tmp_path, kind):
    model = make(kind)
    folders = [save_pretrained(tmp_path / "whole", model, classifier_tokenizer())]
    if kind != "bilstm":
        bare = AutoModel.from_pretrained(folders[0])
        folders.append(save_pretrained(tmp_path / "bare", bare, classifier_tokenizer()))
    wanted = [(0, "mean"), (2, "cls")]
    expected = pooled_layers(model, encoded().batches(4), wanted)
    for folder in folders:
        loaded = load_encoder(folder, load_encoder_config(folder))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        found = pooled_layers(loaded, encoded().batches(4), wanted)
        for choice in wanted:
            np.testing.assert_allclose(found[choice], expected[choice], atol=1e-6)


def test_models_that_cannot_be_probed(tmp_path):
    with pytest.raises(ModelError, match="not an encoder-only model with layers"):
        load_encoder_config(save_pretrained(tmp_path / "t5", tiny_t5()))
    with pytest.raises(ModelError, match=r"'.*nothing' is neither a local folder"):
        load_encoder_config(str(tmp_path / "nothing"))
    folder = save_pretrained(tmp_path / "short", tiny_classifier(layers=2), classifier_tokenizer())
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks \d+ weights .*layer\.2"):
        load_encoder(folder, load_encoder_config(folder))
    model = tiny_classifier(layers=2)
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="returns 3 hidden states, expected are the embeddings and 5 layers"):
        pooled_layers(model, encoded().batches(4), [(0, "cls")])


@pytest.mark.parametrize(("kind", "positions"), [("bert", 40), ("roberta", 39), ("distilbert", 40), ("bilstm", None)])
def test_positions_are_those_the_model_takes(kind, positions):
    model = make(kind)
    check_length(positions or 10_000, model.config, "model")
    length = positions or 60
    model(input_ids=torch.full((1, length), 5))
    if positions:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, length + 1), 5))
        with pytest.raises(
            ConfigError, match=rf"max_length = {positions + 1}: the model \('{kind}'\) has {positions} positions"
        ):
            check_length(positions + 1, model.config, "model")
