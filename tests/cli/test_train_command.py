"""`rlkd train JOB`: the recipes without their scripts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlkd import TRAINING_JOBS, ReinforceArguments, parse_config
from rlkd.cli.main import main
from rlkd.cli.train import JOBS

ROOT = Path(__file__).parents[2]
RECIPES = {"seqkd": "seqkd_t0_to_t5", "reinforce": "reinforce_t0_to_t5", "ppo": "ppo_t0_to_t5", "gkd": "gkd_t0_to_t5"}


def run(capsys, *words):
    code = 0
    try:
        main(list(words))
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def test_help_lists_every_job(capsys):
    assert list(JOBS) == list(TRAINING_JOBS)
    _, out, _ = run(capsys, "train", "--help")
    assert all(f"{name} " in out for name in JOBS)
    _, out, _ = run(capsys, "train", "ppo", "--help")
    assert "--clip_range" in out
    assert "--config" in out


@pytest.mark.parametrize("name", [*RECIPES.values(), "tkd_glue", "teacher_t5"])
def test_recipes_are_jobs(name):
    assert [job for job in TRAINING_JOBS if f'TRAINING_JOBS["{job}"]' in (ROOT / f"recipes/{name}.py").read_text()]


def test_the_preset_of_opd_is_its_recipe(capsys):
    """The file shipped for it says the same, setting by setting; file and flags override the preset."""
    job = TRAINING_JOBS["opd"]
    shipped = yaml.safe_load((ROOT / "recipes/opd_t0_to_t5.yaml").read_text())
    assert {name: shipped[name] for name in job.preset} == job.preset
    *_, training = parse_config((ReinforceArguments,), ["--output_dir", "x", "--lam", "0.5"], preset=job.preset)
    assert (training.reward_value, training.lam) == ("lse", 0.5)


def test_a_file_is_checked_for_a_job(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: rows.jsonl\ninput_column: text\noutput_dir: x\nlam: 0.3\n")
    assert run(capsys, "config", "check", str(file), "--recipe", "opd")[0] == 0
    _, out, _ = run(capsys, "config", "show", str(file), "--recipe", "opd")
    assert f"lam: 0.3  # {file}:4; " in out
    assert 'reward_value: "lse"  # preset; ' in out
    code, _, err = run(capsys, "config", "check", str(file), "--recipe", "pp")
    assert code == 2
    assert "--recipe seqkd, reinforce, ppo, opd, gkd, tkd" in err


def test_errors_are_those_of_the_recipes(capsys, tmp_path):
    code, _, err = run(capsys, "train", "ppo", "--config", str(tmp_path / "none.yaml"))
    assert (code, "none.yaml: no such file" in err) == (2, True)
    code, _, err = run(capsys, "train", "ppo", "--reward_valu", "max")
    assert (code, "Did you mean '--reward_value'?" in err) == (2, True)
    code, _, err = run(capsys, "train", "pposs")
    assert (code, "No such command" in err) == (2, True)


@pytest.mark.slow
def test_a_job_is_its_recipe_and_runs_under_a_launcher(tmp_path):
    """Away from the clone: the same weights as the recipe's."""
    for folder in ("recipes", "prompts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    python, environment = sys.executable, {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}

    def call(*words):
        done = subprocess.run(
            [python, *words], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("recipes/tiny_models.py", "--to", "runs/tiny")
    launched = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "rlkd", "train", "ppo"]
    call(*launched, "--config", "recipes/ppo_t0_to_t5.tiny.yaml", "--output_dir", "runs/job")
    call("recipes/ppo_t0_to_t5.py", "--config", "recipes/ppo_t0_to_t5.tiny.yaml", "--output_dir", "runs/recipe")
    job, recipe = ((tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("job", "recipe"))
    assert job == recipe
    assert json.loads((tmp_path / "runs/job/run.json").read_text())["trainer"] == "PPOTrainer"
