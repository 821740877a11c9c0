"""Terms of the loss beyond TKD: each against the models' own modules, cached and resumed, in every usual family."""

import pytest
import torch
from encoder_families import tiny_config
from test_tkd import make, one_batch, rows
from torch.nn.functional import mse_loss, normalize, relu
from transformers import AutoModelForSequenceClassification

from rlkd.data.labelled import model_inputs
from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.classifiers import build_student
from rlkd.objectives.neighbours import minilm_relation
from rlkd.trainers.encoders.arguments import TKDArguments
from rlkd.trainers.encoders.terms import PRESETS, TERMS
from tiny import tiny_classifier
from tiny_runs import assert_same, logged, weights

NEW = ("tinybert", "minilm", "nst", "boundaries", "derivatives")


def only(folder, term, **settings):
    """A trainer whose loss is one term, and four rows of equal length: no padding, which has tests of its own."""
    same = [{"text": text, "label": 1} for text in ("a b c d", "d c b x", "x y z a", "e f a g")]
    return make(folder, preset="custom", terms={term: 1.0}, train=same, **settings)


def layers(model, inputs):
    """(input, layer, output) of each layer of a BERT, from its own hidden states."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return list(zip(states[:-1], model.bert.encoder.layer, states[1:], strict=True))


def matched(trainer, inputs):
    """Pairs of layers of student and teacher, as the default map has them: 1 with 2, 2 with 4."""
    student, teacher = layers(trainer.trained.student, inputs), layers(trainer.teacher, inputs)
    return [(student[0], teacher[1]), (student[1], teacher[3])]


def projected(layer, name, hidden, heads=2):
    """Queries, keys or values [B, H, L, d]."""
    return getattr(layer.attention.self, name)(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)


def scores(before, layer, _):
    query, key = (projected(layer, name, before) for name in ("query", "key"))
    return query @ key.transpose(2, 3) / query.shape[-1] ** 0.5


def neurons(before, layer, _):
    return layer.intermediate.dense(layer.attention(before)[0])


def relations_of(trainer, inputs):
    last = [layers(model, inputs)[-1] for model in (trainer.trained.student, trainer.teacher)]
    mask = inputs["attention_mask"].bool()
    total = 0
    for name in ("query", "key", "value"):
        own, theirs = (getattr(layer.attention.self, name)(before) for before, layer, _ in last)
        total = total + minilm_relation(own, theirs, mask, 4)
    return total


ORACLES = {
    "embedding": lambda t, x: mse_loss(layers(t.trained.student, x)[0][0], layers(t.teacher, x)[0][0]),
    "hidden": lambda t, x: sum(mse_loss(own[2], theirs[2]) for own, theirs in matched(t, x)),
    "attention": lambda t, x: sum(mse_loss(scores(*own), scores(*theirs)) for own, theirs in matched(t, x)),
    "relations": relations_of,
    "boundaries": lambda t, x: sum(
        relu(1 - neurons(*theirs).sign() * neurons(*own)).square().mean() for own, theirs in matched(t, x)
    ),
}  # fmt: skip


def test_relations_are_those_of_the_last_matched_layer(tmp_path):
    """MiniLMv2 takes a layer below the last of a large teacher: the end of `layer_map`."""
    trainer = only(tmp_path, "relations", model=build_student(tiny_classifier(seed=3), 2), layer_map=[1, 3])
    batch = one_batch(trainer)
    inputs = model_inputs(batch)
    own, theirs = layers(trainer.trained.student, inputs)[1], layers(trainer.teacher, inputs)[2]
    names, mask = ("query", "key", "value"), inputs["attention_mask"].bool()
    vectors = [[getattr(one[1].attention.self, name)(one[0]) for name in names] for one in (own, theirs)]
    expected = sum(minilm_relation(s, t, mask, 2) for s, t in zip(*vectors, strict=True))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("term", ORACLES)
def test_a_term_is_its_formula_on_the_models_own_modules(tmp_path, term):
    options = {"relation_heads": 4} if term == "relations" else {}
    trainer = only(tmp_path, term, model=build_student(tiny_classifier(seed=3), 2), **options)
    batch = one_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    expected = ORACLES[term](trainer, model_inputs(batch))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert loss > 0
    # The student learns from it, also where the recorded tensors are the only way to the gradient.
    own = [p for p in trainer.trained.student.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(value, own, allow_unused=True) for value in (loss, expected))
    assert any(gradient is not None and gradient.any() for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None  # of a head that no term reads, 0
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_input_gradients_are_those_of_the_models_by_finite_differences(tmp_path):
    """The term, and its own gradient (the second derivative) by one of the student's weights."""
    trainer = only(tmp_path, "gradient", model=build_student(tiny_classifier(seed=3), 2).double())
    trainer.teacher.double()
    batch = one_batch(trainer)
    inputs = model_inputs(batch)

    def gradients(model, label=None):
        words = model.get_input_embeddings()(inputs["input_ids"]).detach()
        rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
        label = model(**inputs).logits.argmax(-1) if label is None else label
        moved = words.clone().requires_grad_()
        model(inputs_embeds=moved, **rest).logits.gather(1, label[:, None]).sum().backward()
        return normalize(moved.grad.flatten(1), dim=-1), label

    theirs, label = gradients(trainer.teacher)

    def value():
        own, _ = gradients(trainer.trained.student, label)
        return (own - theirs).square().sum(-1).mean()

    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.double(), value(), atol=1e-6, rtol=1e-5)
    weight = trainer.trained.student.bert.encoder.layer[1].attention.self.query.weight
    trainer.model.zero_grad()
    loss.backward()
    found, step = weight.grad[3, 5].item(), 1e-5
    with torch.no_grad():
        weight[3, 5] += step
    above = value()
    with torch.no_grad():
        weight[3, 5] -= 2 * step
    assert found == pytest.approx(((above - value()) / (2 * step)).item(), rel=1e-2)


def test_checkpointed_layers_give_the_same_gradients(tmp_path):
    """Their recorded tensors are computed again in the backward pass."""
    found = []
    for checkpointing in (False, True):
        trainer = make(tmp_path, preset="custom", terms={"attention": 1, "relations": 1, "boundaries": 1})
        if checkpointing:
            trainer.trained.gradient_checkpointing_enable()
        trainer.model.train()
        trainer.compute_loss(trainer.model, one_batch(trainer)).backward()
        parameters = trainer.trained.student.named_parameters()
        found.append({name: p.grad for name, p in parameters if p.grad is not None and p.grad.any()})
    assert found[0].keys() == found[1].keys()
    assert any("key" in name for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], msg=name)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("preset", NEW)
def test_the_cache_keeps_just_what_is_needed_and_changes_nothing(tmp_path, preset, narrow):
    if narrow and preset == "derivatives":
        return
    values = []
    for cache in ("none", "needed"):
        torch.manual_seed(0)
        teacher = tiny_classifier()
        sizes = {"hidden_size": 8, "intermediate_size": 20} if narrow else {}
        model = build_student(teacher, 2, "random" if narrow else "mapped", **sizes)
        trainer = make(
            tmp_path / cache, preset=preset, teacher=teacher, model=model, teacher_cache=cache, train=rows(13),
            per_device_eval_batch_size=5,
        )  # fmt: skip
        trainer.open_teacher_cache()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in (3, 0, 12)])
        if cache == "needed":
            trainer.teacher.forward = None
        trainer.compute_loss(trainer.model, batch)
        inner = {name: TERMS[name] for name in PRESETS[preset]}
        student = trainer.model(model_inputs(batch), trainer.args.student_needs)
        asked = trainer.batch(batch, student, trainer.teacher_outputs(batch, trainer.args.teacher_needs))
        values.append({name: term.loss(asked).item() for name, term in inner.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-7)
    (kept,) = (tmp_path / "needed" / "teacher_cache").iterdir()
    files = {path.stem for path in kept.glob("*.npy")} - {"offsets"}
    assert files == set(trainer.args.teacher_needs)


def test_a_cache_cannot_hold_scores_that_depend_on_more(tmp_path):
    config = tiny_config("modernbert", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=3, local_attention=4)
    config.vocab_size = 30
    teacher = AutoModelForSequenceClassification.from_config(config)
    model = build_student(teacher, 2, "first")
    trainer = make(tmp_path, preset="tinybert", teacher=teacher, model=model, teacher_cache="needed", layer_map=[1, 2])
    with pytest.raises(ModelError, match=r"depend on more than queries and keys .*Set teacher_cache to none"):
        trainer.open_teacher_cache()


@pytest.mark.parametrize("preset", ["tinybert", "boundaries"])
def test_a_resumed_run_is_the_same_run_with_its_projections(tmp_path, preset):
    def run(folder):
        torch.manual_seed(0)
        teacher = tiny_classifier(dropout=0.1)
        model = build_student(teacher, 2, "random", hidden_size=8, intermediate_size=20)
        return make(folder, model=model, teacher=teacher, preset=preset, max_steps=4, save_strategy="steps",
                    save_steps=2, auto_scale=True)  # fmt: skip

    straight, resumed = run(tmp_path / "one"), run(tmp_path / "two")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    parts = {"hidden", "embeddings"} if preset == "tinybert" else {"neurons"}
    assert set(resumed.trained.projections) == parts
    assert_same(weights(straight.trained), weights(resumed.trained))


def family(name):
    """A tiny random model of a family; its sdpa or eager attention is found by the trainer."""
    more = {"modernbert": {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 3}}
    more["deberta-v2"] = {
        "attention_probs_dropout_prob": 0.0,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    }
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(name, **more.get(name, {})))


# What a family does not have, and the words that say so.
WITHOUT = {
    ("modernbert", "boundaries"): "plain feed-forward networks",
    ("deberta-v2", "minilm"): "not the queries, keys and values",
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*NEW, "tkd"])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "albert", "xlm-roberta", "modernbert", "deberta-v2"]
)
def test_presets_train_in_the_families_of_today(tmp_path, name, preset):
    teacher = family(name)
    student = build_student(teacher, 2, "random")
    options = {"teacher": teacher, "model": student, "preset": preset, "max_steps": 20, "learning_rate": 3e-3}
    if message := WITHOUT.get((name, preset)):
        with pytest.raises(ModelError, match=message):
            make(tmp_path, **options)
        return
    trainer = make(tmp_path, **options)

    def loss():
        trainer.model.eval()
        return trainer.compute_loss(trainer.model, one_batch(trainer, 12)).item()

    before = loss()
    trainer.train()
    assert loss() < before
    assert len([row for row in logged(tmp_path) if "loss" in row and set(PRESETS[preset]) <= row.keys()]) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "custom"}, "'custom' needs terms, e.g. "),
        ({"terms": {"gramm": 1}}, "terms = 'gramm': allowed are .*Did you mean 'gram'"),
        ({"terms": {"gram": -1}}, "terms: gram = -1: must be a number, at least 0"),
        ({"terms": {"gram": "much"}}, "terms: gram = 'much': must be a number"),
        ({"terms": {"gram": True}}, "terms: gram = True: must be a number"),
        ({"terms": "gram"}, "must be a mapping such as"),
        ({"terms": "[1]"}, "must be a mapping such as"),
        ({"preset": "kd", "terms": {"kd": 2}}, "kd is in preset 'kd', where w_kd is its weight"),
        ({"relation_heads": 4}, "relation_heads = 4: has no effect without the term relations"),
        ({"preset": "kd", "noise_probability": 0.1}, "noise_probability = 0.1: has no effect without the term noisy"),
        ({"preset": "derivatives", "gradient_checkpointing": True}, "cannot be differentiated twice"),
        ({"preset": "tinybert", "teacher_cache": "hidden"}, "preset 'tinybert' needs 'needed', or none"),
        ({"preset": "t-s-tkd", "teacher_cache": "needed"}, "grows a tree in the teacher's attention"),
        ({"preset": "minilm", "relation_heads": 3}, "relation_heads = 3: must divide the student's width 16"),
    ],
)  # fmt: skip
def test_terms_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **settings)


def test_models_that_terms_cannot_compare(tmp_path):
    torch.manual_seed(0)
    other = tiny_classifier(layers=2, width=8, heads=4)
    with pytest.raises(ConfigError, match=r"4 attention heads \(student\) and 2 \(teacher\)"):
        make(tmp_path, preset="tinybert", model=other)
    make(tmp_path, preset="minilm", model=other)  # relations do not mind
    with pytest.raises(ConfigError, match=r"word embeddings of width 8 \(student\) and 16 \(teacher\)"):
        make(tmp_path, preset="derivatives", model=other)
    bilstm = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=30))
    with pytest.raises(ModelError, match="'rlkd_bilstm' model without attention heads"):
        make(tmp_path, preset="minilm", model=bilstm)
    albert = family("albert")
    with pytest.raises(ModelError, match=r"layer_map = \[1, 4\]: the layers of a 'albert' model share their weights"):
        build_student(albert, 2, layer_map=[1, 4])


def test_all_terms_in_bf16_stay_close(tmp_path):
    """Scores, relations and gradients are computed in float32 from what bfloat16 layers give."""
    named = {name: 1.0 for name, term in TERMS.items() if not term.late and name != "noisy"}
    values = []
    for bf16 in (False, True):
        trainer = make(tmp_path / str(bf16), preset="custom", terms=named, max_steps=1, bf16=bf16, seed=3,
                       model=build_student(tiny_classifier(seed=3), 2))  # fmt: skip
        trainer.train()
        values.append(next(row for row in logged(tmp_path / str(bf16)) if "loss" in row))
    for name in named:
        assert values[1][name] == pytest.approx(values[0][name], rel=0.1, abs=1e-3), name


def test_a_head_that_does_not_learn_is_named(tmp_path, caplog):
    """It has a gradient of 0 nevertheless, as DistributedDataParallel requires of every parameter."""
    trainer = make(tmp_path, preset="custom", terms={"relations": 1.0, "hidden": 1.0})
    assert "reads the logits: the classification head does not learn" in caplog.text
    trainer.compute_loss(trainer.model, one_batch(trainer)).backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert not trainer.trained.student.classifier.weight.grad.any()


def test_terms_come_from_flags_and_add_to_a_preset(tmp_path):
    args = TKDArguments(str(tmp_path), preset="kd", w_ce=0.0, terms='{"gram": 10, "mse": 0.5, "pt": 0}', report_to=[])
    assert args.weights == {"kd": 0.5, "gram": 10.0, "mse": 0.5}
    assert (args.teacher_needs, args.student_needs) == ({"logits", "hidden"}, {"hidden"})
    assert TKDArguments(str(tmp_path), preset="tinybert", terms={"hidden": 0}, report_to=[]).weights == {
        "kd": 0.5, "embedding": 1.0, "attention": 1.0,
    }  # fmt: skip
