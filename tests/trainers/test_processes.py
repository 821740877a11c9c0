"""Two processes with half the rows each are the same run as one process with all of them, which may continue it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file

from rlkd.runs.checkpoints import checkpoints
from tiny_runs import logged

SCRIPT = Path(__file__).with_name("two_processes.py")
TIMES = ("time", "seconds", "per_second", "runtime")
# Sums of float32 gradients in another order, a few Adam steps later.
WEIGHTS, METRICS = 2e-5, 1e-4


def launch(kind, folder, processes):
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *launcher, str(SCRIPT), kind, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


def continued(kind, folder, copy):
    """The weights that one process ends with, from the first checkpoint of two and with as many micro-batches."""
    shutil.copytree(folder, copy)
    for path in list(checkpoints(copy).values())[:-1]:  # newest first
        shutil.rmtree(path)
    steps = 4 if kind == "reinforce" else 2
    trainer = two_processes.build(kind, copy, per_device_train_batch_size=4, gradient_accumulation_steps=steps)
    trainer.train(resume_from_checkpoint="auto")
    assert len({row["step"] for row in logged(copy)}) == len({row["step"] for row in logged(folder)})
    trainer.save_model()
    return load_file(copy / "model.safetensors")


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["ppo", "reinforce", "gkd", "supervised", "tkd"])
def test_two_processes_are_one_run(tmp_path, kind):
    for processes in (1, 2):
        launch(kind, tmp_path / str(processes), processes)
    one, two = (load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2))
    assert_close(two, one)
    assert_close(continued(kind, tmp_path / "2", tmp_path / "continued"), one)
    lines = [logged(tmp_path / str(n)) for n in (1, 2)]
    assert len(lines[0]) == len(lines[1])
    for first, second in zip(*lines, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if not any(part in key for part in TIMES):
                assert second[key] == pytest.approx(value, rel=METRICS, abs=METRICS), (key, first["step"])
    if kind == "tkd":
        return  # writes no samples
    samples = [
        [json.loads(line) for line in (tmp_path / str(n) / "samples.jsonl").read_text().splitlines()] for n in (1, 2)
    ]
    assert [row["id"] for row in samples[1]] == [f"row {i}" for i in range(5)] * (len(samples[1]) // 5)
    for first, second in zip(*samples, strict=True):
        assert [first[k] for k in ("step", "id", "student", "teacher", "sample_student")] == [
            second[k] for k in ("step", "id", "student", "teacher", "sample_student")
        ]
