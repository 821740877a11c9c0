"""Engines: top-k log-probabilities, the choice of an engine, agreement."""

import importlib.util
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.heads import Head
from rlkd.models.spec import LoadedModel, ModelSpec
from rlkd.sampling.agreement import agreement
from rlkd.sampling.engines import torch_engine as engines
from rlkd.sampling.engines.protocol import Answer, Decoding, EngineSettings
from rlkd.sampling.engines.registry import EngineChoice, choose_engine
from rlkd.sampling.engines.torch_engine import TorchEngine
from tiny import EOS, KINDS, VALID, tiny_model

PROMPTS = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] + [EOS] for i in range(6)]
STRATEGIES = [
    {"strategy": "greedy"},
    {"strategy": "sample", "labels_per_input": 2, "temperature": 0.7},
    {"strategy": "beam", "num_beams": 3, "labels_per_input": 2},
]


def model_of(kind, **options):
    return EncoderDecoder(tiny_model(kind, **options), VALID)


def table_of(lm, prompt, ids):
    decoder_input = torch.tensor([[lm.start_id, *ids[:-1]]])
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits
    return logits[0, :, :VALID].log_softmax(-1)


# -- top-k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", STRATEGIES, ids=["greedy", "sample", "beam"])
def test_top_k_is_that_of_a_plain_forward(kind, settings):
    lm = model_of(kind)
    n = settings.get("labels_per_input", 1)
    seeds = [[10 * i + j for j in range(n)] for i in range(len(PROMPTS))]
    answers = TorchEngine(lm).answer(PROMPTS, seeds, Decoding(max_new_tokens=6, top_k_logprobs=5, **settings))
    for prompt, row in zip(PROMPTS, answers, strict=True):
        assert len(row) == n
        for answer in row:
            best = table_of(lm, prompt, answer.ids).topk(5)
            assert (answer.top_k.ids.dtype, answer.top_k.logps.dtype) == (np.int32, np.float32)
            assert answer.top_k.ids.tolist() == best.indices.tolist()
            np.testing.assert_allclose(answer.top_k.logps, best.values.numpy(), atol=1e-5)


def test_without_top_k_there_is_none_and_answers_are_the_same():
    engine = TorchEngine(model_of("t5-untied"))
    with_k, without = (engine.answer(PROMPTS, [[0]] * 6, Decoding("greedy", 6, top_k_logprobs=k)) for k in (3, 0))
    assert all(row[0].top_k is None for row in without)
    assert [row[0].ids for row in with_k] == [row[0].ids for row in without]


def test_top_k_holds_the_logits_of_few_tokens_at_a_time(monkeypatch):
    engine, held, logits = TorchEngine(model_of("t5-untied")), [], Head.logits

    def counting(self, hidden):
        held.append(len(hidden))
        return logits(self, hidden)

    wanted = engine.answer(PROMPTS, [[0]] * 6, Decoding("greedy", 8, top_k_logprobs=3))
    monkeypatch.setattr(Head, "logits", counting)
    monkeypatch.setattr(engines, "CHUNK_ELEMENTS", 1)
    answers = engine.answer(PROMPTS, [[0]] * 6, Decoding("greedy", 8, top_k_logprobs=3))
    assert sum(len(row[0].ids) for row in answers) > 16
    assert max(held) <= 16
    for one, other in zip(wanted, answers, strict=True):
        np.testing.assert_allclose(one[0].top_k.logps, other[0].top_k.logps, atol=1e-6)


def test_k_beyond_the_vocabulary_is_the_whole_distribution():
    (row,) = TorchEngine(model_of("t5")).answer(PROMPTS[:1], [[0]], Decoding("greedy", 3, top_k_logprobs=10_000))
    assert row[0].top_k.ids.shape == (len(row[0].ids), VALID)
    np.testing.assert_allclose(np.exp(row[0].top_k.logps).sum(1), 1, atol=1e-5)


def test_negative_k_is_refused():
    with pytest.raises(ConfigError, match="top_k_logprobs = -1"):
        Decoding("greedy", 4, top_k_logprobs=-1)


# -- the choice ------------------------------------------------------------------------------------------------------


def choose(name, model=None, decoding=None, **settings):
    model = model or LoadedModel(model_of("t5"))
    return choose_engine(EngineSettings(name, **settings), model, decoding)


@pytest.mark.parametrize(
    ("decoding", "reason"),
    [
        (Decoding("sample", 4), "samples are not reproducible"),
        (Decoding("greedy", 4, top_k_logprobs=2), "top_k_logprobs"),
        (Decoding("beam", 4), "some answers differ"),
        (None, "encode its prompt again"),
    ],
)
def test_auto_takes_torch_where_it_must_and_logs_why(decoding, reason, caplog):
    pytest.importorskip("ctranslate2")
    with caplog.at_level(logging.INFO):
        engine = choose("auto", decoding=decoding).make()
    assert engine.name == "torch"
    assert reason in caplog.text
    assert len(caplog.records) == 1


def test_auto_takes_torch_without_the_package(monkeypatch, caplog):
    monkeypatch.setattr("rlkd.models.conversion.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert choose("auto", decoding=Decoding("greedy", 4)).make().name == "torch"
    assert "pip install 'rlkd[ctranslate2]'" in caplog.text
    with pytest.raises(ConfigError, match=r"pip install 'rlkd\[ctranslate2\]'.*Use --engine torch"):
        choose("ctranslate2", decoding=Decoding("greedy", 4))


def test_auto_takes_ctranslate2_for_greedy(tmp_path, monkeypatch, caplog):
    pytest.importorskip("ctranslate2")
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO):
        engine = choose("auto", decoding=Decoding("greedy", 4), threads=1).make()
    assert (engine.name, engine.identity()["dtype"]) == ("ctranslate2", "float32")
    assert "engine: ctranslate2 in float32" in caplog.text


def test_what_is_asked_for_is_never_dropped_silently():
    with pytest.raises(
        ConfigError,
        match=r"engine = 'torhc': allowed are 'auto', 'ctranslate2', 'torch', 'openai'\. Did you mean",
    ):
        choose("torhc")
    with pytest.raises(ConfigError, match=r"engine = 'torch': .*compute_type = 'int8'\.$"):
        choose("torch", compute_type="int8")
    with pytest.raises(
        ConfigError, match=r"no engine can do this\.\n  ctranslate2: .*\n  torch: .*compute_type = 'int8'"
    ):
        choose("auto", decoding=Decoding("sample", 4), compute_type="int8")


@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="needs ctranslate2")
def test_what_ctranslate2_lacks_is_named_from_the_configuration_alone():
    """Nothing of these models but their configuration is looked at."""

    def known(**facts):
        config = SimpleNamespace(model_type=facts.pop("model_type", "t5"))
        facts = {"dtype": "float32", "device": None, "quantized": False, "adapted": False} | facts
        return SimpleNamespace(config=config, **facts)

    assert choose("ctranslate2", known()).name == "ctranslate2"
    for model, settings, reason in (
        (known(), {"compute_type": "int7"}, "does not compute in int7"),
        (known(dtype="int7"), {}, "does not compute in int7"),
        (known(model_type="longt5"), {}, "does not convert 'longt5'"),
        (known(quantized=True), {}, "already quantized"),
        (known(adapted=True), {}, "has PEFT adapters"),
        (known(device="mps:0"), {}, "cannot use this mps"),
    ):
        with pytest.raises(ConfigError, match=f"engine = 'ctranslate2': .*{reason}.*Use --engine torch"):
            choose("ctranslate2", model, **settings)


def test_the_reference_has_full_precision():
    """It reads the same model without quantization, and without the compute_type of the approximate engine."""
    spec = ModelSpec("somewhere", "teacher", dtype="bfloat16", quantization="int8")
    choice = EngineChoice("ctranslate2", spec, EngineSettings(compute_type="int8"))
    with pytest.raises(ModelError, match="'somewhere' is neither"):
        choice.reference()
    assert (spec.full_precision().quantization, spec.full_precision().dtype) == (None, "bfloat16")
    loaded = LoadedModel(model_of("t5"))
    assert EngineChoice("ctranslate2", loaded, EngineSettings(compute_type="int8")).reference().lm is loaded.lm


# -- agreement -------------------------------------------------------------------------------------------------------


class OffBy:
    """An engine that is sure of itself by `nats` more, and wrong about `wrong` prompts."""

    def __init__(self, engine, nats, wrong):
        self.engine, self.nats, self.wrong = engine, nats, wrong

    def answer(self, prompts, seeds, decoding):
        assert decoding.strategy == "greedy"
        made = []
        for prompt in prompts:
            (ids,) = (row[0].ids for row in self.engine.answer([prompt], [[0]], decoding))
            ids = [5, 6, EOS] if prompt in self.wrong else ids
            (logps,) = self.engine.score([prompt], [ids])
            made.append([Answer(ids, [value + self.nats for value in logps], True)])
        return made


def test_agreement_counts_equal_answers_and_averages_over_tokens():
    reference = TorchEngine(model_of("bart"))
    decoding = Decoding("sample", 6, labels_per_input=3, temperature=0.5, top_k_logprobs=2)
    same = agreement(reference, reference, PROMPTS, decoding)
    assert (same["prompts"], same["exact_match"]) == (6, 1.0)
    assert same["mean_abs_delta_logprob"] < 1e-5
    off = agreement(OffBy(reference, -0.25, PROMPTS[:2]), reference, PROMPTS, decoding)
    assert off["exact_match"] == pytest.approx(4 / 6)
    assert off["mean_abs_delta_logprob"] == pytest.approx(0.25, abs=1e-4)
