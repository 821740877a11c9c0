"""Models with an embedding for each position: what they cannot read is refused by length, not by an IndexError."""

import json

import pytest
import torch

from rlkd.cli.main import main
from rlkd.errors import ConfigError, ModelError
from rlkd.models.architectures import LANGUAGE_MODELS, architecture_of
from rlkd.models.encoder_decoder import BART_FAMILY, M2M_FAMILY, T5_FAMILY, EncoderDecoder
from rlkd.models.spec import ModelSpec, TeacherSpec
from rlkd.models.teacher import Teacher
from rlkd.sampling.decode import decode, greedy
from rlkd.sampling.engines.protocol import Decoding
from rlkd.sampling.engines.torch_engine import TorchEngine
from tiny import EOS, VALID, save_pretrained, tiny_bart, tiny_t5, tiny_tokenizer

LONG = [5] * 64 + [EOS]  # tiny BART has 64 positions


def torch_engine(lm):
    return TorchEngine(lm)


def ctranslate2_engine(lm):
    pytest.importorskip("ctranslate2")
    from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine

    return CTranslate2Engine(lm)


@pytest.mark.parametrize("engine_of", [torch_engine, ctranslate2_engine])
def test_engines_say_what_is_too_long(engine_of, tmp_path, monkeypatch):
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    engine = engine_of(EncoderDecoder(tiny_bart(eos_bias=-50.0), VALID))
    for strategy in (Decoding("greedy", 8), Decoding("beam", 8, num_beams=2)):
        with pytest.raises(ModelError, match="a prompt has 65 tokens, the model 64 positions: set max_input_tokens"):
            engine.answer([LONG], [[0]], strategy)
    with pytest.raises(ModelError, match="an answer has 65 tokens, the model 64 positions: set max_new_tokens"):
        engine.answer([LONG[:4]], [[0]], Decoding("greedy", 65))
    with pytest.raises((ModelError, ConfigError), match=r"an answer has 65 tokens|answers of less than 64 tokens"):
        engine.answer([LONG[:4]], [[0]], Decoding("beam", 65, num_beams=2))
    with pytest.raises(ModelError, match=r"an answer has 6[56] tokens"):
        engine.score([LONG[:4]], [LONG])
    # As long as there are positions.
    ((answer,),) = engine.answer([LONG[1:]], [[0]], Decoding("greedy", 64))
    assert len(answer.ids) == 64
    assert len(engine.score([LONG[1:]], [LONG[2:]])[0]) == 63


def test_training_and_scores_say_it_too():
    lm = EncoderDecoder(tiny_bart(eos_bias=-50.0), VALID)
    teacher = Teacher(lm, tiny_tokenizer())
    ids = torch.tensor([LONG])
    with pytest.raises(ModelError, match="an answer has 65 tokens"):
        teacher.score([("a b",)], ids, torch.ones_like(ids).bool())
    with pytest.raises(ModelError, match="a prompt has 65 tokens"):
        teacher.score([("a " * 64,)], ids[:, :3], torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ModelError, match="an answer has 65 tokens"):
        decode(
            EncoderDecoder(tiny_bart(eos_bias=-50.0), VALID), lm.prompt_states([[5, EOS]]), greedy, max_new_tokens=70
        )


def test_lengths_are_checked_from_the_configuration(tmp_path):
    save_pretrained(tmp_path, tiny_bart())
    (tmp_path / "model.safetensors").rename(tmp_path / "away")  # no weights are needed to know
    spec = ModelSpec(str(tmp_path), "teacher")
    spec.__dict__["config"] = spec_config(tmp_path)
    spec.check_lengths(64, 64)
    with pytest.raises(ConfigError, match=r"max_input_tokens = 65: teacher .* \('bart'\) has 64 positions"):
        spec.check_lengths(65, 64)
    with pytest.raises(ConfigError, match=r"max_new_tokens = 65: teacher .* Set max_new_tokens to at most 64"):
        spec.check_lengths(64, 65)
    assert TeacherSpec(spec).longest_answer == 64


def spec_config(folder):
    from rlkd.models.loading import load_config

    return load_config(str(folder), "teacher")


def test_the_command_refuses_before_weights_load(tmp_path, capsys):
    save_pretrained(tmp_path / "teacher", tiny_bart())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a b"}))
    (tmp_path / "t.yaml").write_text("templates: {x: {name: x, jinja: 'copy {{ text }} ||| '}}")
    paths = {"--teacher": "teacher", "--dataset": "rows.jsonl", "--templates": "t.yaml", "--out": "out"}
    command = ["generate-pseudolabels", "--input-column", "text"]
    command += [part for option, name in paths.items() for part in (option, str(tmp_path / name))]
    for option, value in (("--max-input-tokens", "65"), ("--max-new-tokens", "65")):
        limits = {"--max-input-tokens": "64", "--max-new-tokens": "8"} | {option: value}
        with pytest.raises(SystemExit) as ended:
            main([*command, *(part for pair in limits.items() for part in pair)])
        assert ended.value.code == 2
        assert "has 64 positions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", T5_FAMILY + BART_FAMILY + M2M_FAMILY)
def test_every_family_says_how_long_its_texts_may_be(family):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    limits = architecture_of(config, "teacher", family).positions(config)
    learned = family in BART_FAMILY
    assert all((limit is not None) == learned for limit in (limits.prompt, limits.answer))
    assert limits.together is None
    assert family in next(iter(LANGUAGE_MODELS.values())).model_types


def test_t5_reads_texts_of_any_length():
    ((answer,),) = TorchEngine(EncoderDecoder(tiny_t5(), VALID)).answer([LONG * 3], [[0]], Decoding("greedy", 80))
    assert answer.ids
