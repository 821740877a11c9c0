"""Recorded attention is the model's own, students are cut as asked, and what cannot be is refused."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
)

from rlkd.errors import ConfigError, ModelError
from rlkd.models.digests import weights_digest
from rlkd.models.encoders.attention import RECORDED_SDPA, prepare_attention
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.classifiers import (
    build_student,
    check_head_slices,
    layer_lists,
    matched_layers,
)
from rlkd.models.encoders.outputs import EncoderStudent, run_encoder, width_of
from rlkd.objectives.attention_tree import attention_tree, rows_of_map
from tiny import CLASSIFIER_WORDS, tiny_classifier

FAMILIES = ("bert", "roberta", "distilbert")


def batch(length=7, padding=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(CLASSIFIER_WORDS), (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - padding :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def mpnet(dropout=0.0):
    torch.manual_seed(0)
    return MPNetForSequenceClassification(
        MPNetConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=40, attention_probs_dropout_prob=dropout,
        )
    ).eval()  # fmt: skip


def bilstm(**options):
    torch.manual_seed(0)
    shape = {"vocab_size": len(CLASSIFIER_WORDS), "embedding_size": 8, "hidden_size": 6, "classifier_size": 5}
    return BiLSTMForSequenceClassification(BiLSTMConfig(**{**shape, **options})).eval()


def local_attention():
    """A ModernBERT whose first layers let a token see its neighbours only: masks that differ from row to row."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, local_attention=4, global_attn_every_n_layers=3, initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return ModernBertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", [*FAMILIES, "modernbert"])
def test_recorded_rows_grow_the_trees_of_the_eager_maps(kind):
    model, inputs = local_attention() if kind == "modernbert" else tiny_classifier(kind), batch()
    model.set_attn_implementation("eager")
    plain = model(**inputs, output_attentions=True)
    assert prepare_attention(model, "student") == "sdpa"
    out = run_encoder(model, inputs, {"hidden", "tree"}, "sdpa")
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-5)
    valid = inputs["attention_mask"].bool()
    everything = torch.arange(7).expand(2, 2, 7)
    for layer, attention in zip(out.attention, plain.attentions, strict=True):
        scores = layer.rows(everything).masked_fill(~valid[:, None, None], -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), attention, atol=1e-5, rtol=1e-4)
    for variant in ("algorithm1", "abstract", "flow"):
        trees = [
            attention_tree(rows, valid, 2, 2, variant=variant)
            for rows in ([layer.rows for layer in out.attention], [rows_of_map(a) for a in plain.attentions])
        ]
        assert all(torch.equal(own, eager) for own, eager in zip(*trees, strict=True))


def test_recording_sees_scores_before_dropout_and_no_gradient():
    quiet, noisy = tiny_classifier(), tiny_classifier(dropout=0.5)
    nodes = torch.zeros(2, 2, 1, dtype=torch.long)
    rows = []
    for model in (quiet, noisy):
        prepare_attention(model, "student")
        rows.append(run_encoder(model.train(), batch(), {"tree"}, "sdpa").attention[0].rows(nodes))
    assert not rows[0].requires_grad
    # Embeddings have dropout too; with only the attention's dropout on, the first layer agrees.
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in noisy.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    again = run_encoder(noisy, batch(), {"tree"}, "sdpa").attention[0].rows(nodes)
    torch.testing.assert_close(again, rows[0])


def test_nothing_is_recorded_unless_asked_or_when_checkpoints_run_again():
    model = tiny_classifier()
    prepare_attention(model, "student")
    assert not run_encoder(model, batch(), (), "sdpa").attention
    model.train().gradient_checkpointing_enable()
    out = run_encoder(model, batch(), {"tree"}, "sdpa")
    out.logits.sum().backward()
    assert len(out.attention) == 4


def test_eager_maps_where_the_family_knows_no_other():
    model, inputs = mpnet(), batch()
    assert prepare_attention(model, "student") == "eager"
    out = run_encoder(model, inputs, {"tree"}, "eager")
    maps = model(**inputs, output_attentions=True).attentions
    nodes = torch.tensor([3, 0]).expand(2, 2, 2)
    assert torch.equal(out.attention[1].rows(nodes), maps[1][:, :, [3, 0]])
    assert prepare_attention(mpnet(dropout=0.1), "teacher") == "eager"


@pytest.mark.parametrize(
    ("model", "message"),
    [(mpnet(dropout=0.1), "only after dropout .0.1."), (bilstm(), "'rlkd_bilstm' model does not expose its attention")],
)
def test_attention_that_cannot_be_had_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        prepare_attention(model, "student")


@pytest.mark.parametrize(
    ("layers", "teacher", "expected"),
    [(3, 12, [4, 8, 12]), (3, 4, [1, 3, 4]), (6, 12, [2, 4, 6, 8, 10, 12]), (4, 6, [2, 3, 5, 6])],
)  # fmt: skip
def test_layers_are_matched_evenly(layers, teacher, expected):
    assert matched_layers(layers, teacher) == expected


@pytest.mark.parametrize("layer_map", [[1, 2], [2, 1, 3], [1, 1, 3], [0, 1, 2], [3, 4, 5]])
def test_a_layer_map_that_does_not_fit(layer_map):
    assert matched_layers(3, 4, [2, 3, 4]) == [2, 3, 4]
    with pytest.raises(ConfigError, match=r"must give 3 layers of the teacher.*increasing, from 1 to 4"):
        matched_layers(3, 4, layer_map)


def test_a_student_deeper_than_its_teacher():
    with pytest.raises(ConfigError, match=r"5 layers, more than its teacher \(4\)"):
        matched_layers(5, 4)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("init", "sources"), [("mapped", [2, 4]), ("first", [1, 2])])
def test_students_get_the_teachers_layers(kind, init, sources):
    teacher = tiny_classifier(kind)
    student = build_student(teacher, 2, init)
    assert student.config.num_hidden_layers == 2
    [layers] = layer_lists(teacher, student)
    own, theirs = (m.get_submodule(layers) for m in (student, teacher))
    for layer, source in zip(own, sources, strict=True):
        for name, tensor in theirs[source - 1].state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor)
    outside = {name for name in student.state_dict() if f"{layers}." not in name}
    assert outside
    assert all(torch.equal(student.state_dict()[name], teacher.state_dict()[name]) for name in outside)
    if init == "mapped":
        whole = build_student(teacher, 4, "mapped").eval()
        torch.testing.assert_close(whole(**batch()).logits, teacher(**batch()).logits)


def test_narrower_and_pretrained_students(tmp_path):
    teacher = tiny_classifier(labels=3)
    small = build_student(teacher, 2, "random", hidden_size=8, attention_heads=4, intermediate_size=12)
    assert small(**batch()).logits.shape == (2, 3)
    assert (small.config.hidden_size, small.config.num_attention_heads, small.config.intermediate_size) == (8, 4, 12)
    other = tiny_classifier(seed=5, labels=5)  # its head is for another task
    other.save_pretrained(tmp_path)
    student = build_student(teacher, 2, "pretrained", pretrained=str(tmp_path))
    assert torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, other.bert.encoder.layer[1].output.dense.weight
    )
    assert student.config.num_labels == 3
    assert student(**batch()).logits.shape == (2, 3)
    tiny_classifier(layers=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a student of 4 layers: the model .* has only 3"):
        build_student(teacher, 4, "pretrained", pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 8}, r"init = 'mapped' copies weights.*use init: random"),
        ({"init": "random", "attention_heads": 3}, r"attention_heads = 3: must divide hidden_size = 16"),
        ({"init": "pretrained"}, "name the model in pretrained"),
        ({"layers": 0}, "layers = 0: a student needs at least 1"),
        ({"init": "magic"}, "allowed are 'mapped', 'first', 'pretrained', 'random'"),
    ],
)
def test_students_that_cannot_be_built(options, message):
    with pytest.raises(ConfigError, match=message):
        build_student(tiny_classifier(), **{"layers": 2, **options})


def test_projections_bring_the_students_width_to_the_teachers():
    student = EncoderStudent(tiny_classifier(layers=2, width=8), widths={"hidden": 16})
    out = student(batch(), {"hidden"})
    assert [tuple(h.shape) for h in out.hidden] == [(2, 7, 16)] * 2
    bare = student.student(**batch(), output_hidden_states=True)
    torch.testing.assert_close(out.hidden[1], bare.hidden_states[2] @ student.projections["hidden"][1].weight.T)
    # Without hidden states they still belong to the graph, with gradient 0.
    student(batch()).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.projections.parameters())
    assert not EncoderStudent(tiny_classifier(layers=2), widths={"hidden": 16}).projections


def test_head_slices_must_divide_the_teachers_width():
    check_head_slices(4, 16, "student")
    with pytest.raises(ConfigError, match="student's 3 heads, and the teacher's width 16"):
        check_head_slices(3, 16, "student")


def test_the_digest_knows_every_weight():
    model = tiny_classifier()
    before = weights_digest(model)
    assert weights_digest(tiny_classifier()) == before
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert weights_digest(model) != before


def test_bilstm_is_saved_and_loaded_as_any_classifier(tmp_path):
    model = bilstm(num_hidden_layers=2, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits)
    assert loaded(**batch()).logits.abs().min() > 1e-3
    assert loaded(**batch()).logits.shape == (2, 3)


@pytest.mark.slow
def test_a_saved_bilstm_loads_where_rlkd_is_not(tmp_path):
    model = bilstm().eval()
    model.save_pretrained(tmp_path / "model")
    inputs = batch()
    torch.save((inputs["input_ids"], model(**inputs).logits), tmp_path / "expected")
    script = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True).eval()
ids, logits = torch.load("expected")
assert torch.allclose(model(ids, attention_mask=(ids != 0).long()).logits, logits, atol=1e-6)
assert "rlkd" not in sys.modules
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_bilstm_does_not_see_padding_and_reads_both_directions():
    model, inputs = bilstm(num_hidden_layers=2), batch()
    short = {name: tensor[1:, :5] for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**short).logits, model(**inputs).logits[1:])
    for position in (0, 6):
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, position] = 3 + (changed["input_ids"][0, position] - 2) % 20
        assert not torch.equal(model(**changed).logits[0], model(**inputs).logits[0])
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert [s.shape[-1] for s in states] == [8, 12, 12]
    assert width_of(model.config) == 12
    labels = torch.tensor([0, 1])
    assert model(**inputs, labels=labels).loss == torch.nn.functional.cross_entropy(model(**inputs).logits, labels)


def test_a_saved_model_does_not_name_the_recording(tmp_path):
    model = tiny_classifier()
    prepare_attention(model, "student")
    assert model.config._attn_implementation == RECORDED_SDPA
    model.save_pretrained(tmp_path)
    assert RECORDED_SDPA not in (tmp_path / "config.json").read_text()
