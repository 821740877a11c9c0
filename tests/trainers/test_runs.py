"""run.json: complete, atomic, without secrets; and a resumed run is the recorded run."""

import errno
import json
import logging
import subprocess
from dataclasses import fields, replace

import datasets
import pytest

from rlkd import DataArguments, PPOArguments, ReinforceArguments, TeacherArguments, TKDArguments, prepare
from rlkd.data.examples import Examples
from rlkd.data.labelled import EncodedTexts
from rlkd.errors import ConfigError, RlkdError
from rlkd.io.redaction import REDACTED
from rlkd.runs.record import (
    FREE,
    LENGTH,
    PACKAGES,
    RUN_FILE,
    RunRecord,
    changed_settings,
    check_settings,
    describe_data,
    fingerprint,
    git_state,
    settings_of,
)
from rlkd.settings.trl_compat import ModelConfig
from rlkd.templates.template import Template
from tiny import tiny_tokenizer
from tiny_runs import assert_same, examples, labels, make, tiny_teacher, weights

CANARY = "canary-b41d-value"
TEMPLATE = Template("copy", "copy : {{note}} ||| {{note}}", id="1")


def record(**changes):
    values = {
        "trainer": "PPOTrainer", "settings": {}, "data": {}, "templates": [], "models": {}, "revisions": {},
    }  # fmt: skip
    return RunRecord(**values | changes)


def as_examples(texts, template=TEMPLATE, **options):
    return Examples(datasets.Dataset.from_dict({"note": texts}), [template], student_column="note", **options)


def arguments(kind=ReinforceArguments, **options):
    return kind(output_dir="x", use_cpu=True, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A supervised run of two steps with a checkpoint at each, its recipe's other settings with it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make("supervised", folder, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.settings = (DataArguments(dataset="rows.jsonl", input_column="text"), TeacherArguments())
    trainer.train()
    return folder


def again(run, folder, step=1, **options):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | options
    trainer = make("supervised", folder, **options)
    trainer.settings = (DataArguments(dataset="rows.jsonl", input_column="text"), TeacherArguments())
    return trainer


# The content of run.json


def test_a_run_says_what_was_run(run):
    found = json.loads((run / RUN_FILE).read_text())
    assert found["trainer"] == "SupervisedTrainer"
    assert found["settings"]["objective"] == "sequence"
    assert found["settings"]["max_steps"] == 2
    assert (found["settings"]["dataset"], found["settings"]["teacher"]) == ("rows.jsonl", "bigscience/T0_3B")
    assert set(found["versions"]) == {"python", *PACKAGES}
    assert found["data"] == {"train": {"source": None, "rows": 8, "fingerprint": fingerprint(labels())}}
    assert set(found["models"]) == {"teacher", "student"} == set(found["revisions"])
    assert (found["processes"], found["resumed"]) == (1, [])
    assert found["started"].endswith("+00:00")
    assert (run / "checkpoint-1" / RUN_FILE).read_text() == (run / RUN_FILE).read_text()


def test_templates_and_sources_are_named(tmp_path):
    data = as_examples(["a", "b", "c", "a b"], source="notes.csv")
    make("reinforce", tmp_path, max_steps=1, data=data, eval_examples=data, per_device_train_batch_size=4).train()
    found = RunRecord.read(tmp_path)
    assert found.templates == [{"name": "copy", "id": "1", "fingerprint": TEMPLATE.fingerprint}]
    described = describe_data(data)
    assert found.data == {"train": described, "eval": {**described, "also_in_training": 4}}
    assert found.data["train"]["source"] == "notes.csv"


@pytest.mark.parametrize(
    "section",
    [
        PPOArguments(
            "x", use_cpu=True, kl_target=0.1, lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 1}
        ),
        ReinforceArguments("x", use_cpu=True, optim="adafactor", report_to=[], max_steps=7, eval_strategy="steps"),
        TKDArguments("x", use_cpu=True, preset="kd", layer_map=[1, 3], accelerator_config={"even_batches": False}),
        DataArguments("x", "text", templates=["a", "b"]),
        ModelConfig(model_name_or_path="m", use_peft=True, lora_target_modules=["q", "v"]),
    ],
    ids=lambda section: type(section).__name__,
)
def test_the_settings_are_enough_to_make_the_run_again(section):
    recorded = json.loads(json.dumps(settings_of([section])))
    rebuilt = type(section)(**recorded)
    assert changed_settings(recorded, [rebuilt]) == []
    for item in fields(section):
        one, other = (str(getattr(s, item.name)) for s in (section, rebuilt))
        assert one == other, item.name


def test_all_of_ours_and_only_what_differs_of_others():
    recorded = settings_of([arguments(seed=3)])
    assert recorded["lam"] == 0.2
    assert recorded["learning_rate"] == 1e-5  # declared by transformers, its default is ours
    assert recorded["seed"] == 3
    assert not {"adam_beta1", "weight_decay", "hub_token"} & recorded.keys()


def test_git(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    assert git_state(str(tmp_path)) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    git_state.cache_clear()
    clean = git_state(str(tmp_path))
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    git_state.cache_clear()
    assert git_state(str(tmp_path)) == {"commit": clean["commit"], "dirty": True}
    git_state.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert git_state(str(tmp_path)) is None  # no git on this machine
    git_state.cache_clear()


def test_packages_that_are_not_installed_are_none(monkeypatch):
    monkeypatch.setattr("rlkd.runs.record.PACKAGES", ("torch", "no-such-package"))
    assert record().versions["no-such-package"] is None


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    record(settings={"lam": 0.2}).write(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RlkdError, match=r"no space left for .*run.json"):
        record(settings={"lam": 0.3}).write(tmp_path)
    assert RunRecord.read(tmp_path).settings == {"lam": 0.2}
    assert [file.name for file in tmp_path.iterdir()] == [RUN_FILE]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"trainer": "x"}', b"\xff"])
def test_a_record_that_is_missing_or_damaged_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / RUN_FILE).write_bytes(content)
    assert RunRecord.read(tmp_path) is None
    check_settings(tmp_path, [arguments()], allow_change=False)


# Fingerprints


def test_fingerprints_tell_contents_apart():
    rows = labels()
    changed = [*rows[:-1], rows[-1] | {"label": "z"}]
    kinds = [rows, rows[::-1], rows[:-1], changed, examples(), examples(7), as_examples(["a", "b"])]
    kinds += [as_examples(["a", "c"]), as_examples(["a", "b"], replace(TEMPLATE, source="say : {{note}}"))]
    kinds += [datasets.Dataset.from_list(rows), datasets.Dataset.from_list(changed)]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)
    assert fingerprint(datasets.Dataset.from_list(rows)) == fingerprint(datasets.Dataset.from_list(labels()))
    assert fingerprint(as_examples(["a", "b"])) == fingerprint(as_examples(["a", "b"]))


def test_columns_that_nobody_reads_do_not_count():
    rows = datasets.Dataset.from_dict({"note": ["a"], "other": ["x"]})
    two = [Examples(r, [TEMPLATE], student_column="note") for r in (rows, rows.remove_columns("other"))]
    assert len({fingerprint(e) for e in two}) == 1


def test_labels_of_classifiers_count():
    rows = [{"text": "a b", "label": 0}, {"text": "b", "label": 1}]
    flipped = [{**row, "label": 1 - row["label"]} for row in rows]
    one, other = (EncodedTexts(r, tiny_tokenizer(), 8, 2) for r in (rows, flipped))
    assert one.digest() == other.digest()
    assert fingerprint(one) != fingerprint(other)


# Resuming


def test_a_resume_with_other_settings_is_refused_with_the_list(run, tmp_path):
    trainer = again(run, tmp_path, label_smoothing_factor=0.1, learning_rate=0.5)
    trainer.settings[0].input_column = "note"
    before = weights(trainer.policy)
    with pytest.raises(ConfigError) as caught:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert str(caught.value).splitlines()[:-1] == [
        f"{run / 'checkpoint-1'} was written with other settings or inputs:",
        '  input_column: "text" -> "note"',
        "  learning_rate: 0.01 -> 0.5",
        "  label_smoothing_factor: 0.0 -> 0.1",
    ]
    assert "allow_config_change: true" in str(caught.value)
    assert_same(before, weights(trainer.policy))
    assert not (tmp_path / RUN_FILE).exists()


def test_an_allowed_change_is_recorded_and_the_start_is_kept(run, tmp_path):
    first = RunRecord.read(run)
    trainer = again(run, tmp_path, learning_rate=0.5, allow_config_change=True)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    second = RunRecord.read(tmp_path)
    assert second.started == first.started
    assert second.settings["learning_rate"] == 0.5
    assert [entry["changed"] for entry in second.resumed] == [["  learning_rate: 0.01 -> 0.5"]]
    assert second.resumed[0]["checkpoint"] == str(run / "checkpoint-1")
    third = again(run, tmp_path, learning_rate=0.5, max_steps=3)
    third.train(resume_from_checkpoint=True)
    assert [len(entry["changed"]) for entry in RunRecord.read(tmp_path).resumed] == [1, 0]


def test_what_reaches_no_weight_may_change(run, tmp_path):
    changes = {"logging_steps": 7, "save_steps": 2, "max_steps": 3, "run_name": "other", "save_total_limit": 1}
    again(run, tmp_path, **changes).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert RunRecord.read(tmp_path).resumed[0]["changed"] == []


def test_other_data_and_another_teacher_are_other_runs(run, tmp_path):
    trainer = again(run, tmp_path, data=labels(6), teacher=tiny_teacher(seed=9))
    with pytest.raises(ConfigError) as caught:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    changed = str(caught.value).splitlines()[1:-1]
    assert [line.split(":")[0] for line in changed] == ["  data.train", "  teacher's weights"]
    assert changed[0].startswith("  data.train: 8 rows (")


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rlkd"):
        record().resume(tmp_path, [arguments()], allow_change=False)
    assert "cannot check whether the settings are the same" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "warmup", "free"),
    [
        ("constant", 5, True),
        ("constant_with_warmup", 5, True),
        ("constant_with_warmup", 0.1, False),
        ("linear", 0, False),
    ],
)
def test_a_longer_run_is_the_same_run_if_the_schedule_does_not_end_with_it(schedule, warmup, free):
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    then = settings_of([arguments(max_steps=4, **options)])
    assert (changed_settings(then, [arguments(max_steps=8, num_train_epochs=5, **options)]) == []) is free


@pytest.mark.parametrize(("processes", "steps", "free"), [(1, 2, False), (2, 2, True), (2, 4, False), (4, 2, False)])
def test_accumulation_may_make_up_for_other_processes(processes, steps, free):
    """arguments: one process, so as many steps as there were processes with one step each."""
    before = record(processes=processes, settings=settings_of([arguments()]))
    changed = before.changed_settings([arguments(gradient_accumulation_steps=steps)])
    assert changed == ([] if free else [f"  gradient_accumulation_steps: 1 -> {steps}"])


def test_settings_newer_than_the_record_are_no_change():
    then = settings_of([arguments()])
    del then["lam"]
    assert changed_settings(then, [arguments(lam=0.9)]) == []
    assert changed_settings(then, [arguments(adam_beta1=0.5)]) == ["  adam_beta1: 0.9 -> 0.5"]


def test_free_settings_exist():
    """A misspelt or outdated name would free nothing."""
    kinds = (PPOArguments, TKDArguments, TeacherArguments)
    assert (FREE | LENGTH) - {item.name for kind in kinds for item in fields(kind)} == set()


def test_recipes_refuse_before_they_look_at_a_model(run, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was looked at")

    for name in ("loading.load_config", "vocabulary.load_tokenizer", "loading.load_model"):
        monkeypatch.setattr(f"rlkd.models.{name}", loaded)
    settings = (
        DataArguments(dataset="other", input_column="text"),
        TeacherArguments(),
        ModelConfig(model_name_or_path="m"),
    )
    for given in (str(run / "checkpoint-1"), "auto"):
        training = ReinforceArguments(str(run), use_cpu=True, resume_from_checkpoint=given)
        with pytest.raises(ConfigError, match=r'dataset: "rows\.jsonl" -> "other"'):
            prepare(*settings, training)
    with pytest.raises(AssertionError, match="a model was looked at"):
        prepare(*settings, ReinforceArguments(str(run / "new"), use_cpu=True, resume_from_checkpoint="auto"))


# Secrets


def test_no_secret_is_written_or_shown(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--hub_token", CANARY, f"--api_key={CANARY}", "--lam", "0.2"])
    options = {"hub_token": CANARY, "run_name": f"run of {CANARY}", "max_steps": 1, "save_strategy": "steps"}
    with caplog.at_level(logging.DEBUG):
        trainer = make("supervised", tmp_path, save_steps=1, eval_examples=examples(2), **options)
        trainer.run()
    found = RunRecord.read(tmp_path)
    assert found.command == ["ppo.py", "--hub_token", REDACTED, f"--api_key={REDACTED}", "--lam", "0.2"]
    assert (found.settings["hub_token"], found.settings["run_name"]) == (REDACTED, f"run of {REDACTED}")
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 8
    assert [file for file in written if CANARY.encode() in file.read_bytes()] == []
    assert CANARY not in caplog.text
    assert CANARY not in "".join(capfd.readouterr())
