"""The model card of a saved student: it describes the run, and hostile names remain text."""

import re
import sys

import yaml
from huggingface_hub import ModelCard
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from transformers.pipelines import SUPPORTED_TASKS

from rlkd.runs.card import card
from tiny_runs import examples, logged, make


def test_every_trainer_writes_a_card_beside_the_student(tmp_path):
    for kind, options in (("ppo", {"lam": 0.3}), ("reinforce", {}), ("supervised", {})):
        trainer = make(kind, tmp_path / kind, max_steps=2, eval_examples=examples(6), eval_limit=5, seed=7, **options)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        read = ModelCard.load(tmp_path / kind / "README.md")
        assert read.data.library_name == "transformers"
        assert read.data.pipeline_tag in SUPPORTED_TASKS
        assert kind in read.data.tags
        assert "One run (5 held-out rows, seed 7)" in read.text
        regret = logged(tmp_path / kind)[-1]["eval_regret"]
        assert f"| regret | nats per answer | down | {regret:.4g} |" in read.text
        assert "seconds" not in read.text.split("## Training")[0]
        assert ("reward and credit: reward_value max" in read.text) == (kind != "supervised")
        assert "| train | made in memory | 8 |" in read.text
        assert "# A student distilled from a teacher made in memory" in read.text
    assert "lam 0.3," in ModelCard.load(tmp_path / "ppo" / "README.md").text


def test_the_card_of_a_classifier(tmp_path):
    trainer = make_tkd(tmp_path, preset="kd", dev=labelled_rows(4))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.pipeline_tag == "text-classification"
    assert "4 held-out rows" in read.text
    assert f"| accuracy | share of rows | up | {logged(tmp_path)[-1]['eval_accuracy']:.4g} |" in read.text
    assert "loss: preset kd" in read.text
    assert not re.search("second|runtime|epoch", read.text.split("## Training")[0])


def test_a_student_saved_before_training_has_a_card_without_numbers(tmp_path):
    make("reinforce", tmp_path).save_model()
    text = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in text
    assert "for 0 steps" in text


def test_no_secret_and_no_path_of_this_machine_reaches_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/train.py", "--hub_token", "hf_" + "x" * 30])
    trainer = make("supervised", tmp_path, max_steps=1, hub_token="hf_" + "y" * 30)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "hf_x" not in text
    assert "hf_y" not in text
    assert "someone" not in text
    assert str(tmp_path.parent) not in text
    assert "command: train.py --hub_token" in text


def record(**more):
    return {
        "rlkd": "0", "trainer": "PPOTrainer", "models": {"teacher": "org/big", "student": "org/small"}, "settings": {},
        "data": {"train": {"source": "org/data", "rows": 3, "fingerprint": "ab"}}, **more,
    }  # fmt: skip


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_hub_names_are_in_the_metadata():
    text = card(record(), architecture="T5ForConditionalGeneration", scores={"eval_regret": 1.5}, rows=9, step=4)
    found = metadata(text)
    assert (found["base_model"], found["datasets"]) == ("org/small", ["org/data"])
    local = record(models={"teacher": None, "student": "/a/b/student"})
    text = card(local, architecture="T5ForConditionalGeneration", scores={}, rows=None, step=0)
    assert "base_model" not in metadata(text)
    assert "# student distilled from a teacher made in memory" in text
    alone = record(models={"student": "org/small"})
    text = card(alone, architecture="T5ForConditionalGeneration", scores={}, rows=None, step=0)
    assert "# org/small trained without a teacher" in text


def test_names_cannot_break_out_of_the_card():
    hostile = "a|b\n---\nlicense: mit\n<script>x</script>```"
    text = card(
        record(templates=[{"name": hostile}], settings={"preset": hostile}, command=[hostile]),
        architecture="T5ForConditionalGeneration", scores={"eval_regret": 1.0}, rows=1, step=1,
    )  # fmt: skip
    assert "license" not in metadata(text)
    prose = text.split("```yaml")[0]
    assert "<script>" not in prose
    assert text.count("```") == 4
