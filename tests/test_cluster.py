"""recipes/cluster on a scheduler that starts the processes: labels, their merge, warm-up, RL; a part that dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest

from rlkd.cli.main import main

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--teacher=runs/tiny/teacher", "--dataset=runs/tiny/train.jsonl", "--input-column=note", "--strategy=sample",
    "--templates=recipes/tiny_templates.yaml", "--max-new-tokens=8", "--shard-rows=8", "--quiet",
]  # fmt: skip


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("labels-*.parquet")}


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with the recipes and the tiny models; returns what runs a command there, and the jobs so far."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    jobs, commands = tmp_path / "jobs", tmp_path / "bin"
    for folder in (jobs, commands):
        folder.mkdir()
    fake_slurm.install(commands)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "JOBS": str(jobs), "PARTS": "2", "OUT": "labels", "OMP_NUM_THREADS": "1"}
    own |= {"LAUNCH": "--cpu --num_processes 1", "PYTHONPATH": str(ROOT), "SBATCH": "--partition=cpu"}

    def run(*command, **environment):
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | own | environment, capture_output=True, text=True, timeout=500
        )
        logs = "".join(file.read_text()[-2000:] for file in jobs.glob("*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        states = [json.loads((jobs / f"{n}.json").read_text()) for n in range(1, 1 + len(list(jobs.glob("*.json"))))]
        return [(state["script"], state["options"].get("array"), state["ok"]) for state in states], logs

    run(sys.executable, "recipes/tiny_models.py", "--to", "runs/tiny")
    return tmp_path, run


@pytest.mark.slow
@pytest.mark.fault
def test_a_part_that_dies_is_the_only_one_submitted_again(user, monkeypatch):
    folder, run = user
    trainings = {"WARM_UP": "recipes/seqkd_t0_to_t5.tiny.yaml", "RL": "recipes/ppo_t0_to_t5.tiny.yaml"}
    submit = ("bash", "recipes/cluster/submit.sh", *FLAGS)
    first, _ = run(*submit, KILL=f"1 {folder}/labels/manifest-1-of-2.jsonl", **trainings)
    names = ["labels.sbatch", "merge.sbatch", "train.sbatch", "train.sbatch"]
    assert first == [(name, "0,1" if name == "labels.sbatch" else None, False) for name in names]
    ends = [(folder / f"labels/manifest-{part}-of-2.jsonl").read_text().splitlines()[-1] for part in range(2)]
    assert [json.loads(end)["kind"] for end in ends] == ["finished", "shard"]
    assert not (folder / "runs" / "tiny" / "seqkd").exists()
    again, logs = run(*submit, **trainings)
    assert again[4:] == [(name, "1" if name == "labels.sbatch" else None, True) for name in names], logs
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["generate-pseudolabels", *FLAGS, "--out", "whole"])
    assert end.value.code == 0
    assert shards(folder / "labels") == shards(folder / "whole") != {}
    for job in ("seqkd", "ppo"):
        assert (folder / "runs" / "tiny" / job / "model.safetensors").exists()


def test_nothing_is_submitted_twice_while_jobs_wait(tmp_path):
    """Jobs of another folder, or without a comment, are no obstacle."""
    jobs, commands = tmp_path / "jobs", tmp_path / "bin"
    for folder in (jobs, commands):
        folder.mkdir()
    fake_slurm.install(commands)
    own = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "JOBS": str(jobs), "PARTS": "2", "FULL": "1"}

    def submit(out):
        command = ["bash", str(ROOT / "recipes/cluster/submit.sh"), "--teacher=t"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | own | {"OUT": out}, capture_output=True, text=True, timeout=100
        )
        return done.returncode, done.stderr, len(list(jobs.glob("*.json")))

    (jobs / "1.json").write_text(json.dumps({"waits": True, "options": {}}))
    assert submit("my labels") == (0, "", 3)
    code, error, count = submit(f"{tmp_path}/my labels")
    assert (code, count) == (75, 3)
    assert error.startswith(f"error: jobs of {tmp_path}/my labels still wait or run: 2 3.")
    assert "scancel 2 3" in error
    assert submit("my") == (0, "", 5)
    for number in (2, 3):
        (jobs / f"{number}.json").unlink()
    assert submit("my labels")[0] == 0
