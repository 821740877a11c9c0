"""How the recipes read rows and templates."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from rlkd import (
    DataArguments,
    PPOArguments,
    SupervisedArguments,
    SupervisedTrainer,
    TeacherArguments,
    load_pseudolabels,
    prepare,
)
from rlkd.cli.main import app
from rlkd.errors import ConfigError, DataError
from rlkd.jobs.setup import load_data
from rlkd.settings.trl_compat import ModelConfig
from tiny import VALID, save_pair, tiny_t5
from tiny_runs import labels

TEMPLATES = """dataset: mine
templates:
  1: !Template
    answer_choices: null
    id: '1'
    jinja: "ask {{text}} ||| {{gold}}"
    metadata: &m
      choices_in_prompt: false
      languages: [en]
      metrics: [Other]
      original_task: true
    name: ask
    reference: ''
  2: !Template
    answer_choices: null
    id: '2'
    jinja: "{{text}} of {{label}} ||| {{text}}"
    metadata:
      choices_in_prompt: false
      languages: [en]
      metrics: [Other]
      original_task: false
    name: other task
    reference: ''
"""
ROWS = [{"body": "x" * 3000, "gold": "g", "label": 0}, {"body": "b", "gold": "g", "label": 1}]


@pytest.fixture
def load(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "templates.yaml").write_text(TEMPLATES)

    def load(**options):
        options = {"templates": ["mine"], "templates_dir": str(tmp_path), "column_map": ["body=text"]} | options
        data = DataArguments(
            dataset=str(tmp_path / "rows.jsonl"), input_column="text", reference_column="gold", **options
        )
        return load_data(data)

    return load


def test_columns_are_renamed_in_training_and_evaluation_data(load):
    train, evaluation, labels = load()
    assert (train[1].student_input, train[1].teacher_inputs, train[1].references) == ("b", ("ask b",), ())
    assert evaluation[1].references == ("g",)
    assert labels is None


def test_labels_are_renamed(load):
    train, *_ = load(all_templates=True, gold_input=True, label_map=["0=no,1=yes"])
    assert train[1].teacher_inputs == ("ask b", "b of yes")


def test_templates_of_other_tasks_and_long_fields(load):
    assert [t.name for t in load()[0].templates] == ["ask"]
    assert [t.name for t in load(all_templates=True, gold_input=True)[0].templates] == ["ask", "other task"]
    assert len(load()[0][0].teacher_inputs[0]) == 3004
    assert len(load(truncation="t0")[0][0].teacher_inputs[0]) == 4 + 2048


def test_student_templates_are_found_in_the_same_folder(load):
    assert load(student_template="mine:ask")[0][1].student_input == "ask b"
    with pytest.raises(ConfigError, match="student_template = 'mine' names 2 templates: add one's name"):
        load(student_template="mine", all_templates=True)


def test_what_cannot_be_read_is_named(load):
    with pytest.raises(ConfigError, match="write old=new"):
        load(column_map=["body"])
    with pytest.raises(DataError, match="column_map: there is no column 'bodi'"):
        load(column_map=["bodi=text"])
    with pytest.raises(ConfigError, match="train_limit = 0: must be at least 1"):
        DataArguments(train_limit=0)


def test_what_a_recipe_is_built_from(tmp_path, load):
    """The student as it was saved, or with the seed's adapters; the teacher with the student's tokenizer."""
    teacher, student = save_pair(tmp_path / "models")
    data = DataArguments(
        dataset=str(tmp_path / "rows.jsonl"), input_column="body", reference_column="text", templates=["mine:ask"],
        templates_dir=str(tmp_path), column_map=["gold=text"],
    )  # fmt: skip
    told = TeacherArguments(teacher, teacher_dtype="float32", teacher_append_eos=False, teacher_cache_mb=1)

    def prepared(seed=1, **options):
        training = PPOArguments(str(tmp_path / "run"), use_cpu=True, seed=seed, max_input_tokens=9)
        return prepare(data, told, ModelConfig(student, dtype=None, **options), training)

    setup = prepared()
    saved = tiny_t5(seed=1).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in setup.student.state_dict().items())
    frozen = setup.teacher
    assert (frozen.max_input_tokens, frozen.append_eos, frozen.cache_bytes) == (9, False, 2**20)
    assert (frozen.lm.model.name_or_path, frozen.lm.valid_vocab) == (teacher, VALID)
    assert frozen.tokenizer is setup.tokenizer
    assert setup.train_examples[1].teacher_inputs == ("ask g",)
    assert (setup.train_examples[1].references, setup.eval_examples[1].references) == ((), ("g",))

    lora = {"use_peft": True, "lora_target_modules": ["q", "v"]}
    adapters = [
        next(weight for name, weight in prepared(seed, **lora).student.named_parameters() if "lora_A" in name)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


@pytest.mark.slow
def test_an_adapter_is_the_next_stage(tmp_path, load):
    """Trained further with its own settings, or merged; other settings are named."""
    teacher, student = save_pair(tmp_path / "models")
    data = DataArguments(
        dataset=str(tmp_path / "rows.jsonl"), input_column="body", reference_column="text", templates=["mine:ask"],
        templates_dir=str(tmp_path), column_map=["gold=text"],
    )  # fmt: skip
    lora = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q"]}

    def prepared(model, teacher=teacher, **options):
        told = TeacherArguments(teacher, teacher_dtype="float32")
        training = SupervisedArguments(str(tmp_path / "run"), use_cpu=True, max_steps=1, learning_rate=0.1)
        return prepare(data, told, ModelConfig(model, dtype=None, **options), training), training

    setup, training = prepared(student, **lora)
    assert {module.p for module in setup.student.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    trainer = SupervisedTrainer(setup.student, training, train_dataset=labels(4), **setup.trainer_inputs())
    trainer.run(setup.settings)
    folder, start = training.output_dir, AutoModelForSeq2SeqLM.from_pretrained(student)
    expected = PeftModel.from_pretrained(start, folder)
    assert json.loads(Path(folder, "adapter_config.json").read_text())["lora_dropout"] == 0

    further, _ = prepared(folder, **lora)
    ours, theirs = further.student.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(weight.requires_grad for weight in further.student.parameters())
    merged, expected = prepared(folder)[0].student.state_dict(), expected.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)
    assert not all(torch.equal(merged[name], weight) for name, weight in tiny_t5(seed=1).state_dict().items())
    assert prepared(student, teacher=folder)[0].teacher.lm.model.name_or_path == folder
    with pytest.raises(ConfigError, match=r"settings differ: r 3 \(the adapter has 2\), target_modules \['v'\] \("):
        prepared(folder, **lora | {"lora_r": 3, "lora_target_modules": ["v"]})

    with pytest.raises(ConfigError, match="use_peft: PEFT cannot adapt this student: Target modules"):
        prepared(student, use_peft=True, lora_target_modules=["nothing", "such"])

    args = ["inspect-rewards", "--teacher", teacher, "--student", folder, "--student-before", student, "--json"]
    args += ["--dataset", data.dataset, "--input-column", "gold", "--max-new-tokens", "3"]
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    for engine in ("torch", "ctranslate2"):
        args = ["generate-pseudolabels", "--teacher", folder, "--dataset", data.dataset, "--input-column", "gold"]
        args += ["--out", str(tmp_path / engine), "--max-new-tokens", "3", "--engine", engine]
        assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    (mine, others) = (load_pseudolabels(tmp_path / engine)["label"] for engine in ("torch", "ctranslate2"))
    assert mine == others


def test_a_recipe_without_a_student():
    with pytest.raises(ConfigError, match="model_name_or_path is not set: name the student"):
        prepare(DataArguments(), TeacherArguments(), ModelConfig(), PPOArguments("x", use_cpu=True))
