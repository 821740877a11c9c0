"""A user's error is one message and its exit code; a launcher has others of its own, so the code is said there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlkd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    LockedError,
    ModelError,
    RlkdError,
    ServerError,
)
from rlkd.settings.parsing import LAUNCHERS, run_main
from tiny import save_pair

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "reinforce_t0_to_t5.py"
KINDS = {
    RlkdError: 1, CheckpointError: 1, ConfigError: 2, ModelError: 2, DataError: 3, DivergenceError: 5, LockedError: 75,
    ServerError: 75,
}  # fmt: skip


def failing(kind):
    def main():
        raise kind("something is wrong")

    return main


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*LAUNCHERS, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_one_line_and_its_code(no_launcher, capsys, kind):
    with pytest.raises(SystemExit) as end:
        run_main(failing(kind))
    assert end.value.code == KINDS[kind]
    assert capsys.readouterr().err == "error: something is wrong\n"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_the_code_comes_last(no_launcher, monkeypatch, capsys, launcher):
    monkeypatch.setenv(launcher, "no")
    with pytest.raises(SystemExit) as end:
        run_main(failing(DataError))
    assert end.value.code == 3
    first, last = capsys.readouterr().err.splitlines()
    assert first == "error: something is wrong"
    assert last.startswith("exit code 3; what follows is the launcher's")


def test_torchruns_table_gets_the_message(no_launcher, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        run_main(failing(DataError))
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == written["extraInfo"]["py_callstack"] == "error: something is wrong"


# The recipes themselves


def started(command, folder, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    return subprocess.run(
        [*command], cwd=folder, env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with two models and rows."""
    folder = tmp_path_factory.mktemp("user")
    save_pair(folder)
    (folder / "rows.jsonl").write_text('{"note": "a b"}\n' * 8)
    (folder / "bad.jsonl").write_text('{"note": "a b"}\n{"note": \n')
    return folder


def flags(rows="rows.jsonl", **changes):
    options = {
        "teacher": "teacher", "teacher_dtype": "float32", "model_name_or_path": "student", "dataset": rows,
        "eval_dataset": rows, "input_column": "note", "reference_column": "null", "output_dir": "out", "max_steps": "1",
        "use_cpu": "true", "report_to": "none", **changes,
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", value)]


ERRORS = {
    "a setting": (flags(lam="7"), 2),
    "a model": (flags(teacher="rows.jsonl"), 2),
    "a row": (flags("bad.jsonl"), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ERRORS)
def test_one_process_needs_no_launcher(user, case):
    """`python recipe.py` ends with the documented code and without a traceback."""
    given, code = ERRORS[case]
    done = started([sys.executable, str(RECIPE), *given], user)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
def test_accelerate_launch_shows_the_message_and_the_code(user, quiet):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *(["--quiet"] if quiet else [])]
    given, code = ERRORS["a row"]
    done = started([*launch, str(RECIPE), *given], user)
    assert done.returncode == 1
    ours = done.stderr.split("Traceback")[0]
    assert ours.count("error: ") == 1
    assert f"exit code {code}; " in ours.strip().splitlines()[-1]
    assert ("Traceback" in done.stderr) is not quiet


@pytest.mark.multi
def test_torchrun_repeats_message_and_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rlkd.errors import DataError\nfrom rlkd.settings.parsing import run_main\n\n\n"
        "def main():\n    raise DataError('rows.jsonl:2: not JSON')\n\n\nrun_main(main)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = started(launch, tmp_path)
    assert done.returncode == 1
    table = done.stderr[done.stderr.index("Root Cause") :]
    assert "exitcode  : 3" in table
    assert "error: rows.jsonl:2: not JSON" in table
