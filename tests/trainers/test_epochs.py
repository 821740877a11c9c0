"""Runs of several epochs, in which prompts repeat: killed twice they are the undisturbed run, and no cache counts."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import chaos
from rlkd.runs.checkpoints import checkpoints

KINDS = list(chaos.EPOCHS)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["chaos"])


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A run of three epochs that nothing disturbed, with a checkpoint after every rollout batch."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    trainer = chaos.build_epochs(request.param, folder)
    trainer.train()
    return request.param, folder, chaos.outcome(trainer)


def cut(folder, after):
    """Leave what a run had saved that was killed soon after step `after`: its logs go on to the end."""
    for step, path in checkpoints(folder).items():
        if step > after:
            shutil.rmtree(path)


def test_a_run_of_three_epochs_killed_twice_is_the_undisturbed_run(whole, tmp_path):
    kind, folder, reference = whole
    killed = tmp_path / "run"
    shutil.copytree(folder, killed)
    steps = sorted(checkpoints(folder))
    for part in (3, 3 / 2):  # in the first epoch and in the second
        cut(killed, steps[int(len(steps) / part) - 1])
        trainer = chaos.build_epochs(kind, killed)
        trainer.train(resume_from_checkpoint="auto")
        assert chaos.difference(reference, chaos.outcome(trainer)) == ""


class WaitBeforeTheEnd(TrainerCallback):
    """A fast process must not end the run before it is killed."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            time.sleep(600)


def a_part(case, folder):
    """The command, as it is repeated; its process is killed."""
    torch.set_num_threads(1)
    trainer = chaos.build_epochs(case, folder)
    trainer.add_callback(WaitBeforeTheEnd())
    trainer.train(resume_from_checkpoint="auto")


@pytest.mark.fault
def test_processes_killed_twice_at_random_moments(whole, tmp_path, monkeypatch):
    kind, _, reference = whole
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(chaos.__file__).parent), *sys.path]))
    draw, folder = random.Random(kind), tmp_path / "run"
    for part in (1, 2):
        process = PROCESSES.Process(target=a_part, args=(kind, folder))
        process.start()
        last = chaos.EPOCHS[kind][1]["max_steps"]
        while process.is_alive() and max(checkpoints(folder), default=0) < part * last / 3:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    trainer = chaos.build_epochs(kind, folder)
    trainer.train(resume_from_checkpoint="auto")
    assert chaos.difference(reference, chaos.outcome(trainer)) == ""


@pytest.mark.parametrize("megabytes", [0.0, pytest.param(0.002, marks=pytest.mark.slow)])
def test_the_size_of_the_teachers_cache_reaches_no_weight(whole, tmp_path, megabytes):
    """Without a cache, and with one that is always full."""
    kind, _, reference = whole
    if kind == "tkd":
        pytest.skip("its cache is on disk")
    trainer = chaos.build_epochs(kind, tmp_path, cache_bytes=int(megabytes * 2**20))
    trainer.train()
    assert chaos.difference(reference, chaos.outcome(trainer)) == ""
