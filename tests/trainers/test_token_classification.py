"""Students that tag words: learned as transformers' own models learn them, word by word from a teacher; resumed
exactly; saved as what they are.
"""

import json
import shutil

import pytest
import torch
from test_tkd import make, one_batch
from transformers import AutoConfig, AutoModelForTokenClassification, pipeline

from rlkd.data.labelled import model_inputs
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.encoders.bilstm import BiLSTMConfig
from rlkd.models.encoders.classifiers import build_student
from rlkd.models.encoders.labels import auto_class, check_problem, give_labels, problem_of
from rlkd.models.encoders.onnx_export import export_onnx
from rlkd.models.encoders.rehearsal import rehearse
from rlkd.trainers.encoders.terms import PRESETS, TERMS
from tiny import CLASSIFIER_WORDS, TAGS, classifier_tokenizer, first_tokens, save_pretrained, tiny_classifier
from tiny import tagged_rows as rows
from tiny import tiny_tagger as tagger
from tiny_runs import assert_same, logged, weights

LETTERS = CLASSIFIER_WORDS[4:]
ALLOWED = [name for name in PRESETS if name != "custom" and not any(TERMS[t].of_text for t in PRESETS[name])]


def trainer(folder, family="bert", **options):
    return make(folder, **{"train": rows(), "teacher": tagger(family), "preset": "kd", **options})


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_fine_tuning_has_the_loss_and_the_gradient_of_transformers(tmp_path, family):
    model, data = tagger(family), rows(6)
    data[2]["label"] = None
    labelled = [row for row in data if row["label"] is not None]
    tuned = make(tmp_path, model=model, teacher=None, preset="ft", train=data)
    batch = one_batch(tuned)
    tuned.compute_loss(tuned.model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    labels = torch.full(batch["input_ids"].shape, -100)
    for i, row in enumerate(labelled[:4]):
        labels[i, first_tokens(row)] = torch.tensor(row["label"])
    model(**model_inputs(batch), labels=labels).loss.backward()
    assert found
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_distillation_compares_first_tokens_alone(tmp_path):
    """Of every word that is read, in rows with and without tags; by softmax and logarithm, one word at a time."""
    data = rows(4)
    data[1]["label"] = None
    one = trainer(tmp_path, train=data, max_length=7, temperature=2.0, w_ce=0.25, w_kd=0.75)
    batch = one_batch(one)
    loss = one.compute_loss(one.model, batch)
    own, theirs = (m(**model_inputs(batch)).logits for m in (one.trained.student, one.teacher))
    kd, ce = [], []
    for i, row in enumerate(data):
        for k, place in enumerate(first_tokens(row, 7)):
            if place is None:
                continue
            p, q = (z[i, place].div(2.0).softmax(-1) for z in (theirs, own))
            kd.append(4.0 * (p * (p / q).log()).sum())
            if row["label"] is not None:
                ce.append(-own[i, place].softmax(-1)[row["label"][k]].log())
    assert 0 < len(ce) < len(kd) < sum(len(row["words"]) for row in data)
    torch.testing.assert_close(loss, 0.25 * torch.stack(ce).mean() + 0.75 * torch.stack(kd).mean())


def test_words_that_are_not_read_are_said_and_count_as_o(tmp_path, caplog):
    data = [{"words": ["a", "b", "c", "z"], "label": [1, 0, 0, 3]}, {"words": ["e", "f"], "label": [1, 0]}]
    one = trainer(tmp_path, train=data, dev=data, max_length=5)
    assert "train_rows: 1 of 6 words, in 1 of 2 rows, are not read (beyond max_length = 5" in caplog.text
    assert "eval_rows: 1 of 6 words, in 1 of 2 rows, are not read" in caplog.text
    with torch.no_grad():  # a model that sees a Z in everything
        one.trained.student.classifier.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1e3]))
    found = one.evaluate()
    assert [row["predicted"] for row in map(json.loads, (tmp_path / "held_out.jsonl").read_text().splitlines())] == [
        ["B-Z", "B-Z", "B-Z", "O"], ["B-Z", "B-Z"],
    ]  # fmt: skip
    assert (found["eval_entity_recall"], found["eval_token_accuracy"]) == (0, 0)
    with torch.no_grad():
        one.trained.student.classifier.bias.copy_(torch.tensor([1e3, 0.0, 0.0, 0.0]))
    assert one.evaluate()["eval_token_accuracy"] == pytest.approx(3 / 6)


def test_every_term_but_those_of_whole_texts_trains(tmp_path):
    terms = {name: 1.0 for name, term in TERMS.items() if not term.of_text}
    assert {"kd", "mse", "noisy", "all", "embedding", "hidden", "attention", "relations", "gram"} <= terms.keys()
    one = trainer(tmp_path, preset="custom", terms=terms, model=build_student(tagger(seed=1), 2))
    before = weights(one.trained.student)
    one.train()
    step = next(line for line in logged(tmp_path) if "loss" in line)
    assert all(step[name] > 0 for name in terms)
    assert not torch.equal(before["classifier.weight"], weights(one.trained.student)["classifier.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "tkd"}, r"preset = 'tkd': the term pt starts from one vector .*preset: ft, kd, .*or beta: 0"),
        ({"preset": "tkd", "beta": 0.0}, "the term td_student starts from .*or gamma_s: 0"),
        (
            {"preset": "derivatives"},
            r"the term gradient starts from one vector or logit of the whole text.*boundaries\.",
        ),
    ],
)
def test_terms_of_whole_texts_are_refused(tmp_path, options, message):
    assert {"kd", "tinybert", "minilm", "nst", "logit-mse", "noisy-logits"} <= {*ALLOWED}
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **options)
    trainer(tmp_path, preset="all", beta=0.0)


def test_a_teacher_that_is_cached_or_has_another_tokenizer_teaches_the_same(tmp_path):
    teacher, student = tagger(), build_student(tagger(), 2)
    there = trainer(tmp_path / "there", teacher=teacher, model=student)
    expected = there.compute_loss(there.model, one_batch(there, 12))
    cached = trainer(tmp_path / "cached", teacher=teacher, model=student, teacher_cache="logits")
    cached.open_teacher_cache()
    torch.testing.assert_close(cached.compute_loss(cached.model, one_batch(cached, 12)), expected)
    hidden = [trainer(tmp_path / kind, teacher=teacher, model=student, preset="tinybert", teacher_cache=kind)
              for kind in ("none", "needed")]  # fmt: skip
    hidden[1].open_teacher_cache()
    losses = [one.compute_loss(one.model, one_batch(one, 12)) for one in hidden]
    torch.testing.assert_close(*losses)
    # The same letters under other numbers: the teacher's embeddings are moved along.
    order = [*CLASSIFIER_WORDS[:4], *reversed(LETTERS)]
    moved = tagger()
    with torch.no_grad():
        place = [CLASSIFIER_WORDS.index(letter) for letter in order]
        moved.bert.embeddings.word_embeddings.weight.copy_(teacher.bert.embeddings.word_embeddings.weight[place])
    for cache in ("none", "logits"):
        other = trainer(tmp_path / f"other-{cache}", teacher=moved, model=student, other=classifier_tokenizer(order),
                        teacher_cache=cache)  # fmt: skip
        other.open_teacher_cache()
        torch.testing.assert_close(other.compute_loss(other.model, one_batch(other, 12)), expected)


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Killed twice, in two epochs, with rows without tags."""
    data = [{**row, "label": None} if i % 5 == 3 else row for i, row in enumerate(rows())]
    options = {"train": data, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "preset": "minilm", "seed": 5,
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    straight = trainer(tmp_path / "straight", **options)
    straight.train()
    for step in (2, 4):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        source = tmp_path / ("straight" if step == 2 else "from-2") / f"checkpoint-{step}"
        shutil.copytree(source, folder / source.name)
        resumed = trainer(folder, **options)
        resumed.train(resume_from_checkpoint=str(folder / source.name))
        assert_same(weights(straight.trained.student), weights(resumed.trained.student))


def test_the_saved_student_is_a_token_classifier_and_tags_as_it_was_evaluated(tmp_path):
    one = trainer(tmp_path, dev=rows(6, seed=2), learning_rate=3e-3)
    one.run()
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.architectures, tuple(config.id2label.values())) == (["BertForTokenClassification"], TAGS)
    assert problem_of(config) == "token_classification"
    assert_same(weights(AutoModelForTokenClassification.from_pretrained(tmp_path)), weights(one.trained.student))
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    tag = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])
    for row, source in zip([r for r in held_out if r["step"] == 2], rows(6, seed=2), strict=True):
        tokens = tag(row["input"])  # a letter each
        places = [place - 1 for place in first_tokens(source)]
        assert row["predicted"] == [tokens[k]["entity"] for k in places]
        assert row["label"] == [TAGS[k] for k in source["label"]]
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert 'aggregation_strategy="first"' in card


def test_the_projections_of_a_narrower_student_learn_beside_it(tmp_path):
    options = {"hidden_size": 8, "attention_heads": 2, "intermediate_size": 16}
    student = build_student(tagger(), 2, "random", **options)
    assert type(student).__name__ == "BertForTokenClassification"
    one = trainer(tmp_path, model=student, preset="custom", terms={"kd": 1.0, "hidden": 1.0})
    one.train()
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.trained.parameters())


def test_configurations_say_what_a_model_tags():
    config = tagger().config
    give_labels(config, TAGS, "token_classification")
    assert auto_class(config) is AutoModelForTokenClassification
    give_labels(config, ["no", "yes"])
    assert problem_of(config) == "single_label_classification"
    assert rehearse(config, {"layers": 2}).problem_type == "single_label_classification"
    give_labels(config, TAGS, "token_classification")
    assert rehearse(config, {"layers": 2}, needs={"student": {"hidden"}}).architectures == [
        "bertForTokenClassification"
    ]
    with pytest.raises(ModelError, match=r"gives each text a tag for each word .* and one of several labels is wanted"):
        check_problem(config, "teacher", "single_label_classification", "x")
    give_labels(config, ["LABEL_0", "LABEL_1"], "token_classification")
    with pytest.raises(
        ModelError, match=r"id2label in config.json does not name the tags of words: 'LABEL_0' is no tag"
    ):
        check_problem(config, "teacher")
    bilstm = BiLSTMConfig(vocab_size=30)
    give_labels(bilstm, TAGS, "token_classification")
    with pytest.raises(ModelError, match="a 'rlkd_bilstm' model cannot be distilled here"):
        rehearse(bilstm, {"layers": 1})


def test_a_tagger_and_a_classifier_of_texts_are_not_compared(tmp_path):
    with pytest.raises(ModelError, match="the teacher gives each text one of several labels and the student a tag"):
        trainer(tmp_path, teacher=tiny_classifier(labels=4), model=tagger(layers=2))
    with pytest.raises(DataError, match="row 0: words must be a list"):
        trainer(tmp_path, train=[{"text": "a b", "label": [0, 1]}])


@pytest.mark.slow
def test_onnx_of_a_tagger(tmp_path):
    save_pretrained(tmp_path / "model", tagger(), classifier_tokenizer())
    agreement = export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert agreement.same_label == 1.0
    assert problem_of(AutoConfig.from_pretrained(tmp_path / "onnx")) == "token_classification"
