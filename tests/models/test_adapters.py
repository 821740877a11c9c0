"""Adapter folders as models: students, teachers and bases of further training, and what does not belong together."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from rlkd.cli.main import app
from rlkd.errors import ConfigError, ModelError
from rlkd.models.adapters import adapter_of, add_adapter, check_same_settings
from rlkd.models.loading import load_model
from rlkd.models.saving import merge_adapter, save_student
from rlkd.models.spec import ModelSpec
from tiny import save_pretrained, tiny_bart, tiny_t5, tiny_tokenizer

# PEFT's, in the oracle.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = torch.tensor([[3, 4, 5, 1]])


def new_adapter(folder, base, *, tokenizer=True, seed=0, **options):
    """An adapter of the model in `base` as a run saves it: with weights that do something."""
    torch.manual_seed(seed)
    options = {"r": 2, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"} | options
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), LoraConfig(**options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    save_student(model, folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits


def by_peft(base, *adapters):
    """The oracle: PEFT's own reading of the adapters, one after the other."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


@pytest.fixture
def base(tmp_path):
    return save_pretrained(tmp_path / "base", tiny_t5(tied=False))


@pytest.fixture
def adapter(tmp_path, base):
    return new_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("kind", ["t5", "t5-untied", "bart"])
def test_an_adapter_folder_is_a_model(tmp_path, kind):
    build = {"t5": tiny_t5, "t5-untied": lambda: tiny_t5(tied=False), "bart": tiny_bart}[kind]
    base = save_pretrained(tmp_path / "base", build())
    adapter = new_adapter(tmp_path / "adapter", base, target_modules=["q_proj"] if kind == "bart" else ["q"])
    spec = ModelSpec(adapter, "student")
    spec.check()
    model = spec.load()
    expected = by_peft(base, adapter)
    assert not torch.equal(logits(expected), logits(build()))
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    assert (model.name_or_path, spec.adapted, hasattr(model, "peft_config")) == (adapter, False, False)
    assert spec.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_of_an_adapter_and_a_tokenizer_of_the_base(tmp_path, base, adapter):
    merged = save_pretrained(tmp_path / "merged", by_peft(base, adapter))
    second = new_adapter(tmp_path / "second", merged, tokenizer=False, seed=1)
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = adapter
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "second" / "base_model.json").unlink()
    spec = ModelSpec(second, "student")
    torch.testing.assert_close(logits(spec.load()), logits(by_peft(base, adapter, second)), rtol=0, atol=1e-5)
    assert spec.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_is_trained_further_when_asked(base, adapter):
    model = load_model(adapter, "student", keep_adapter=True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert model.peft_config["default"].base_model_name_or_path == base
    torch.testing.assert_close(logits(model), logits(by_peft(base, adapter)), rtol=0, atol=1e-5)


def test_merged_it_is_a_plain_model(tmp_path, base, adapter):
    done = CliRunner().invoke(app, ["merge-adapter", adapter, str(tmp_path / "merged")], catch_exceptions=False)
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "merged"))
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(found), logits(by_peft(base, adapter)), rtol=0, atol=1e-6)
    assert ModelSpec(str(tmp_path / "merged"), "student").adapter is None
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]
    with pytest.raises(ConfigError, match=r"merged exists and is not an empty folder"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"base' is a whole model, not an adapter"):
        merge_adapter(base, tmp_path / "again")


# What does not belong together: adapter and base are both named.


def edit(folder, **values):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def moved(base, adapter):
    shutil.move(base, base + "-2")


def changed(base, adapter):
    save_pretrained(base, tiny_t5(tied=False, seed=9))


def one_value_changed(base, adapter):
    tensors = load_file(f"{base}/model.safetensors")
    next(iter(tensors.values())).view(-1)[3] += 1e-3
    save_file(tensors, f"{base}/model.safetensors", metadata={"format": "pt"})


def of_another_family(base, adapter):
    shutil.rmtree(base)
    save_pretrained(base, tiny_bart())
    os.remove(f"{adapter}/base_model.json")


def of_fewer_layers(base, adapter):
    small = tiny_t5(tied=False)
    small.encoder.block, small.decoder.block = small.encoder.block[:1], small.decoder.block[:1]
    small.config.num_layers = small.config.num_decoder_layers = 1
    save_pretrained(base, small)
    os.remove(f"{adapter}/base_model.json")


def wider(base, adapter):
    save_pretrained(base, tiny_t5(tied=False, width=32))
    os.remove(f"{adapter}/base_model.json")


def with_a_weight_less(base, adapter):
    path = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, metadata={"format": "pt"})


def not_finite(base, adapter):
    path = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def pickled(base, adapter):
    torch.save(load_file(f"{adapter}/adapter_model.safetensors"), f"{adapter}/adapter_model.bin")
    os.remove(f"{adapter}/adapter_model.safetensors")


def twice(base, adapter):
    shutil.copy(f"{base}/model.safetensors", adapter)


DAMAGES = {
    moved: "is an adapter of '{base}', and there is no such folder",
    changed: "weights of its base model '{base}' have changed",
    one_value_changed: "weights of its base model '{base}' have changed",
    of_another_family: "the adapter of '{base}' cannot be loaded",
    of_fewer_layers: "does not fit its base model '{base}'",
    wider: "the adapter of '{base}' cannot be loaded",
    with_a_weight_less: "does not fit its base model '{base}'",
    not_finite: "holds values that are not finite",
    pickled: "holds its weights only as pickles (adapter_model.bin)",
    twice: "holds a whole model (model.safetensors) and an adapter",
    lambda base, adapter: edit(adapter, base_model_name_or_path=None): "does not name a base model",
    lambda base, adapter: edit(adapter, base_model_name_or_path=adapter): "names the adapter itself",
    lambda base, adapter: edit(adapter, peft_type="PREFIX_TUNING"): "adapter of the kind PREFIX_TUNING",
    lambda base, adapter: edit(adapter, peft_type="NONSENSE"): "the adapter of '{base}' cannot be loaded",
    lambda base, adapter: Path(adapter, "adapter_config.json").write_text("{"): "adapter_config.json is cut off",
    lambda base, adapter: Path(adapter, "base_model.json").write_text(""): "base_model.json is empty",
    lambda base, adapter: os.remove(f"{adapter}/adapter_model.safetensors"): "adapter_model.safetensors is missing",
    lambda base, adapter: os.remove(f"{base}/model.safetensors"): "weights of its base model '{base}' have changed",
    lambda base, adapter: os.truncate(f"{adapter}/adapter_model.safetensors", 200): "adapter_model.safetensors is cut",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_adapter_without_its_base_is_refused(base, adapter, damage):
    damage(base, adapter)
    with pytest.raises(ModelError) as error:
        ModelSpec(adapter, "student").language_model()
    assert f"student '{adapter}'" in str(error.value)
    assert DAMAGES[damage].format(base=base) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("options", "merges"),
    [
        ({"target_modules": ["q", "wo"], "use_dora": True}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["shared"]}, False),
    ],
    ids=str,
)
def test_what_is_merged_is_the_adapted_model(tmp_path, tied, options, merges):
    """Adapters of weights that two parts share would add up: they are refused."""
    base = save_pretrained(tmp_path / "base", tiny_t5(tied=tied))
    adapter = new_adapter(tmp_path / "adapter", base, **options)
    spec = ModelSpec(adapter, "student")
    if not merges:
        with pytest.raises(ModelError, match=r"adapts .*, whose weights the model shares with another part"):
            spec.load()
        return
    expected = logits(PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter))
    torch.testing.assert_close(logits(spec.load()), expected, rtol=0, atol=1e-4)
    merge_adapter(adapter, tmp_path / "merged")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_prompts_that_are_learned_are_no_weights(tmp_path, base):
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match="adapter of the kind PREFIX_TUNING, which is not merged"):
        adapter_of(str(tmp_path / "prefix"), "teacher")


def test_pickled_adapters_load_on_request(base, adapter):
    expected = logits(by_peft(base, adapter))
    pickled(base, adapter)
    torch.testing.assert_close(logits(ModelSpec(adapter, "student", allow_bin=True).load()), expected)


def test_an_adapter_is_trained_further_with_its_own_settings_only(adapter):
    known = adapter_of(adapter, "student")
    check_same_settings(known, LoraConfig(r=2, target_modules={"v", "q"}))
    check_same_settings(known, LoraConfig(r=2))
    with pytest.raises(ConfigError, match=r"settings differ: r 8 \(the adapter has 2\), lora_alpha 9 \(the adapter"):
        check_same_settings(known, LoraConfig(lora_alpha=9))


def test_modules_that_the_student_lacks_or_shares():
    with pytest.raises(ConfigError, match="use_peft: PEFT cannot adapt this student: Target modules"):
        add_adapter(tiny_t5(), LoraConfig(target_modules=["nothing", "such"]))
    with pytest.raises(ConfigError, match=r"use_peft: .*lm_head would be adapted, whose weights the model shares"):
        add_adapter(tiny_t5(), LoraConfig(target_modules=["lm_head"]))


def test_a_hub_adapter_is_found_by_its_configuration(monkeypatch, base, adapter):
    """No `config.json` on the hub, but an `adapter_config.json`: the base model is what it names."""
    path = f"{adapter}/adapter_config.json"
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda name, revision: path)
    found = adapter_of("someone/adapter", "teacher", "v1")
    assert (found.base, found.revision, found.base_role) == (base, "v1", "teacher 'someone/adapter': its base model")
    assert ModelSpec("someone/adapter", "teacher", "v1").tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_pickles_of_the_hub_are_named(monkeypatch, base):
    def load(*_, use_safetensors, **__):
        raise OSError("no file named model.safetensors. Please do not set `use_safetensors=True`.")

    monkeypatch.setattr("transformers.AutoModelForSeq2SeqLM.from_pretrained", load)
    with pytest.raises(ModelError, match=r"holds its weights only as pickles .*--allow-bin"):
        ModelSpec(base, "teacher").load()
