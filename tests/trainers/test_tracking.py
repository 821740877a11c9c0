"""The table of samples in each tracker: the same columns and rows, with fakes; and with trackio itself."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlkd.runs.sample_tables import COLUMNS, NAME, SampleTables, print_samples, with_rewards
from tiny_runs import logged

ROWS = [
    {
        "id": f"r{i}", "input": "x", "teacher": "a", "student": "a b", "regret": 0.5, "tokens": ["a", " b"],
        "rewards": [0.0, -0.5], "sample_student": "b", "sample_regret": 1.0, "sample_tokens": ["b"],
        "sample_rewards": [-1.0],
    }
    for i in range(2)
]  # fmt: skip


class Table:
    def __init__(self, columns=None, data=None, log_mode=None):
        self.columns, self.data, self.log_mode = columns, data or [], log_mode

    def add_data(self, *row):
        self.data.append(list(row))


@pytest.fixture
def trackers(monkeypatch):
    sent = {"wandb": [], "trackio": []}
    for name, calls in sent.items():
        log = lambda values, calls=calls, **_: calls.append({k: (v, len(v.data)) for k, v in values.items()})  # noqa: E731
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Table=Table, log=log))
    return sent


def test_both_trackers_get_the_same_rows(trackers):
    tables = SampleTables(["wandb", "trackio", "tensorboard"])
    tables.log(1, ROWS)
    tables.log(5, ROWS[:1])
    first = [1, "r0", "x", "a", "a b", 0.5, "b", 1.0, "a (0.00) b (-0.50)", "b (-1.00)"]
    assert [call[NAME][1] for call in trackers["wandb"]] == [2, 3]  # one table that grows
    assert [call[NAME][1] for call in trackers["trackio"]] == [2, 1]
    for calls in trackers.values():
        table = calls[0][NAME][0]
        assert table.columns == list(COLUMNS)
        assert table.data[0] == first
    assert trackers["wandb"][0][NAME][0].log_mode == "INCREMENTAL"
    assert [row[0] for row in trackers["wandb"][-1][NAME][0].data] == [1, 1, 5]


def test_without_trackers_none_is_imported(monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    SampleTables([]).log(1, ROWS)


def test_each_token_with_its_reward():
    assert with_rewards(ROWS[0]) == "a (0.00) b (-0.50)"
    assert with_rewards(ROWS[0], "sample_") == "b (-1.00)"


def test_a_log_file_gets_lines_that_can_be_searched(capsys):
    print_samples(3, [ROWS[0] | {"input": "[bold] " + "word " * 100}])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "samples at step 3"
    assert said[1].startswith("  r0: [bold] word word")
    assert len(said[1]) < 220
    assert said[2:] == ["    teacher: a", "    student: a b (regret 0.50)", "    sampled: b (regret 1.00)"]


@pytest.mark.slow
def test_no_secret_reaches_the_files_of_wandb(tmp_path):
    """Planted in settings, on the command line and in the remote of the repository; not one is in any file."""
    pytest.importorskip("wandb")
    planted = {
        "hub_token": "CANARY-hub-token-1", "run_name": "run hf_CANARYname1234567890",
        "hub_model_id": "https://me:CANARYurl3@host/x", "optim_args": "api_key=CANARYargs4567",
    }  # fmt: skip
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom rlkd.io.redaction import redact_command_line\n"
        "from tiny_runs import make\nredact_command_line()\n"
        f"make('reinforce', Path(sys.argv[1]), max_steps=1, report_to='wandb', **{planted!r}).run()\n"
    )
    for command in (["init", "-q"], ["remote", "add", "origin", "https://me:CANARYgit5@host/x.git"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    environment = _environment() | {
        "WANDB_MODE": "offline", "WANDB_API_KEY": "CANARY" + "c0" * 17, "HF_TOKEN": "hf_CANARYenv12345678901",
    }  # fmt: skip
    arguments = [sys.executable, str(script), str(tmp_path / "run"), "--password", "CANARY-flag-6"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(b"redacted" in path.read_bytes() for path in files)  # the settings are there
    leaks = {path.name for path in [*files, *(tmp_path / "run").rglob("*.json")] if b"CANARY" in path.read_bytes()}
    assert not leaks
    assert "CANARY" not in done.stdout + done.stderr


@pytest.mark.slow
def test_trackio_gets_the_names_of_the_log_and_the_samples(tmp_path):
    pytest.importorskip("trackio")
    from transformers.integrations import is_trackio_available

    if not is_trackio_available():
        pytest.skip("transformers does not see trackio")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tiny_runs import examples, make\n"
        "make('reinforce', Path(sys.argv[1]), max_steps=2, report_to='trackio', project='tiny', run_name='one',\n"
        "     eval_strategy='steps', eval_steps=1, eval_examples=examples(4)).run()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        env=_environment() | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {name for line in logged(tmp_path / "run") for name in line}
    kept = _trackio_names(tmp_path / "trackio")
    assert {"train/regret", "train/kl", "train/tokens_per_second"} <= kept
    expected = {f"eval/{n.removeprefix('eval_')}" for n in names if n.startswith("eval_")}
    assert expected <= kept
    assert NAME in kept
    assert len(_trackio_runs(tmp_path / "trackio")) == 1


def _environment():
    tests = Path(__file__).parents[1]
    folders = os.pathsep.join([str(tests.parent), str(tests), str(tests / "trainers")])
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}


def _trackio_names(folder):
    """Names of everything that trackio stored."""
    found = set()
    for path in folder.glob("*.db"):
        with sqlite3.connect(path) as store:
            found |= {name for (text,) in store.execute("select metrics from metrics") for name in json.loads(text)}
    return found


def _trackio_runs(folder):
    """The runs that trackio stored numbers of."""
    found = set()
    for path in folder.glob("*.db"):
        with sqlite3.connect(path) as store:
            columns = [row[1] for row in store.execute("pragma table_info(metrics)")]
            keys = ", ".join(name for name in ("run_id", "run_name") if name in columns)
            found |= set(store.execute(f"select distinct {keys} from metrics"))
    return found
