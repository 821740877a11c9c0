"""`student: small`: layers cut from the teacher, against transformers' own forward with the other layers left out."""

import pytest
import torch
from models.decoder_families import OWN, tiny_decoder
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from rlkd.errors import ModelError
from rlkd.models.cut_layers import cut_layers, kept_layers, write_small
from rlkd.models.loading import protect_untied_head
from rlkd.models.spec import ModelSpec
from tiny import save_pretrained, tiny_bart, tiny_t5


def test_kept_layers_are_spread_evenly():
    assert {n: kept_layers(n) for n in (1, 2, 3, 4, 6, 12)} == {
        1: [0], 2: [0], 3: [0], 4: [0, 3], 6: [0, 5], 12: [0, 4, 7, 11],
    }  # fmt: skip


def outputs(model):
    ids = torch.tensor([[5, 9, 12, 4, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return model(**batch, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def without_layers(model, stacks):
    """The same model that skips the layers that are cut."""
    for stack in stacks:
        for number in sorted(set(range(len(stack))) - set(kept_layers(len(stack))), reverse=True):
            del stack[number]
    return model


def deep_t5(tied):
    """Four encoder layers, two decoder layers."""
    torch.manual_seed(3)
    config = T5Config(**{**tiny_t5().config.to_dict(), "num_layers": 4, "num_decoder_layers": 2})
    config.scale_decoder_outputs = tied
    model = T5ForConditionalGeneration(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        protect_untied_head(model)
    return model


STACKS = {
    "t5": lambda m: (m.encoder.block, m.decoder.block),
    "bart": lambda m: (m.model.encoder.layers, m.model.decoder.layers),
    "llama": lambda m: (m.model.layers,),
    "gpt2": lambda m: (m.transformer.h,),
    "gemma2": lambda m: (m.model.layers,),
}


@pytest.mark.parametrize("kind", ["t5", "t5-untied", "bart", "llama", "gpt2", "gemma2"])
def test_a_cut_model_computes_what_the_teacher_does_without_the_other_layers(kind, tmp_path):
    family = kind.removesuffix("-untied")
    if family == "t5":
        teacher = deep_t5(tied=kind == "t5")
    elif family == "bart":
        teacher = tiny_bart()
    else:
        teacher = tiny_decoder(family, num_hidden_layers=4)
    before = outputs(teacher)
    save_pretrained(tmp_path / "teacher", teacher)
    write_small(ModelSpec(str(tmp_path / "teacher"), "teacher"), tmp_path / "small")
    auto = AutoModelForSeq2SeqLM if teacher.config.is_encoder_decoder else AutoModelForCausalLM
    small = auto.from_pretrained(tmp_path / "small").eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in teacher.parameters())
    expected = outputs(without_layers(teacher, STACKS[family](teacher)))
    torch.testing.assert_close(outputs(small), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert small.generation_config.eos_token_id == teacher.generation_config.eos_token_id
    assert (tmp_path / "small/tokenizer.json").exists()


@pytest.mark.parametrize("family", [*OWN, "phi", "smollm3", "stablelm"])
def test_every_family_is_cut(family, tmp_path):
    """Whatever it says of each layer is cut, too: the saved model is read as it was made."""
    depth = 2 if family == "gpt_neo" else 4
    small = cut_layers(tiny_decoder(family, num_hidden_layers=depth))
    assert small.config.num_hidden_layers == len(kept_layers(depth))
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(again), outputs(small))


def test_a_single_layer_cannot_be_cut():
    with pytest.raises(ModelError, match="Name a student"):
        cut_layers(tiny_decoder("llama", num_hidden_layers=1))
