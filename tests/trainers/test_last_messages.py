"""Messages of trainers and of what looks at their work that no other test meets."""

from types import SimpleNamespace

import pytest
import torch

from rlkd import Decoding, RewardView, RunOptions, generate_pseudolabels
from rlkd.cli.main import main
from rlkd.errors import ConfigError, DataError, DivergenceError
from rlkd.jobs.encoder_teachers import TEACHER_RECORD, _check_same_weights, fine_tuned_teacher
from rlkd.records import Example
from rlkd.runs.best import check_best_metric
from rlkd.trainers.arguments import ReinforceArguments
from tiny import save_pair, tiny_classifier, tiny_teacher, tiny_tokenizer
from tiny_runs import make


def test_the_best_checkpoint_must_be_saved_when_it_is_evaluated(tmp_path):
    steps = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 10}
    with pytest.raises(ConfigError, match=r"save_steps = 10: load_best_model_at_end keeps an evaluated step only if"):
        ReinforceArguments(str(tmp_path), use_cpu=True, **steps)


def test_the_metric_of_the_best_checkpoint_must_exist(tmp_path):
    options = {"metric_for_best_model": "regrets", "eval_strategy": "steps", "eval_steps": 5}
    args = ReinforceArguments(str(tmp_path), use_cpu=True, **options)
    with pytest.raises(
        ConfigError, match=r"no evaluation yields it\. Allowed are regret, match\. Did you mean 'regret'"
    ):
        check_best_metric(args, lambda: ["regret", "match"])


def test_a_process_whose_numbers_are_finite_stops_with_the_others(tmp_path, monkeypatch):
    trainer = make("supervised", tmp_path)
    monkeypatch.setattr(trainer, "anywhere", lambda here: True)
    with pytest.raises(DivergenceError, match=r"another process found a non-finite number at step 0"):
        trainer.finite.check_weights([torch.ones(2)])


def test_labels_without_one_that_is_ok(tmp_path):
    examples = [Example("0", "a", ("copy a",))]
    how = {"decoding": Decoding("greedy", 4), "options": RunOptions(on_long="skip")}
    generate_pseudolabels(tiny_teacher(max_input_tokens=1), examples, out=tmp_path, template_names=["t"], **how)
    with pytest.raises(DataError, match="has no labels to show: no row has status 'ok'"):
        RewardView.from_labels(tmp_path, tiny_tokenizer())


def test_a_template_that_fails_on_a_row_to_look_at(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "n": 0}\n')
    (tmp_path / "t.yaml").write_text(
        "dataset: x\ntemplates:\n  1: !Template\n    name: T\n    jinja: '{{ 1 // n }} {{ text }} ||| b'\n"
    )
    teacher, student = save_pair(tmp_path / "models")
    command = ["inspect-rewards", "--teacher", teacher, "--student", student, "--dataset", "rows.jsonl"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--input-column", "text", "--templates", "t.yaml"])
    assert end.value.code == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_teacher_of_other_settings_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr("rlkd.jobs.encoder_teachers._fine_tuning_settings", lambda setup: {"seed": 2, "epochs": 3})
    (tmp_path / TEACHER_RECORD).write_text('{"settings": {"seed": 1, "epochs": 3}, "finished": true}')
    setup = SimpleNamespace(
        teacher_folder=str(tmp_path), training=None, teacher=SimpleNamespace(teacher_finetuned=False)
    )
    with pytest.raises(ConfigError, match=r"was fine-tuned with seed 1 \(now 2\)\. Give another output_dir, or remove"):
        fine_tuned_teacher(setup)


def test_a_teacher_that_changes_while_it_is_fine_tuned(tmp_path):
    setup = SimpleNamespace(teacher_folder=str(tmp_path), teacher=SimpleNamespace(teacher="models/bert"))
    model, record = tiny_classifier(), {}
    _check_same_weights(record, model, setup)
    _check_same_weights(record, tiny_classifier(), setup)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    with pytest.raises(ConfigError, match=r"the weights of models/bert have changed since its fine-tuning in .* began"):
        _check_same_weights(record, model, setup)
