"""The recipe on tagged words: from a file to a table and a page; killed and continued; what is refused before weights
load.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from rlkd import (
    TRAINING_JOBS,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    prepare_encoders,
)
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.evaluation.entities import entity_f1
from rlkd.report.page import report
from rlkd.report.reading import read_arms
from tiny import TAGS, classifier_tokenizer, first_tokens, save_pretrained, tagged_rows, tiny_classifier, tiny_tagger

TOKENS = "token_classification"


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", load)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(folder, name="train", n=24, seed=0, names=True, without=(3,)):
    data = tagged_rows(n, seed)
    rows = [{"tokens": row["words"], "ner_tags": [TAGS[k] if names else k for k in row["label"]]} for row in data]
    for i in without:
        rows[i]["ner_tags"] = None
    return write(folder / f"{name}.jsonl", rows)


def settings(folder, teacher, data, *, finetuned=False, student=None, **training):
    return (
        LabelledDataArguments(**{"problem_type": TOKENS, "text_column": "tokens", "label_column": "ner_tags", **data}),
        EncoderTeacherArguments(teacher=str(teacher), teacher_finetuned=finetuned, teacher_epochs=1),
        EncoderStudentArguments(student_layers=2, **student or {}),
        TKDArguments(
            str(folder / "out"), use_cpu=True, report_to="none", disable_tqdm=True, max_length=8,
            learning_rate=3e-3, **{"preset": "kd", "max_steps": 2, **training},
        ),
    )  # fmt: skip


def encoder(folder, model=None):
    return save_pretrained(folder / "encoder", model or tiny_classifier(), classifier_tokenizer())


def tagged_by(folder, rows):
    """The tags of each row by transformers alone: the largest logit at first tokens, O beyond the longest text."""
    model, found = AutoModelForTokenClassification.from_pretrained(folder).eval(), []
    for row in rows:
        inputs = classifier_tokenizer()(" ".join(row["words"]), truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1).tolist()
        names = model.config.id2label
        found.append([names[best[k]] if k is not None else "O" for k in first_tokens(row, 8)])
    return found


@pytest.mark.slow
def test_a_file_of_tagged_words_becomes_a_small_tagger(tmp_path, capsys):
    data = {"train_file": table(tmp_path), "test_files": [table(tmp_path, "news", 8, seed=5, without=())]}
    given = settings(tmp_path, encoder(tmp_path), data, student={"assistant_layers": [3]}, preset="minilm")
    TRAINING_JOBS["tkd"].run(*given)
    screen, out = capsys.readouterr().out, tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert "3 tags of 2 types of entities: V, Z; 105 words, and 1 of 24 rows without tags" in screen
    assert "each type of entity" in screen
    assert "an entity is several words" in screen
    assert f"student: {out} (AutoModelForTokenClassification)" in screen.replace("\n", "")
    setup = prepare_encoders(*given)
    assert summary["labels"] == ["B-V", "B-Z", "O"]
    for split, rows in setup.data.held_out.items():
        true = [[summary["labels"][k] for k in row["label"]] for row in rows]
        cut = sum(place is None for row in rows for place in first_tokens(row, 8))
        for role, folder in (("teacher", out / "teacher"), ("student", out)):
            found = tagged_by(folder, rows)
            scores = summary[role]["scores"][split]
            assert scores["entity_f1"] == scores["score"] == pytest.approx(entity_f1(found, true))
            words = [pair for one in zip(found, true, strict=True) for pair in zip(*one, strict=True)]
            assert scores["token_accuracy"] == pytest.approx(sum(a == b for a, b in words) / len(words))
            assert [c["label"] for c in summary[role]["classes"][split]] == ["V", "Z"]
            assert summary[role]["unread"][split] == {"unread": cut, "words": len(words)}
        assert f"{split}, student: {cut} of {len(words)} words are not read" in screen.replace("\n", " ")
        assert summary["majority"]["scores"][split]["token_accuracy"] == pytest.approx(
            sum(tag == "O" for row in true for tag in row) / len(words)
        )
    for folder in ("teacher", "assistant-1", "."):
        assert AutoConfig.from_pretrained(out / folder).architectures == ["BertForTokenClassification"]
    page = report(read_arms(out), "words")
    assert "entity_f1" in page
    assert "Each label" in page


def test_a_fine_tuned_teacher_tags_words_without_tags(tmp_path, no_weights, capsys):
    """Of all training rows; its tags are those of the file, by name or by number."""
    teacher = encoder(tmp_path, tiny_tagger())
    plain = write(tmp_path / "plain.jsonl", [{"tokens": ["a", "b"], "ner_tags": None}] * 5)
    dev = table(tmp_path, "dev", 6, names=False, without=())
    given = settings(tmp_path, teacher, {"train_file": plain, "dev_file": dev}, finetuned=True)
    setup = prepare_encoders(*given)
    assert setup.data.labels == TAGS
    assert [row["label"] for row in setup.data.first_dev] == [row["label"] for row in tagged_rows(6)]
    assert "5 of 5 rows without tags" in capsys.readouterr().out
    assert all(row["label"] is None for row in setup.data.train)
    with pytest.raises(DataError, match="has no label in its 5 rows"):
        prepare_encoders(*settings(tmp_path, teacher, {"train_file": plain, "dev_file": dev, "labels": list(TAGS)}))


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({}, {"preset": "tkd"}, "the term pt starts from one vector"),
        ({"text_column": "words"}, {}, "Found|found"),
        ({"names": False}, {}, "'0' is no tag of an entity.*set labels to their names in order"),
        ({"labels": ["O", "PER"]}, {}, "'PER' is no tag of an entity"),
        ({"labels": ["O", "B-V"]}, {}, "labels not in the label set: 'B-Z'"),
        ({"pair_column": "x"}, {}, "pair_column is set, and problem_type is token_classification"),
        ({"metrics": ["accuracy"]}, {}, "metrics: accuracy: under problem_type token_classification, entity_f1"),
        ({"problem_type": None}, {}, "not one label, and this is single-label"),
    ],
)
def test_settings_and_files_that_do_not_fit(tmp_path, no_weights, data, training, message):
    path = table(tmp_path, names=data.pop("names", True))
    with pytest.raises((ConfigError, DataError), match=message):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path), {"train_file": path, **data}, **training))


def test_numbers_have_the_names_that_are_given(tmp_path, no_weights):
    data = {"train_file": table(tmp_path, names=False), "labels": list(TAGS), "metrics": ["token_accuracy"]}
    setup = prepare_encoders(*settings(tmp_path, encoder(tmp_path), data))
    rows = [row for part in (setup.data.train, setup.data.first_dev) for row in part]
    assert sorted(map(str, (row["label"] for row in rows))) == sorted(
        str(None if i == 3 else row["label"]) for i, row in enumerate(tagged_rows(24))
    )
    assert setup.teacher_config.id2label == dict(enumerate(TAGS))


def test_teachers_that_do_not_tag_words(tmp_path, no_weights):
    path = table(tmp_path)
    with pytest.raises(ModelError, match="is a BertForSequenceClassification, not a fine-tuned classifier of words"):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path), {"train_file": path}, finetuned=True))
    numbered = tiny_tagger(tags=("LABEL_0", "LABEL_1"))
    with pytest.raises(ModelError, match="does not name the tags of words"):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path, numbered), {"train_file": path}, finetuned=True))
    texts = write(tmp_path / "texts.jsonl", [{"tokens": "a b", "ner_tags": k % 2} for k in range(20)])
    data = {"train_file": texts, "problem_type": None}
    with pytest.raises(ModelError, match=r"is a BertForTokenClassification, not a fine-tuned classifier\. Leave"):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path, tiny_tagger()), data, finetuned=True))


def test_a_tokenizer_without_word_ids_is_refused(tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ModelError, match="its tokenizer does not tell which word a token is of"):
        prepare_encoders(*settings(tmp_path, encoder(tmp_path), {"train_file": table(tmp_path)}))


@pytest.mark.slow
def test_a_chain_killed_twice_gives_the_same_student(tmp_path, monkeypatch):
    """In the fine-tuning of the teacher, and in the student's training."""
    data = {"train_file": table(tmp_path), "dev_file": table(tmp_path, "dev", 8, seed=2, without=())}
    teacher, options = encoder(tmp_path), {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3,
                                           "eval_strategy": "steps", "resume_from_checkpoint": "auto"}  # fmt: skip

    def given(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return settings(folder, teacher, data, **options)

    TRAINING_JOBS["tkd"].run(*given("straight"))
    from rlkd.trainers.encoders.tkd import TKDTrainer

    step = TKDTrainer.training_step
    for kill in (2, 5):  # the teacher takes 3 steps
        seen = []

        def killed(self, *args, seen=seen, kill=kill, **kwargs):
            seen.append(1)
            if len(seen) == kill:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TKDTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            TRAINING_JOBS["tkd"].run(*given("killed"))
    monkeypatch.setattr(TKDTrainer, "training_step", step)
    TRAINING_JOBS["tkd"].run(*given("killed"))
    one, other = (
        AutoModelForTokenClassification.from_pretrained(Path(tmp_path / name / "out")).state_dict()
        for name in ("straight", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
