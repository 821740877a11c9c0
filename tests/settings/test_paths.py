"""Paths that are not there are named before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.settings.paths import refuse_missing_paths

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (["--config", "nope.yaml"], ConfigError, "--config nope.yaml: no such file"),
        (["--dataset", "rowz.jsonl"], DataError, "dataset = 'rowz.jsonl': .* Did you mean 'rows.jsonl'"),
        (["--eval_dataset=dev.parquet"], DataError, "eval_dataset = 'dev.parquet'"),
        (["--train_file", "x/y/z.csv"], DataError, "train_file = 'x/y/z.csv': .* Folder x/y does not exist"),
        (["--pseudo_labels", "labels"], DataError, "pseudo_labels = 'labels'"),
        (["--config", "mine.yaml"], ModelError, "model_name_or_path = 'runs/a/student'"),
        (["--config=mine.yaml", "--model_name_or_path", "t5-small"], DataError, "dataset = './gone'"),
        (["generate-pseudolabels", "--teacher", "/no/where", "--out", "a"], ModelError, "teacher = '/no/where'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, monkeypatch, argv, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "mine.yaml").write_text("model_name_or_path: runs/a/student  # warm\ndataset: './gone'\nlam: 0.2\n")
    with pytest.raises(error, match=words):
        refuse_missing_paths(argv)


@pytest.mark.parametrize(
    "argv",
    [
        [], ["--dataset", "rows.jsonl"], ["--dataset", "glue"], ["--dataset", "owner/name"], ["--teacher", "org/t5"],
        ["--dataset", "part-*.jsonl"], ["--dataset", "https://host/a/b.jsonl"], ["--output_dir", "runs/new/one"],
        ["--config", "hub.yaml"], ["--dataset"],
    ],
)  # fmt: skip
def test_what_may_be_on_the_hub_or_is_there_is_left_alone(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "hub.yaml").write_text("teacher: org/name\neval_dataset: null\npseudo_labels: ~\ntemplates: [a/b/c]\n")
    refuse_missing_paths(argv)


@pytest.mark.parametrize("recipe", ["ppo_t0_to_t5", "reinforce_t0_to_t5", "gkd_t0_to_t5", "seqkd_t0_to_t5", "tkd_glue"])
def test_recipes_name_them_before_torch_is_imported(tmp_path, recipe):
    """With a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--config", str(tmp_path / "nope.yaml")]
    path = f"{tmp_path}:{RECIPES.parent}"
    done = subprocess.run(command, env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("nope.yaml: no such file.")
