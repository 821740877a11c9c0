"""A chain of teacher assistants: each teaches the next, and killed and continued it gives the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlkd import (
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    TKDTrainer,
    compare_with_teacher,
    prepare_encoders,
    teacher_of_student,
)
from rlkd.errors import ConfigError
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

ROWS = [{"text": f"{a} {b} {c}", "label": ("no", "yes")[a < "e"]} for a in "abcdefgh" for b in "xy" for c in "ij"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    model = tiny_classifier(dropout=0.1, layers=4)
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return save_pretrained(tmp_path / "teacher", model, classifier_tokenizer())


def prepared(folder: Path, teacher, *, layers=1, assistants=(3, 2), **training):
    student = EncoderStudentArguments(student_layers=layers, assistant_layers=list(assistants))
    settings = {"preset": "tkd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_length": 16,
                "learning_rate": 1e-3, "auto_scale": True, "use_cpu": True, "report_to": "none",
                "disable_tqdm": True}  # fmt: skip
    return prepare_encoders(
        LabelledDataArguments(train_file=str(Path(teacher).parent / "rows.jsonl"), dev_fraction=0.25),
        EncoderTeacherArguments(teacher=str(teacher), teacher_finetuned=True),
        student,
        TKDArguments(str(folder), **settings | training),
    )


def run(folder: Path, teacher, **options):
    """What the recipe does."""
    setup = prepared(folder, teacher, **options)
    above = teacher_of_student(setup)
    trainer = TKDTrainer(setup.new_student(above), setup.training, teacher=above, **setup.trainer_inputs())
    trainer.run(setup.settings)
    return setup


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


class KilledError(Exception):
    pass


def killing(monkeypatch, layers, after):
    """Kill the training of the student of so many layers after some steps."""
    step, taken = TKDTrainer.training_step, []

    def training_step(self, *args, **options):
        if self.trained.config.num_hidden_layers == layers:
            if len(taken) == after:
                raise KilledError
            taken.append(1)
        return step(self, *args, **options)

    monkeypatch.setattr(TKDTrainer, "training_step", training_step)


@pytest.mark.slow
def test_a_chain_killed_twice_gives_the_same_weights(tmp_path, teacher, monkeypatch):
    taught = []
    asked = TKDTrainer.__init__

    def noted(self, student, args, *, teacher, **options):
        taught.append((teacher.config.num_hidden_layers, student.config.num_hidden_layers))
        asked(self, student, args, teacher=teacher, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TKDTrainer, "__init__", noted)
        setup = run(tmp_path / "one", teacher)
    assert taught == [(4, 3), (3, 2), (2, 1)]
    for layers, after in ((3, 3), (2, 3)):  # each after the checkpoint of step 2
        with monkeypatch.context() as patch:
            killing(patch, layers, after)
            with pytest.raises(KilledError):
                run(tmp_path / "two", teacher)
    done = (tmp_path / "two" / "assistant-1" / "model.safetensors").stat().st_mtime_ns
    run(tmp_path / "two", teacher)
    assert (tmp_path / "two" / "assistant-1" / "model.safetensors").stat().st_mtime_ns == done
    for name in ("assistant-1", "assistant-2", "."):
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    summary = compare_with_teacher(setup)
    assert summary["assistants"] == [f"{tmp_path}/one/assistant-{k}" for k in (1, 2)]
    assert (summary["teacher"]["layers"], summary["student"]["layers"]) == (4, 1)
    with pytest.raises(ConfigError, match=r"assistant-1 was trained with training \{.*remove that folder"):
        run(tmp_path / "two", teacher, temperature=2.0, resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"),
            allow_config_change=True)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistants": (2, 3)}, r"assistant_layers = \[2, 3\]: each assistant, and then the student of 1 layers"),
        ({"assistants": (3, 2), "layers": 2}, "must have fewer layers than the one before"),
        ({"assistants": (5,)}, r"5 layers, more than its teacher \(4\)"),
        ({"assistants": (3,), "layer_map": [4]}, "layer_map is set beside assistant_layers"),
    ],
)
def test_chains_that_cannot_be(tmp_path, teacher, monkeypatch, options, message):
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path / "out", teacher, **options)
