"""`rlkd config`: what a YAML file and flags amount to, without a run."""

import json
from pathlib import Path

import pytest
import yaml

from rlkd import DataArguments, PPOArguments, TeacherArguments, parse_config
from rlkd.cli.main import main
from rlkd.settings.trl_compat import ModelConfig

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = str(RECIPES / "ppo_t0_to_t5.tiny.yaml")


def run(capsys, *words):
    """(exit code, stdout, stderr)"""
    code = 0
    try:
        main(["config", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("recipe", ["ppo_t0_to_t5", "reinforce_t0_to_t5", "gkd_t0_to_t5", "seqkd_t0_to_t5", "tkd_glue"])
@pytest.mark.parametrize("size", ["", ".tiny"])
def test_shipped_files_can_work(capsys, recipe, size):
    file = RECIPES / f"{recipe}{size}.yaml"
    given = set(yaml.safe_load(file.read_text())) | {"bf16"}
    code, out, err = run(capsys, "check", str(file), "--bf16", "false")
    assert (code, err) == (0, "")
    assert out.startswith(f"{file}: valid: {len(given)} settings given, ")


def test_every_mistake_is_named_at_once(capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("lam: 2\nreward_valu: max\nsync_every: 0\n")
    code, out, err = run(capsys, "check", str(tmp_path / "x.yaml"), "--recipe", str(RECIPES / "ppo_t0_to_t5.py"))
    assert (code, out) == (2, "")
    assert [line.split(" ")[1] for line in err.replace("error: ", "").splitlines()] == ["lam", "key", "sync_every"]
    assert "Did you mean 'reward_value'?" in err


def test_flags_count_and_are_checked(capsys):
    code, _, err = run(capsys, "check", TINY, "--rollouts_per_prompt", "3")
    assert code == 2
    assert "must divide the 8 answers" in err
    assert "rollouts_per_prompt (--rollouts_per_prompt)" in err


def test_what_is_shown_is_a_file_that_gives_the_same_run(capsys, tmp_path, monkeypatch):
    code, out, _ = run(capsys, "show", TINY, "--lam", "0.25")
    assert code == 0
    assert "lam: 0.25  # --lam; numbers (at least 0 and at most 1); Credit horizon" in out
    assert f"max_steps: 2  # {TINY}:" in out
    assert "kl_in: \"loss\"  # default; 'loss', 'reward'; " in out
    assert "adam_beta1" not in out
    (tmp_path / "shown.yaml").write_text(out)
    kinds = (DataArguments, TeacherArguments, ModelConfig, PPOArguments)
    one = parse_config(kinds, ["--config", TINY, "--lam", "0.25"])
    other = parse_config(kinds, ["--config", str(tmp_path / "shown.yaml")])
    assert [str(section) for section in one] == [str(section) for section in other]


def test_all_and_json(capsys):
    _, out, _ = run(capsys, "show", TINY, "--all")
    assert "adam_beta1: 0.9  # default; numbers; " in out
    _, out, _ = run(capsys, "show", TINY, "--json")
    found = {setting["name"]: setting for setting in json.loads(out)}
    assert found["adam_beta1"]["origin"] == "default"
    assert found["use_cpu"] == found["use_cpu"] | {"value": True, "section": "PPOArguments", "own": False}


def test_recipes_are_found(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    (tmp_path / "mine.yaml").write_text("dataset: rows.jsonl\ninput_column: text\n")
    assert run(capsys, "check", str(tmp_path / "mine.yaml"), "--recipe", "ppo_t0_to_t5", "--output_dir", "x")[0] == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, ["mine.py: no such recipe. Did you mean", "mini.py'?", "--recipe FILE.py"]),
        ("x = 1", ["mine.py has no SETTINGS: define it"]),
        ("import nothing_of_that_name", ["mine.py cannot be read: ModuleNotFoundError: No module named"]),
    ],
)
def test_files_that_are_not_recipes(capsys, tmp_path, script, words):
    (tmp_path / "mini.py").write_text("")
    if script:
        (tmp_path / "mine.py").write_text(script)
    code, _, err = run(capsys, "show", str(tmp_path / "mine.yaml"))
    assert code == 2
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_a_missing_file(capsys):
    code, _, err = run(capsys, "check", TINY.replace("ppo", "pp0"), "--recipe", str(RECIPES / "ppo_t0_to_t5.py"))
    assert code == 2
    assert "no such file. Did you mean 'ppo_t0_to_t5.tiny.yaml'?" in err


def test_no_weights_are_needed(capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was looked at")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", loaded)
    assert run(capsys, "check", TINY)[0] == 0
