"""Every family of encoders that transformers offers is distilled, or refused before anything is trained."""

from __future__ import annotations

import csv
from contextlib import suppress

import pytest
import torch
from encoder_families import ENCODERS, tiny_config
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config, ModernBertConfig, PreTrainedConfig

from rlkd import (
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    TKDTrainer,
    prepare_encoders,
)
from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoders.classifiers import build_student, layer_lists
from rlkd.models.encoders.rehearsal import check_outputs, is_encoder, rehearse
from tiny import classifier_tokenizer

INPUTS = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
# What must work wholly: the families whose classifiers people distil most.
SUPPORTED = ("bert", "roberta", "distilbert", "electra", "xlm-roberta", "camembert", "albert")


def prepare(folder, config, preset, init, **more):
    """The recipe's setup for a checkpoint without a classifier."""
    config.save_pretrained(folder / "model")
    with suppress(Exception):  # what transformers cannot build is refused
        with torch.device("meta"):
            size = AutoModel.from_config(config).num_parameters()
        if size < 1_000_000:  # else a family of several models, whose parts `tiny_config` does not reach
            AutoModel.from_config(config).save_pretrained(folder / "model")
    classifier_tokenizer(model_max_length=60).save_pretrained(folder / "model")
    rows = [{"text": f"{a} {b}", "label": ("no", "yes")[a < b]} for a in "abcd" for b in "abcd"]
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(rows)
    return prepare_encoders(
        LabelledDataArguments(train_file=str(folder / "rows.csv"), dev_fraction=0.3),
        EncoderTeacherArguments(teacher=str(folder / "model")),
        EncoderStudentArguments(student_layers=2, student_init=init),
        TKDArguments(
            str(folder / "out"), preset=preset, max_steps=1, max_length=30, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", eval_strategy="no", **more,
        ),
    )  # fmt: skip


def distil(setup):
    """One step from a random teacher, and the student as anyone loads it; returns the logits of both."""
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(setup.teacher_config)
    trainer = TKDTrainer(setup.new_student(teacher), setup.training, teacher=teacher, **setup.trainer_inputs())
    trainer.run(setup.settings)
    saved = AutoModelForSequenceClassification.from_pretrained(setup.training.output_dir).eval()
    with torch.no_grad():
        return saved(**INPUTS).logits, trainer.trained.student.eval()(**INPUTS).logits


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "init"), [("kd", "random"), ("pkd", "mapped"), ("t-s-tkd", "first")])
@pytest.mark.parametrize("family", ENCODERS)
def test_a_family_works_or_is_refused_at_the_start(tmp_path, family, preset, init):
    try:
        setup, refusal = prepare(tmp_path, tiny_config(family), preset, init), ""
    except (ModelError, ConfigError) as error:
        setup, refusal = None, str(error)
    assert len(refusal) < 500
    if setup is not None:
        again, own = distil(setup)
        torch.testing.assert_close(again, own, atol=1e-5, rtol=1e-5)
    else:
        assert family not in SUPPORTED, refusal


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_usual_families_may_grow_trees(family):
    config = tiny_config(family)
    own = rehearse(config, {"layers": 2}, needs={"student": {"hidden", "tree"}, "teacher": {"hidden", "tree"}})
    assert own.num_hidden_layers == 2


def modernbert(**more):
    return tiny_config("modernbert", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=3, **more)


REFUSED = {
    "modernbert, mapped": (modernbert, {"layers": 2}, {}, r"not alike: layers 2, 4 .*Use init: first or random, or a"),
    "deberta-v2, tree": ("deberta-v2", {"layers": 2}, {"needs": {"student": {"tree"}}}, r"only after dropout \(0.1\)"),
    "mpnet, tree": ("mpnet", {"layers": 2}, {"needs": {"student": {"tree"}}}, r"only after dropout \(0.1\)"),
    "big_bird, tree": ("big_bird", {"layers": 2}, {"needs": {"teacher": {"tree"}}}, "does not expose its attention"),
    "canine, states": (
        "canine", {"layers": 2}, {"needs": {"teacher": {"hidden"}}}, "gives .* hidden states, which cannot be compared"
    ),
    "fnet, attention": ("fnet", {"layers": 2}, {"needs": {"student": {"attention"}}}, "does not expose its attention"),
    "deberta-v2, relations": (
        lambda: tiny_config("deberta-v2", attention_probs_dropout_prob=0.0), {"layers": 2},
        {"needs": {"student": {"relations"}}}, "exposes only attention maps, not the queries, keys and values",
    ),
    "modernbert, boundaries": (
        modernbert, {"layers": 2, "init": "first"}, {"needs": {"teacher": {"neurons"}}},
        "has 0 plain feed-forward networks for 4 layers",
    ),
    "canine, gradient": ("canine", {"layers": 2}, {"needs": {"teacher": {"gradient"}}}, "cannot be distilled here"),
    "funnel": ("funnel", {"layers": 2}, {}, "a 'funnel' model cannot be distilled here"),
    "tapas, token types": ("tapas", {"layers": 2}, {"token_types": {"student": [0]}}, "a .tapas. model cannot"),
    "roberta, pairs": (
        lambda: tiny_config("roberta", type_vocab_size=1),
        {"layers": 2},
        {"token_types": {"teacher": [0, 1]}},
        "teacher: a 'roberta' model cannot be distilled here: index out of range",
    ),
    "roberta, single texts": (
        lambda: tiny_config("roberta", type_vocab_size=1), {"layers": 2}, {"token_types": {"teacher": [0]}}, None
    ),
    "xmod": (lambda: tiny_config("xmod", default_language=None), {"layers": 2}, {}, "language"),
    "checkpointing": ("fnet", {"layers": 2}, {"gradient_checkpointing": True}, None),
    "an image model": ("vit", {"layers": 2}, {}, "a 'vit' model cannot be distilled here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_configuration_decides_is_known_from_it(kind, monkeypatch):
    family, options, needs, message = REFUSED[kind]
    config = tiny_config(family) if isinstance(family, str) else family()
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    if message is None:
        rehearse(config, options, **needs)
        return
    with pytest.raises(ModelError, match=message):
        rehearse(config, options, **needs)


def test_layers_of_two_kinds_keep_their_kinds(tmp_path):
    """ModernBERT's first layer has no norm of its own, and layers differ in what they attend to."""
    config = modernbert()
    kinds = config.layer_types
    assert len(set(kinds)) == 2
    for options, kept in (({"init": "first"}, [0, 1]), ({"layer_map": [1, 4]}, [0, 3])):
        own = rehearse(config, {"layers": 2, **options}, needs={"student": {"hidden", "tree"}})
        assert list(own.layer_types) == [kinds[k] for k in kept]
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    student = build_student(teacher, 2, layer_map=[1, 4])
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**INPUTS).logits, student.eval()(**INPUTS).logits)
    layers = [m.get_submodule(layer_lists(teacher, student)[0]) for m in (student, teacher)]
    assert torch.equal(layers[0][1].mlp.Wi.weight, layers[1][3].mlp.Wi.weight)


def test_families_without_a_single_list_of_layers():
    """ALBERT's layers share their weights; XLM keeps the parts of its layers in four lists."""
    torch.manual_seed(0)
    albert = AutoModelForSequenceClassification.from_config(tiny_config("albert"))
    student = build_student(albert, 2)
    assert layer_lists(albert, student) == []
    assert all(torch.equal(t, albert.state_dict()[name]) for name, t in student.state_dict().items())
    xlm = AutoModelForSequenceClassification.from_config(tiny_config("xlm"))
    student = build_student(xlm, 2)
    assert len(layer_lists(xlm, student)) == 4
    own, theirs = (m.transformer for m in (student, xlm))
    assert torch.equal(own.ffns[0].lin1.weight, theirs.ffns[1].lin1.weight)
    assert torch.equal(own.attentions[1].q_lin.weight, theirs.attentions[3].q_lin.weight)


def test_the_recipe_refuses_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(ModelError, match="'modernbert' model are not alike"):
        prepare(tmp_path, modernbert(), "kd", "mapped")
    with pytest.raises(ModelError, match="'deberta-v2' model exposes its attention only after dropout"):
        prepare(tmp_path, tiny_config("deberta-v2"), "tkd", "mapped")
    with pytest.raises(ModelError, match=r"layer_map = \[1, 4\]: the layers of a 'albert' model share their weights"):
        prepare(tmp_path, tiny_config("albert"), "kd", "mapped", layer_map=[1, 4])
    gpt = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    with pytest.raises(ModelError, match="'gpt2' model, not an encoder"):
        prepare(tmp_path, gpt, "kd", "mapped")


def test_encoders_are_told_from_families_that_continue_texts():
    assert all(is_encoder(tiny_config(name)) for name in ("bert", "roberta", "modernbert", "deberta-v2"))
    assert not any(is_encoder(tiny_config(name)) for name in ("gpt2", "llama", "bart"))


def test_a_student_that_would_be_another_when_loaded(monkeypatch):
    """A configuration that does not say all that the weights depend on."""
    save = ModernBertConfig.save_pretrained

    def forgets(self, folder, **options):
        changed = type(self).from_dict(self.to_dict() | {"intermediate_size": 64})
        save(changed, folder, **options)

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", forgets)
    with pytest.raises(ModelError, match="would be another when it is loaded again"):
        rehearse(modernbert(), {"layers": 2, "init": "first"})


def test_gradient_checkpointing_and_logits_of_another_shape():
    from test_encoders import bilstm

    with pytest.raises(ModelError, match="gradient_checkpointing: the teacher, a 'rlkd_bilstm' model, has none"):
        rehearse(bilstm(num_hidden_layers=2).config, {"layers": 1, "init": "random"}, gradient_checkpointing=True)
    model = bilstm()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ModelError, match=r"gives logits of shape \(2, 2\) for 2 texts of 4 tokens and 3 labels"):
        check_outputs(model, "teacher", {"hidden"})
