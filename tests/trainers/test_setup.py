"""How the recipes read rows and templates."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import stub
import tiny_runs
from rlkd import (
    DataArguments,
    Example,
    PPOArguments,
    SupervisedArguments,
    SupervisedTrainer,
    TeacherArguments,
    generate_pseudolabels,
    load_pseudolabels,
    prepare,
)
from rlkd.cli.main import app
from rlkd.errors import ConfigError, DataError
from rlkd.evaluation.problems import classification_metrics
from rlkd.evaluation.task_metrics import exact_match
from rlkd.jobs.setup import load_data
from rlkd.sampling.engines.protocol import Answer, Decoding
from rlkd.settings.trl_compat import ModelConfig
from tiny import VALID, save_pair, tiny_t5, tiny_teacher
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
        rows = str(tmp_path / "rows.jsonl")
        shutil.copy(rows, tmp_path / "others.jsonl")
        options = {
            "dataset": rows,
            "eval_dataset": str(tmp_path / "others.jsonl"),
            "reference_column": "gold",
        } | options
        return load_data(DataArguments(input_column="text", **options))

    return load


def test_columns_are_renamed_in_training_and_evaluation_data(load):
    train, evaluation, labels, _ = load()
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
        DataArguments("x", "text", train_limit=0)


def test_what_a_recipe_is_built_from(tmp_path, load):
    """The student as it was saved, or with the seed's adapters; the teacher with its own tokenizer."""
    teacher, student = save_pair(tmp_path / "models")
    data = DataArguments(
        dataset=str(tmp_path / "rows.jsonl"), input_column="body", reference_column="text", templates=["mine:ask"],
        templates_dir=str(tmp_path), column_map=["gold=text"],
    )  # fmt: skip
    told = TeacherArguments(teacher, teacher_dtype="float32", teacher_append_eos=False, teacher_cache_mb=1)

    def prepared(seed=1, data=data, task_reward=None, **options):
        training = PPOArguments(
            str(tmp_path / "run"), use_cpu=True, seed=seed, max_input_tokens=9, task_reward=task_reward
        )
        return prepare(data, told, ModelConfig(student, dtype=None, **options), training)

    setup = prepared()
    saved = tiny_t5(seed=1).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in setup.student.state_dict().items())
    frozen = setup.teacher
    assert (frozen.max_input_tokens, frozen.append_eos, frozen.cache_bytes) == (9, False, 2**20)
    assert (frozen.lm.model.name_or_path, frozen.lm.valid_vocab) == (teacher, VALID)
    assert frozen.tokenizer.name_or_path.endswith("teacher")
    assert frozen.tokenizer.get_vocab() == setup.tokenizer.get_vocab()
    assert (setup.train_examples[0].teacher_inputs, setup.train_examples[0].references) == (("ask g",), ())
    assert setup.eval_examples[0].references == ("g",)

    # A task reward reads the references of the training data; a metric without them is refused.
    assert prepared(task_reward="rougeL").train_examples[0].references == ("g",)
    with pytest.raises(ConfigError, match=r"^task_reward = 'exact_match': needs reference_column"):
        prepared(task_reward="exact_match", data=replace(data, reference_column=None))
    with pytest.raises(ConfigError, match="cannot import no_such_module"):
        prepared(task_reward="no_such_module:f")

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
        templates_dir=str(tmp_path), column_map=["gold=text"], pseudo_labels=str(tmp_path / "labels"),
    )  # fmt: skip
    (tmp_path / "labelled.jsonl").write_text(json.dumps({"text": "a b", "n": 1}) + "\n")
    stub.label(tmp_path / "labelled.jsonl", tmp_path / "labels")
    lora = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q"]}

    def prepared(model, teacher=teacher, **options):
        told = TeacherArguments(teacher, teacher_dtype="float32")
        out = tmp_path / ("second" if (tmp_path / "run").exists() else "run")
        training = SupervisedArguments(str(out), use_cpu=True, max_steps=1, learning_rate=0.1)
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
        prepare(DataArguments("x", "text"), TeacherArguments(), ModelConfig(), PPOArguments("x", use_cpu=True))


# Held-out inputs


def words(n, repeats=3):
    """Rows with n different inputs, each `repeats` times in another spelling."""
    spellings = [str, str.upper, "  {}  ".format]
    return [{"note": spellings[k % 3](f"note {i}"), "gold": f"answer {i}"} for k in range(repeats) for i in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(examples):
    return {" ".join(example.student_input.lower().split()) for example in examples}


def test_a_file_without_held_out_rows_gives_a_share_of_its_inputs(tmp_path):
    def load(rows, **options):
        data = DataArguments(write(tmp_path / "mine.jsonl", rows), "note", reference_column="gold", **options)
        return load_data(data)

    rows = words(50)
    train, held_out, labels, note = load(rows)
    assert (len(held_out), len(train)) == (15, 135)
    assert not plain(train) & plain(held_out)
    # The rows are those of the file, under their numbers; only held-out ones have references.
    for example in held_out:
        row = rows[int(example.id)]
        assert (example.student_input, example.references) == (row["note"], (row["gold"],))
    assert {example.references for example in train} == {()}
    assert "15 of 150 inputs" in note
    assert "eval_fraction 0.1" in note
    assert train.fingerprint != held_out.fingerprint
    assert labels is None

    # The same inputs whatever their order or the rows of others, as later stages may read another file of them.
    assert plain(load(rows[::-1])[1]) == plain(held_out)
    assert len(plain(load(words(50, 1))[1]) & plain(held_out)) == 5
    assert len(load(rows, eval_fraction=0.5)[1]) == 75
    for few in ([rows[0]] * 9, words(1)):
        with pytest.raises(DataError, match=r"has fewer than two different inputs: .* Set eval_dataset"):
            load(few)
    assert [len(part) for part in load(words(2, 1))[:2]] == [1, 1]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ConfigError, match=f"eval_fraction = {share}: must be above 0 and below 1"):
        DataArguments("x", "note", eval_fraction=share)


def test_the_file_itself_as_held_out_rows_is_split(tmp_path):
    mine = write(tmp_path / "mine.jsonl", words(20))
    train, held_out, *_ = load_data(DataArguments(mine, "note", eval_dataset=mine))
    assert len(held_out) == 6
    assert not plain(train) & plain(held_out)


def test_a_folder_named_by_split_brings_its_own_held_out_rows(tmp_path):
    rows = datasets.Dataset.from_list(words(10, 1))
    rows.select(range(8)).to_parquet(tmp_path / "train-0.parquet")
    rows.select(range(8, 10)).to_parquet(tmp_path / "validation-0.parquet")
    train, held_out, _, note = load_data(DataArguments(str(tmp_path), "note"))
    assert plain(held_out) == {"note 8", "note 9"}
    assert len(train) == 8
    assert "(validation)" in note
    (tmp_path / "validation-0.parquet").unlink()
    train, held_out, *_ = load_data(DataArguments(str(tmp_path), "note"))
    assert len(held_out) == 1
    assert not plain(train) & plain(held_out)


def test_labels_of_held_out_inputs_are_not_trained_on(tmp_path):
    """Pseudo-labels are written for all rows of a file: those of the inputs that are then held out must go."""
    rows = words(20)
    examples = [Example(str(i), row["note"], (row["note"],)) for i, row in enumerate(rows)]
    out = tmp_path / "labels"
    decoding = Decoding(strategy="sample", max_new_tokens=3)
    generate_pseudolabels(tiny_teacher(), examples, out=out, template_names=["none"], decoding=decoding)
    mine = write(tmp_path / "mine.jsonl", rows)
    _, held_out, labels, note = load_data(DataArguments(mine, "note", pseudo_labels=str(out)))
    trained = {" ".join(text.lower().split()) for text in labels["student_input"]}
    assert len(trained) == 18
    assert not trained & plain(held_out)
    assert "6 of 60 labels are of held-out inputs and are left out" in note
    only = [{"note": row["note"], "gold": ""} for row in rows if row["note"].lower().strip() not in trained]
    held = tmp_path / "held"
    examples = [Example(str(i), row["note"], (row["note"],)) for i, row in enumerate(only)]
    generate_pseudolabels(tiny_teacher(), examples, out=held, template_names=["none"], decoding=decoding)
    with pytest.raises(DataError, match="held has labels of held-out inputs only: set eval_dataset"):
        load_data(DataArguments(mine, "note", pseudo_labels=str(held)))
    # The folder of labels may also be the unlabeled inputs of RL.
    train, held_out, *_ = load_data(DataArguments(str(out), "student_input"))
    assert len(held_out) == 6
    assert not plain(train) & plain(held_out)


def test_a_folder_without_a_label_is_refused(tmp_path):
    """A teacher that answers with padding alone gives rows, none of them a label."""

    class Padding(stub.StubEngine):
        def _one(self, prompt, seed):
            return Answer([tiny_teacher().lm.pad_id], [-0.1], False)

    rows, out = words(4), tmp_path / "labels"
    examples = [Example(str(i), row["note"], (row["note"],)) for i, row in enumerate(rows)]
    decoding = Decoding("greedy", 1)
    totals = generate_pseudolabels(
        tiny_teacher(), examples, out=out, template_names=["none"], decoding=decoding, engine=Padding()
    )
    assert totals["status"]["ok"] == 0
    with pytest.raises(DataError, match="none of its rows has a label"):
        load_data(DataArguments(write(tmp_path / "mine.jsonl", rows), "note", pseudo_labels=str(out)))


@pytest.mark.parametrize("kind", ["reinforce", "supervised", "tkd"])
def test_inputs_on_both_sides_are_counted(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr("rlkd.trainers.core.logger.propagate", True, raising=False)
    if kind == "tkd":
        shared = [*labelled_rows(4, seed=5), {**labelled_rows(8)[7], "text": labelled_rows(8)[7]["text"].upper()}]
        trainer = make_tkd(tmp_path, preset="ft", dev=shared, max_steps=1, train=labelled_rows(8))
    else:
        new = [replace(e, student_input=f"{e.student_input} a b c a b") for e in tiny_runs.examples(4)]
        shared = [*new, replace(tiny_runs.examples(8)[7], student_input=" A  B ")]
        data = [*tiny_runs.examples(8), replace(new[0], student_input="a b")]
        if kind == "supervised":
            data = datasets.Dataset.from_list([{"student_input": e.student_input, "label": "a"} for e in data])
        trainer = tiny_runs.make(kind, tmp_path, max_steps=1, data=data, eval_examples=shared)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "1 of 5 held-out inputs are also training inputs (the first is held-out row 4)" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["data"]["eval"]["also_in_training"] == 1
    trainer.save_model()
    assert "- 1 of 5 held-out inputs are also training inputs." in (tmp_path / "README.md").read_text()


# Metrics that cannot work are noticed before weights load


def test_a_metric_without_references(tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    with pytest.raises(ConfigError, match=r"task_metric = 'rouge': needs reference_column"):
        DataArguments("x", "note", task_metric="rouge")
    teacher, student = save_pair(tmp_path / "models")
    monkeypatch.setattr("rlkd.models.loading.load_model", loaded)
    monkeypatch.setattr("rlkd.models.spec.ModelSpec.load", loaded)

    def prepared(rows, **options):
        data = DataArguments(
            write(tmp_path / "train.jsonl", words(9)), "note", eval_dataset=write(tmp_path / "dev.jsonl", rows),
            reference_column="gold", task_metric="rouge",
        )  # fmt: skip
        training = PPOArguments(str(tmp_path / "run"), use_cpu=True, **options)
        return prepare(data, TeacherArguments(teacher, teacher_dtype="float32"), ModelConfig(student), training)

    new = [{"note": f"other {i}", "gold": gold} for i, gold in enumerate(["a", None, "", "  ", "b"])]
    with pytest.raises(DataError, match=r"3 of 5 evaluation rows have no reference \(first: 1\)"):
        prepared(new)
    with pytest.raises(DataError, match=r"1 of 2 evaluation rows have no reference"):
        prepared(new, eval_limit=2)
    with pytest.raises(AssertionError, match="weights were loaded"):
        prepared(new, eval_limit=1)
    several = [{"note": f"other {i}", "gold": gold} for i, gold in enumerate([["a", ""], ["b"], [" "], []])]
    with pytest.raises(DataError, match=r"2 of 4 evaluation rows have no reference \(first: 2\)"):
        prepared(several)
    with pytest.raises(DataError, match=r"column 'gold' contains .*int64.*, not text"):
        prepared([{"note": "other", "gold": 3}])


@pytest.mark.parametrize("kind", ["reinforce", "supervised"])
def test_trainers_refuse_what_the_first_evaluation_would_meet(tmp_path, kind):
    without = [replace(example, references=()) for example in tiny_runs.examples(3)]
    with pytest.raises(DataError, match="3 of 3 evaluation rows have no reference"):
        tiny_runs.make(kind, tmp_path, eval_examples=without, task_metric=exact_match)
    with pytest.raises(ConfigError, match="task_metric fails on 3 answers"):
        tiny_runs.make(kind, tmp_path, eval_examples=without, task_metric=lambda texts, rows: rows[0].references[0])
    for nothing in (None, []):
        with pytest.raises(ConfigError, match=r"^eval_strategy = 'steps': there are no held-out rows"):
            tiny_runs.make(kind, tmp_path, eval_examples=nothing, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ConfigError, match=r"^eval_on_start = True: .* set eval_on_start to false"):
        tiny_runs.make(kind, tmp_path, eval_on_start=True)


def test_a_student_of_labels_alone_has_the_numbers_that_need_no_teacher(tmp_path):
    args = SupervisedArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    inputs = {"tokenizer": tiny_runs.tiny_tokenizer(tiny_runs.WORDS), "train_dataset": tiny_runs.labels()}
    held_out = {"eval_examples": tiny_runs.examples(3), "task_metric": exact_match}
    found = SupervisedTrainer(tiny_runs.student(), args, **inputs, **held_out).evaluate()
    assert {"eval_exact_match", "eval_sample_length"} <= found.keys()
    assert not {"eval_regret", "eval_match", "eval_logprob"} & found.keys()


@pytest.mark.parametrize("table", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"student_input": "a", "label": "b"}, {"student_input": "a", "label": None}],
            "'label' is not text in 1 rows .*row 1, None",
        ),
        ([{"student_input": "a", "label": 3}] * 2, "'label' is not text in 2 rows .*row 0, 3"),
        ([{"student_input": None, "label": "b"}], "'student_input' is not text in 1 rows"),
        ([{"student_input": "a", "target": "b"}], "no column 'label'|'label' is not text in 1 rows"),
    ],
)  # fmt: skip
def test_labels_are_text(tmp_path, rows, message, table):
    with pytest.raises(DataError, match=message):
        tiny_runs.make("supervised", tmp_path, data=table(rows))


def test_classifier_metrics_that_cannot_work(tmp_path, caplog):
    one_label = [row for row in labelled_rows(30) if row["label"] == 0]
    with caplog.at_level(logging.WARNING):
        make_tkd(tmp_path, preset="kd", dev=one_label, metrics=classification_metrics(["accuracy", "f1", "matthews"]))
    assert "f1, matthews: 0 for the right answers themselves" in caplog.text
    caplog.clear()
    make_tkd(
        tmp_path, preset="kd", dev=labelled_rows(30), metrics=classification_metrics(["accuracy", "f1", "matthews"])
    )
    assert "right answers" not in caplog.text
    with pytest.raises(ConfigError, match=r"compute_metrics fails on 30 right predictions \(ZeroDivisionError"):
        make_tkd(tmp_path, preset="kd", dev=labelled_rows(30), metrics=lambda _: 1 / 0)
