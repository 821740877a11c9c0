"""CTranslate2 against transformers: the same answers, the same log-probabilities, and its traps kept shut."""

import math
import os
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ctranslate2")

from rlkd.errors import ConfigError, RlkdError
from rlkd.models import loading
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.spec import LoadedModel, ModelSpec
from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine, convert
from rlkd.sampling.engines.protocol import Decoding, EngineSettings
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.schedule import Budget, answer_all
from tiny import EOS, KINDS, VALID, save_pretrained, tiny_bart, tiny_model, tiny_t5

PROMPTS = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] + [EOS] for i in range(12)]
SEEDS = [[0]] * len(PROMPTS)
NEW = 8
GREEDY = Decoding("greedy", NEW)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_of(kind):
    return EncoderDecoder(tiny_model(kind), VALID)


def ending(kind):
    """A model whose greedy answers end at different lengths."""
    if kind == "bart":
        return EncoderDecoder(tiny_bart(eos_bias=2.0, seed=2), VALID)
    model = tiny_t5(tied=kind == "t5", seed=7 if kind == "t5-untied" else 0, width=32 if kind == "t5-untied" else 16)
    if kind == "t5-untied":
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 3.0
    return EncoderDecoder(model, VALID)


def engine_of(lm, compute_type="float32"):
    return CTranslate2Engine(lm, compute_type, threads=1)


def plain_log_probs(lm, prompt, ids):
    """Log-probabilities of the tokens `ids` by one forward of the transformers model."""
    decoder_input = torch.tensor([[lm.start_id, *ids[:-1]]])
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits
    return logits[0, :, :VALID].log_softmax(-1)[range(len(ids)), ids].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate_and_its_log_probs_a_plain_forward(kind):
    lm = ending(kind)
    answers = engine_of(lm).answer(PROMPTS, SEEDS, GREEDY)
    assert len({len(row[0].ids) for row in answers}) > 1
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        generated = lm.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=list(range(VALID, lm.config.vocab_size)),
        )
        assert answer.ids == generated[0, 1:].tolist()
        assert answer.finished == (EOS in answer.ids)
        assert answer.logps == pytest.approx(plain_log_probs(lm, prompt, answer.ids), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_given_answers(kind):
    lm = model_of(kind)
    # With and without end-of-sequence, and nothing but it.
    answers = [[[5, 9, 7], [4, EOS], [EOS]][i % 3] for i in range(len(PROMPTS))]
    scores = engine_of(lm).score(PROMPTS, answers)
    for prompt, ids, row in zip(PROMPTS, answers, scores, strict=True):
        assert row == pytest.approx(plain_log_probs(lm, prompt, ids), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_gives_exact_log_probs_best_first(kind):
    lm = model_of(kind)
    decoding = Decoding("beam", NEW, labels_per_input=3, num_beams=4)
    for prompt, row in zip(PROMPTS, engine_of(lm).answer(PROMPTS, SEEDS, decoding), strict=True):
        assert len({tuple(answer.ids) for answer in row}) == 3
        for answer in row:
            assert answer.logps == pytest.approx(plain_log_probs(lm, prompt, answer.ids), abs=1e-5)
        means = [sum(answer.logps) / len(answer.ids) for answer in row]
        assert means == sorted(means, reverse=True)


def test_full_width_beam_search_finds_the_best_answer_of_all():
    """With at least as many beams as prefixes of one token nothing is pruned: brute force over 2 tokens."""
    lm = model_of("t5-untied")
    decoding = Decoding("beam", 2, num_beams=2 * VALID)
    for prompt, (answer,) in zip(PROMPTS[:3], engine_of(lm).answer(PROMPTS[:3], SEEDS[:3], decoding), strict=True):
        candidates = [[EOS], *([a, b] for a in range(VALID) if a != EOS for b in range(VALID))]
        scores = TorchEngine(lm).score([prompt] * len(candidates), candidates)
        best = max(range(len(candidates)), key=lambda i: sum(scores[i]) / len(candidates[i]))
        assert answer.ids == candidates[best]


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_an_answer_does_not_depend_on_its_batch(strategy):
    engine, decoding = engine_of(model_of("t5-untied")), Decoding(strategy, NEW)
    whole = engine.answer(PROMPTS, SEEDS, decoding)
    single = answer_all(engine, PROMPTS, SEEDS, decoding, Budget(1))
    assert [row[0].ids for row in single] == [row[0].ids for row in whole]
    for (one,), (other,) in zip(single, whole, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_prompts_are_never_truncated():
    lm = model_of("t5-untied")
    prompt = [3 + (5 * j * j + j) % 29 for j in range(1500)]
    ((answer,),) = engine_of(lm).answer([prompt], [[0]], GREEDY)
    assert answer.logps == pytest.approx(plain_log_probs(lm, prompt, answer.ids), abs=1e-4)
    assert answer.ids == TorchEngine(lm).answer([prompt], [[0]], GREEDY)[0][0].ids


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_of_the_vocabulary_are_never_chosen(kind):
    lm = model_of(kind)
    with torch.no_grad():
        # They would win every argmax.
        lm.model.get_output_embeddings().weight[VALID:] *= 1000
    decoding = Decoding("beam", NEW, labels_per_input=2)
    engine = engine_of(lm)
    rows = engine.answer(PROMPTS, SEEDS, GREEDY) + engine.answer(PROMPTS, SEEDS, decoding)
    assert max(max(answer.ids) for row in rows for answer in row) < VALID


def test_int8_is_close_and_leaves_the_teacher_as_it_was():
    lm = EncoderDecoder(tiny_t5(tied=False, width=64), VALID)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    engine = engine_of(lm, "int8")
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    answers = engine.answer(PROMPTS, SEEDS, GREEDY)
    pairs = [(prompt, row[0].ids) for prompt, row in zip(PROMPTS, answers, strict=True)]
    exact = [logp for prompt, ids in pairs for logp in plain_log_probs(lm, prompt, ids)]
    said = [logp for row in answers for logp in row[0].logps]
    deltas = [abs(a - b) for a, b in zip(said, exact, strict=True)]
    assert max(deltas) > 1e-5
    assert sum(deltas) / len(deltas) < 0.1


def test_identity_tells_engine_weights_and_precision_apart():
    one, other = model_of("t5"), EncoderDecoder(tiny_t5(seed=1), VALID)
    identities = [engine_of(one), engine_of(other), engine_of(one, "int8")]
    assert len({str(engine.identity()) for engine in identities}) == 3
    assert engine_of(one).identity() == identities[0].identity()
    assert identities[0].identity()["teacher_weights"] == TorchEngine(one).identity()["teacher_weights"]


def test_the_weights_are_read_to_convert_them_and_not_kept(tmp_path, monkeypatch):
    folder = save_pretrained(tmp_path / "teacher", tiny_t5(tied=False))
    spec, lm, loaded = ModelSpec(folder, "teacher"), ModelSpec(folder, "teacher").language_model(), []
    load = loading.load_model

    def recording(*args, **options):
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", recording)
    settings = EngineSettings("ctranslate2", threads=1)
    assert CTranslate2Engine.objection(spec, GREEDY, settings) is None
    assert loaded == []
    engine = CTranslate2Engine.of(spec, settings)
    assert [model() for model in loaded] == [None]
    assert engine.identity() == engine_of(lm).identity()
    assert engine.answer(PROMPTS, SEEDS, GREEDY) == engine_of(lm).answer(PROMPTS, SEEDS, GREEDY)


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a bit", "cut off", "gone", "no checksums"])
def test_a_damaged_conversion_is_made_again(cache, caplog, damage):
    lm = model_of("t5-untied")
    folder = convert(lm, "float32")
    whole = (folder / "model.bin").read_bytes()
    if damage == "a bit":
        (folder / "model.bin").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "cut off":
        os.truncate(folder / "model.bin", 99)
    else:
        (folder / {"gone": "model.bin", "no checksums": "sha256.json"}[damage]).unlink()
    assert convert(lm, "float32") == folder
    assert (folder / "model.bin").read_bytes() == whole
    assert "is damaged: converting it again" in caplog.text
    engine_of(lm).answer(PROMPTS, SEEDS, GREEDY)


def test_a_teacher_is_converted_once_and_again_when_a_single_weight_changes(cache):
    lm = model_of("t5")
    first = convert(lm, "float32")
    stamp = (first / "model.bin").stat().st_mtime_ns
    assert convert(lm, "float32") == first
    assert (first / "model.bin").stat().st_mtime_ns == stamp
    assert convert(lm, "int8") != first
    with torch.no_grad():
        lm.model.shared.weight[7, 3] += 0.5
    assert convert(lm, "float32") != first
    assert all(not folder.name.startswith(".") for folder in (cache / "ctranslate2").iterdir())


def test_a_conversion_that_fails_leaves_nothing_behind(cache, monkeypatch):
    lm = model_of("t5")
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        convert(lm, "float32")
    assert list((cache / "ctranslate2").iterdir()) == []
    monkeypatch.undo()


def test_a_conversion_overtaken_by_another_process_uses_its_folder(cache, monkeypatch):
    lm, rename = model_of("t5"), os.rename

    def overtaken(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    folder = convert(lm, "float32")
    assert list((cache / "ctranslate2").iterdir()) == [folder]
    assert {file.name for file in folder.iterdir()} >= {"model.bin", "config.json"}


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "refused"), [("t5", True), ("t5-untied", True), ("bart", False)])
def test_float16_is_refused_for_t5_as_teacher_dtype_is(monkeypatch, kind, refused):
    """A GPU computes in it."""
    monkeypatch.setattr("rlkd.models.conversion._supported", lambda device: ("float16", "float32"))
    model = LoadedModel(EncoderDecoder(tiny_model(kind), VALID))
    said = CTranslate2Engine.objection(model, None, EngineSettings(compute_type="float16"))
    assert ("float16 overflows to inf in T5 models" in (said or "")) is refused


def test_samples_and_top_k_are_refused_naming_torch():
    engine = engine_of(model_of("t5"))
    for decoding in (Decoding("sample", 4), Decoding("greedy", 4, top_k_logprobs=3)):
        with pytest.raises(ConfigError, match="--engine torch"):
            engine.answer(PROMPTS, SEEDS, decoding)


@pytest.mark.parametrize("hypotheses", [[], [[]]])
def test_rows_that_ctranslate2_fails_on_are_named(monkeypatch, hypotheses):
    engine = engine_of(model_of("t5"))

    class Failing:
        def translate_batch(self, source, **_):
            good = SimpleNamespace(hypotheses=[["5", "1"]])
            return [SimpleNamespace(hypotheses=hypotheses) if i in (2, 4) else good for i in range(len(source))]

    engine._translator = Failing()
    with pytest.raises(RlkdError, match=r"2 of 6 prompts of a batch: rows 2, 4\."):
        engine.answer(PROMPTS[:6], SEEDS[:6], GREEDY)


def test_weights_that_are_not_finite_show_in_the_log_probs():
    lm = model_of("t5")
    with torch.no_grad():
        lm.model.decoder.final_layer_norm.weight[0] = float("nan")
    try:
        answers = engine_of(lm).answer(PROMPTS, SEEDS, GREEDY)
    except RlkdError:
        return
    assert not any(math.isfinite(sum(row[0].logps)) for row in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_special_tokens_alone_are_answered(kind):
    lm = model_of(kind)
    prompts = [[EOS], [EOS, EOS], [9, EOS], [lm.start_id, EOS]]  # [EOS] is that of an empty text
    prompts = prompts[: None if lm.start_id != lm.pad_id else 3]
    answers = engine_of(lm).answer(prompts, [[0]] * len(prompts), GREEDY)
    expected = TorchEngine(lm).answer(prompts, [[0]] * len(prompts), GREEDY)
    assert [row[0].ids for row in answers] == [row[0].ids for row in expected]
