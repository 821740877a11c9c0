"""Models by name: what is known and refused before their weights load, and what loading is asked to do."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig

from rlkd.errors import ConfigError, ModelError
from rlkd.models import loading
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.spec import LoadedModel, ModelSpec, TeacherSpec, check_pair
from tiny import PADDED_VOCAB, VALID, WORDS, save_pair, save_pretrained, tiny_t5, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    save_pretrained(folder / "small", tiny_t5(vocab=20))
    save_pretrained(folder / "other", tiny_t5(), tiny_tokenizer([*WORDS[:-1], "z"]))
    BertConfig().save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """What `load_model` was asked for; it gives a model that notes where it is moved to."""
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return SimpleNamespace(to=lambda device: f"moved to {device}")

    monkeypatch.setattr(loading, "load_model", load)
    return calls


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("nothing", "float32", r"student '.*nothing' is neither a local folder"),
        ("bert", "float32", r"student '.*bert' has model_type 'bert', an encoder"),
        ("student", "float16", r"Use student_dtype: bfloat16"),
        ("student", "half", r"student_dtype = 'half': allowed are"),
        ("small", "float32", r"student '.*small': the tokenizer has ids up to .* do not match"),
    ],
)
def test_what_cannot_take_the_role_is_refused_without_weights(folder, asked, name, dtype, message):
    with pytest.raises(ModelError, match=message):
        ModelSpec(str(folder / name), "student", dtype=dtype).check()
    assert asked == []


def test_what_is_known_without_weights(folder, asked):
    spec = ModelSpec(str(folder / "teacher"), "teacher")
    spec.check()
    assert (spec.config.model_type, spec.config.vocab_size) == ("t5", PADDED_VOCAB)
    assert (spec.valid_vocab, spec.tokenizer.get_vocab()) == (VALID, tiny_tokenizer().get_vocab())
    assert (spec.quantized, spec.adapted) == (False, False)
    assert ModelSpec(spec.name, "teacher", quantization=object()).quantized
    assert asked == []


def test_weights_load_as_the_spec_says(folder, asked):
    name, bits = str(folder / "teacher"), object()
    spec = ModelSpec(name, "teacher", "v1", "bfloat16", attention="eager", device="cuda:1")
    options = {"dtype": "bfloat16", "revision": "v1", "attention": "eager", "quantization": None}
    options |= {"allow_bin": False, "keep_adapter": False}
    assert spec.load() == "moved to cuda:1"
    assert spec.load("cpu") == "moved to cpu"
    assert asked == [((name, "teacher"), options)] * 2
    # Without a device they stay where they load; bitsandbytes has placed what it quantized.
    for still in (ModelSpec(name, "student"), ModelSpec(name, "student", quantization=bits, device="cuda:1")):
        assert isinstance(still.load(), SimpleNamespace)
    assert asked[-1][1]["quantization"] is bits
    assert ModelSpec(name, "student", quantization=bits).full_precision() == ModelSpec(name, "student")


def test_quantizations():
    assert loading.quantization_config("none") is None
    assert loading.quantization_config("nf4").load_in_4bit
    with pytest.raises(ConfigError, match="quantization = 'int4': allowed are 'none', 'int8', 'nf4'"):
        loading.quantization_config("int4")


def test_a_pair_shares_its_vocabulary(folder, asked):
    teacher, student, other, small = (
        ModelSpec(str(folder / name), role)
        for name, role in (("teacher", "teacher"), ("student", "student"), ("other", "student"), ("small", "student"))
    )
    assert check_pair(teacher, student) == VALID
    with pytest.raises(ModelError, match=r"have different vocabularies: .* first difference at id"):
        check_pair(teacher, other)
    with pytest.raises(ModelError, match=r"student '.*small': the tokenizer has ids up to"):
        check_pair(teacher, small)
    assert asked == []


def test_a_teacher_by_name_loads_as_it_was_saved(folder):
    spec = TeacherSpec(ModelSpec(str(folder / "teacher"), "teacher"), max_input_tokens=7, input_eos=False)
    teacher = spec.load()
    assert (teacher.max_input_tokens, teacher.append_eos, teacher.tokenizer) == (7, False, spec.tokenizer)
    assert teacher.lm.valid_vocab == VALID
    saved = tiny_t5(tied=False, width=32).state_dict()
    assert all(torch.equal(weight, saved[key]) for key, weight in teacher.lm.model.state_dict().items())


def test_what_a_model_in_memory_tells():
    lm = EncoderDecoder(tiny_t5().to(torch.bfloat16), VALID)
    loaded = LoadedModel(lm)
    assert (loaded.dtype, loaded.device, loaded.quantized, loaded.adapted) == ("bfloat16", "cpu", False, False)
    assert loaded.config is lm.model.config
    assert loaded.language_model("cuda") is lm
    assert loaded.full_precision().language_model() is lm

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]))
    assert LoadedModel(EncoderDecoder(adapted, VALID)).adapted
