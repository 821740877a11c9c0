"""A student that FSDP2 shards over two processes trains as one process does, resumes exactly, and is saved whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_processes
from safetensors.torch import load_file
from test_processes import METRICS, TIMES, assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlkd.runs.checkpoints import damage
from tiny_runs import assert_same, logged

ROOT = Path(__file__).parents[2]


def launch(folder):
    """sharded_processes.py under the recipe's configuration."""
    config = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    script = Path(sharded_processes.__file__)
    paths = [str(ROOT), str(ROOT / "tests"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def lines(folder):
    """What was logged of steps and evaluations, but for clocks."""
    rows = [row for row in logged(folder) if "train_loss" not in row]  # of the process, not of the run
    return [{k: v for k, v in row.items() if not any(part in k for part in TIMES)} for row in rows]


@pytest.mark.multi
def test_a_sharded_run_is_the_run_of_one_process(tmp_path):
    done = launch(tmp_path)
    assert (tmp_path / "shares-0.json").exists(), done.stderr[:4000]
    for kind in sharded_processes.RUNS:
        folder, one = tmp_path / kind, sharded_processes.build(kind, tmp_path / f"{kind}-one", 8)
        one.train()
        one.save_model()
        weights = load_file(folder / "model.safetensors")
        assert_close(weights, load_file(one.run_folder / "model.safetensors"))
        for found, expected in zip(lines(folder), lines(one.run_folder), strict=True):
            assert found == pytest.approx(expected, rel=METRICS, abs=METRICS), (kind, expected["step"])
        if kind in sharded_processes.RESUMED:
            resumed = tmp_path / f"{kind}-resumed"
            assert_same(load_file(resumed / "model.safetensors"), weights)
            assert lines(resumed) == lines(folder)
        auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM
        loaded, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (kind not in ("gkd", "llama"))
    for rank in (0, 1):
        shares = json.loads((tmp_path / f"shares-{rank}.json").read_text())
        assert all(0.4 < share < 0.6 for kind in shares.values() for share in kind), shares
    # The last run: process 1 was killed, the other and the launcher end and say so.
    assert done.returncode == 1
    assert re.search(r"local_rank: 1\b", done.stderr)
    assert re.search(r"SIGKILL|exitcode *: -9", done.stderr)
    assert damage(tmp_path / "killed" / "checkpoint-2") is None
    # One process goes on from there, with the optimizer's state.
    more = {"gradient_accumulation_steps": 4, "allow_config_change": True}
    rest = sharded_processes.build("reinforce", tmp_path / "killed", 4, **more)
    rest.train(resume_from_checkpoint="auto")
    rest.save_model()
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("killed", "reinforce")]
    assert_close(*models)
