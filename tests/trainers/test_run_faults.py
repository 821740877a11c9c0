"""Training that is killed, stopped, starved, damaged or shared continues as if uninterrupted, or reports why not."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faults_table
import pytest
import torch
from test_tkd import make as make_tkd
from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

import chaos
from rlkd.errors import CheckpointError, ConfigError, InterruptedRunError, LockedError, RlkdError
from rlkd.runs import checkpoints
from rlkd.runs.checkpoints import LOGS, MANIFEST, SET_ASIDE, STATE_FILE, UNFINISHED, damage
from tiny_runs import assert_same, examples, logged, make, weights

KINDS = list(chaos.RUNS)
# One trainer in the default suite, all of them where time allows.
FASTEST = [kind if kind == "supervised" else pytest.param(kind, marks=pytest.mark.fault) for kind in KINDS]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["chaos"])


@pytest.fixture(scope="module")
def server():
    """The process that others are forked from, with everything imported; Python 3.11 does not tell it our sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(chaos.__file__).parent), *sys.path]))
        first = PROCESSES.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three checkpoints that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = build(folder)
    trainer.train()
    return folder, chaos.outcome(trainer)


def build(folder, *callbacks, **options):
    settings = {"max_steps": 3, "save_steps": 1, "save_strategy": "steps", "per_device_train_batch_size": 2}
    return make("supervised", folder, callbacks=list(callbacks), n=12, **{**settings, **options})


def copied(whole, tmp_path, last=None):
    """A copy of the undisturbed run, as it was when checkpoint `last` was the newest."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for step in range((last or 3) + 1, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


def goes_on(folder, whole, wanted="auto"):
    trainer = build(folder)
    trainer.train(resume_from_checkpoint=wanted)
    assert chaos.difference(whole[1], chaos.outcome(trainer)) == ""
    return trainer


# Killed


@pytest.mark.fault
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_a_save_and_at_random_moments(tmp_path, server, kind):
    """A seeded sample; `make test-faults` kills at every file event and at 20 moments of each trainer."""
    with PROCESSES.Pool(1) as pool:
        result = pool.apply(chaos.trial, (kind, tmp_path / "runs", 6, 3, 0))
    assert result["failures"] == {}
    assert (result["events_resumed"], result["moments_resumed"]) == (6, 3)


def test_what_a_killed_save_left_is_removed(tmp_path, whole):
    folder = copied(whole, tmp_path, last=2)
    (folder / UNFINISHED / "checkpoint-3").mkdir(parents=True)
    (folder / UNFINISHED / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    goes_on(folder, whole)
    assert not (folder / UNFINISHED).exists()


def test_a_checkpoint_is_in_place_only_when_whole(tmp_path, monkeypatch):
    """At the moment of the rename everything is there, on disk and listed; before it, nothing is."""
    seen = []
    rename = os.rename

    def watch(source, target):
        if "checkpoint-" in str(target):
            seen.append((damage(Path(source)), Path(target).exists()))
        rename(source, target)

    monkeypatch.setattr(checkpoints.os, "rename", watch)
    build(tmp_path, max_steps=2).train()
    assert seen == [(None, False)] * 2
    assert damage(tmp_path / "checkpoint-2") is None
    listed = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())["files"]
    assert listed.keys() == {file.name for file in (tmp_path / "checkpoint-2").iterdir()} - {MANIFEST}
    assert "training_args.bin" not in listed


@pytest.mark.parametrize("damaged", [None, "the new one", "both"])
def test_killed_between_the_renames_of_a_replaced_checkpoint(tmp_path, whole, monkeypatch, damaged):
    """Of the two that are there, the new one is put back, or the one that it was to replace."""
    folder = copied(whole, tmp_path)
    new = folder / UNFINISHED / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-3", new)
    rename = os.rename

    def killed(source, target):
        if source == new:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoints.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.commit(new, folder / "checkpoint-3")
    monkeypatch.undo()
    assert not (folder / "checkpoint-3").exists()
    for path in (folder / UNFINISHED).iterdir():
        if damaged == "both" or (damaged == "the new one" and path == new):
            os.truncate(path / "model.safetensors", 100)
    trainer = goes_on(folder, whole)
    resumed = json.loads((folder / "run.json").read_text())["resumed"][-1]["checkpoint"]
    assert Path(resumed).name == ("checkpoint-2" if damaged == "both" else "checkpoint-3")
    assert trainer.state.global_step == 3
    assert not (folder / UNFINISHED).exists()


def test_a_checkpoint_that_was_whole_before_its_rename_is_put_in_place(tmp_path, whole):
    folder = copied(whole, tmp_path)
    (folder / UNFINISHED).mkdir()
    os.rename(folder / "checkpoint-3", folder / UNFINISHED / "checkpoint-3")
    with pytest.raises(ConfigError, match=r"holds checkpoints of an earlier run \(up to step 3\)"):
        build(folder).train()
    assert damage(folder / "checkpoint-3") is None


def test_older_checkpoints_are_deleted_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    build(tmp_path, max_steps=1, save_total_limit=1).train()

    def fails(written, final):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("rlkd.runs.resumable.commit", fails)
    trainer = build(tmp_path, max_steps=2, save_total_limit=1)
    with pytest.raises(RlkdError, match="cannot be written: Input/output error"):
        trainer.train(resume_from_checkpoint=True)
    assert damage(tmp_path / "checkpoint-1") is None
    monkeypatch.undo()
    build(tmp_path, max_steps=2, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# Damaged


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << offset % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found(tmp_path, whole):
    original = whole[0] / "checkpoint-3"
    draw = random.Random(0)
    for file in sorted(original.iterdir()):
        folder = tmp_path / file.name
        shutil.copytree(original, folder)
        for _ in range(20):
            flip(folder / file.name, draw.randrange(file.stat().st_size))
            problem = damage(folder)
            if file.name != MANIFEST:
                assert problem.startswith(f"{file.name} was changed after it was written")
            elif problem is None:  # white space between its entries, at most
                read = [json.loads((f / MANIFEST).read_bytes())["files"] for f in (folder, original)]
                assert read[0] == read[1]
            shutil.copy(file, folder / file.name)
        assert damage(folder) is None


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_the_newest_whole_checkpoint_is_taken_and_the_others_named(tmp_path, whole, caplog, kind):
    folder = copied(whole, tmp_path)
    for step, name in ((3, "optimizer.pt"), (2, "model.safetensors")):
        path = folder / f"checkpoint-{step}" / name
        if kind == "missing":
            path.unlink()
        elif kind == "truncated":
            os.truncate(path, 100)
        else:
            flip(path, 200)
    goes_on(folder, whole)
    said = {"missing": "is missing", "truncated": "has 100 bytes, expected", "flipped": "its sha256 differs"}[kind]
    for step, name in ((3, "optimizer.pt"), (2, "model.safetensors")):
        assert re_found(rf"skipped .*checkpoint-{step}: {name} .*{said}", caplog)
    assert {path.name for path in (folder / SET_ASIDE).iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert all(damage(folder / f"checkpoint-{step}") is None for step in (1, 2, 3))


def re_found(pattern, caplog):
    return any(re.search(pattern, record.getMessage()) for record in caplog.records)


def test_no_whole_checkpoint_is_an_error_that_names_each(tmp_path, whole):
    folder = copied(whole, tmp_path, last=2)
    (folder / "checkpoint-1" / MANIFEST).unlink()
    (folder / "checkpoint-2" / "scheduler.pt").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint-2: scheduler.pt is missing\n  checkpoint-1: it has no"):
        build(folder).train(resume_from_checkpoint=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE, "trainer_state.json"])
def test_a_given_checkpoint_that_lacks_a_file_is_an_error(tmp_path, whole, name):
    folder = copied(whole, tmp_path)
    (folder / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoint-2: {name} is missing. Checkpoints there: checkpoint-3"):
        build(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_folder_that_is_not_a_checkpoint_is_an_error_with_those_nearby(tmp_path, whole):
    with pytest.raises(CheckpointError, match=r"it has no manifest.json.*Checkpoints there: checkpoint-3"):
        build(tmp_path).train(resume_from_checkpoint=str(whole[0]))
    with pytest.raises(CheckpointError, match=r"no such folder\. Checkpoints there: checkpoint-3"):
        build(tmp_path).train(resume_from_checkpoint=str(whole[0] / "checkpoint-7"))


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, whole, name):
    """Even if its author also updated the manifest."""
    folder = copied(whole, tmp_path, last=2)
    checkpoint, sprung = folder / "checkpoint-2", tmp_path / "sprung"
    torch.save({"state": Trap(sprung)}, checkpoint / name, pickle_module=pickle)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {
        "bytes": (checkpoint / name).stat().st_size,
        "sha256": checkpoints.sha256(checkpoint / name),
    }
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    if name == "training_args.bin":
        goes_on(folder, whole)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            build(folder).train(resume_from_checkpoint=True)
    assert not sprung.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert sprung.exists()  # the trap works


# The run folder


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path, whole):
    folder = copied(whole, tmp_path)
    with pytest.raises(ConfigError, match=r"holds checkpoints of an earlier run \(up to step 3\)"):
        build(folder).train()
    assert not (folder / SET_ASIDE).exists()


@pytest.mark.parametrize("word", [True, "true", "auto"])
def test_a_run_without_checkpoints_starts_and_logs_that(tmp_path, whole, caplog, word):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    goes_on(folder, whole, word)
    assert re_found("no checkpoint in .* yet: starting a new run", caplog)
    assert (folder / SET_ASIDE / "metrics.jsonl").exists()


def test_lines_logged_after_the_checkpoint_occur_once(tmp_path, whole):
    """Also lines of the checkpoint's own step that came after it, and of files that are new since."""
    folder = copied(whole, tmp_path, last=2)
    for name in LOGS:
        with (folder / name).open("a") as file:
            file.write(json.dumps({"step": 2, "late": True}) + "\n" + '{"torn')
    (folder / "other.jsonl").write_text("not ours\n")
    goes_on(folder, whole)
    assert not any("late" in row for row in logged(folder))
    assert not any((folder / name).exists() for name in LOGS[1:])
    assert (folder / "other.jsonl").read_text() == "not ours\n"


def test_going_back_sets_later_checkpoints_aside(tmp_path, whole):
    folder = copied(whole, tmp_path)
    goes_on(folder, whole, str(folder / "checkpoint-1"))
    assert {path.name for path in (folder / SET_ASIDE).iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_resuming_a_finished_run_changes_nothing(tmp_path, whole):
    folder = copied(whole, tmp_path)
    trainer = build(folder)
    trainer.train(resume_from_checkpoint="auto")
    assert_same(weights(trainer.trained), whole[1][0])
    assert [row["step"] for row in logged(folder)] == [row["step"] for row in logged(whole[0])]


@pytest.mark.fault
def test_the_best_checkpoint_is_kept_and_found_again(tmp_path):
    best = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "regret",
        "greater_is_better": False, "save_total_limit": 1, "learning_rate": 0.3, "max_steps": 4,
    }  # fmt: skip
    build(tmp_path / "straight", eval_examples=chaos.examples(3), **best).train()
    trainer = build(tmp_path / "cut", Stop(2, signal.SIGTERM), eval_examples=chaos.examples(3), **best)
    with pytest.raises(InterruptedRunError):
        trainer.train()
    resumed = build(tmp_path / "cut", eval_examples=chaos.examples(3), **best)
    resumed.train(resume_from_checkpoint="auto")
    names = [Path(json.loads(next(iter((tmp_path / run).glob("checkpoint-*/trainer_state.json"))).read_text())
                  ["best_model_checkpoint"]) for run in ("straight", "cut")]  # fmt: skip
    assert names[0].name == names[1].name
    assert all(path.parent.name in ("straight", "cut") and path.is_dir() for path in names)


# Signals


class Stop(TrainerCallback):
    """Sends a signal to its own process in the middle of a step."""

    def __init__(self, step, signum, times=1):
        self.step, self.signum, self.times = step, signum, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for n in range(self.times):
                time.sleep(0.3 * n)
                os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("kind", FASTEST)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_continues_from_there(tmp_path, kind, signum, code):
    straight = chaos.build(kind, tmp_path / "straight")
    straight.train()
    stopping = chaos.build(kind, tmp_path / "cut", Stop(3, signum))
    stopping.args.save_strategy = "no"  # also of a run that saves nothing by itself
    handler = signal.getsignal(signum)
    with pytest.raises(InterruptedRunError, match=f"stopped by {signum.name}: .*checkpoint-[34] is saved") as error:
        stopping.train()
    assert error.value.exit_code == code
    assert signal.getsignal(signum) is handler
    resumed = chaos.build(kind, tmp_path / "cut")
    resumed.args.save_strategy = "no"
    resumed.train(resume_from_checkpoint="auto")
    assert chaos.difference(chaos.outcome(straight), chaos.outcome(resumed)) == ""


def test_a_second_interrupt_ends_at_once(tmp_path):
    with pytest.raises(SystemExit) as error:
        build(tmp_path, Stop(2, signal.SIGINT, times=2)).train()
    assert error.value.code == 130
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.fault
def test_a_signal_ends_a_recipe_with_its_code_within_seconds(tmp_path, server):
    process = PROCESSES.Process(target=long_run, args=(str(tmp_path / "run"),))
    process.start()
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert time.monotonic() - begun < 15
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert damage(checkpoint) is None


def long_run(folder):
    from rlkd.settings.parsing import run_main

    torch.set_num_threads(1)
    run_main(build(Path(folder), max_steps=100_000, save_steps=100_000).run)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# Two writers


@pytest.mark.fault
def test_two_writers(tmp_path, server, caplog):
    folder = tmp_path / "run"
    process = PROCESSES.Process(target=long_run, args=(str(folder),))
    process.start()
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    with pytest.raises(LockedError, match=f"process {process.pid} on {socket.gethostname()}") as error:
        build(folder).train(resume_from_checkpoint="auto")
    assert error.value.exit_code == 75
    process.kill()
    process.join()
    build(folder).train(resume_from_checkpoint="auto")
    assert re_found(f"recovered the lock of process {process.pid}", caplog)


# Several processes


def launched(folder, killed_at=0, steps=4):
    """A run of two_ranks.py on two processes."""
    script = Path(chaos.__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, str(folder), str(killed_at), str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.multi
def test_one_of_two_ranks_killed(tmp_path):
    """The other ends within a minute, the launcher names the dead one, and the repeated command ends the same run."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert ended(launched(straight)) == 0
    process = launched(folder, killed_at=3)
    wait_for(lambda: (folder / "checkpoint-2").exists())
    begun = time.monotonic()
    _, message = process.communicate(timeout=300)
    assert process.returncode == 1
    assert time.monotonic() - begun < 60
    assert re.search(r"local_rank: 1\b", message)
    assert re.search(r"SIGKILL|exitcode *: -9", message)
    assert damage(folder / "checkpoint-2") is None
    # One process alone would see half of the rows.
    expected = "was written by 2 processes, this run has 1.*Set gradient_accumulation_steps: 2"
    with pytest.raises(CheckpointError, match=expected):
        chaos.build("reinforce", folder).train(resume_from_checkpoint="auto")
    other = shutil.copytree(folder, tmp_path / "other")
    assert ended(launched(folder)) == 0
    models = [chaos.safetensors.torch.load_file(path / "model.safetensors") for path in (straight, folder)]
    assert_same(*models)
    assert [row["step"] for row in logged(folder)] == [row["step"] for row in logged(straight)]
    # From two processes to one, killed again, and back to two.
    chaos.build("reinforce", other, gradient_accumulation_steps=2).train(resume_from_checkpoint="auto")
    shutil.rmtree(other / "checkpoint-4")
    assert ended(launched(other)) == 0
    resplit = chaos.safetensors.torch.load_file(other / "model.safetensors")
    assert all(torch.allclose(resplit[name], tensor, rtol=0, atol=2e-5) for name, tensor in models[0].items())
    assert [row["step"] for row in logged(other)] == [row["step"] for row in logged(straight)]


@pytest.mark.multi
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_one_checkpoint_of_all_ranks(tmp_path, signum):
    """SIGTERM to the launcher alone; Ctrl-C, which a terminal sends to all of them."""
    folder = tmp_path / "run"
    process = launched(folder, steps=100_000)
    wait_for(lambda: (folder / "checkpoint-2").exists())
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, message = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = re.findall(rf"stopped by {signum.name}: \S*(checkpoint-\d+) is saved", message)
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert damage(folder / saved[0]) is None
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in (folder / saved[0]).iterdir()}


# No space


def test_a_full_disk_is_named_with_what_is_needed(tmp_path, monkeypatch, whole):
    sync = os.fsync

    def full(handle):
        if "checkpoint-3" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(RlkdError, match=r"no space left for .*checkpoint-3: it needs about \d+\.\d\d MB") as error:
        build(tmp_path).train()
    assert error.value.exit_code == 1
    monkeypatch.undo()
    assert not (tmp_path / UNFINISHED).exists()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    goes_on(tmp_path, whole)


@pytest.mark.fault
@pytest.mark.parametrize("free", [0.1, 0.5, 0.9])
def test_a_full_tmpfs(tmp_path, server, whole, free):
    """Space for two checkpoints and a part of the third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(4096 * -(-f.stat().st_size // 4096) for f in (whole[0] / "checkpoint-3").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int((2 + free) * size) // 1024 + 16}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        process = PROCESSES.Process(target=short_run, args=(str(disk / "run"), str(tmp_path / "log")))
        process.start()
        process.join(120)
        message = (tmp_path / "log").read_text()
        assert process.exitcode == 1, message
        assert "no space left for" in message
        assert {path.name for path in (disk / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        goes_on(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def short_run(folder, log):
    from rlkd.settings.parsing import run_main

    torch.set_num_threads(1)
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    run_main(lambda: build(Path(folder)).train())


# Trackers


@pytest.mark.parametrize("event", ["on_train_begin", "on_log"])
def test_a_tracker_that_is_down_does_not_end_the_run(tmp_path, monkeypatch, whole, caplog, event):
    calls = []

    def down(self, *args, **kwargs):
        calls.append(event)
        raise ConnectionError("tracker unreachable")

    for name in ("on_train_begin", "on_log", "on_train_end"):
        monkeypatch.setattr(WandbCallback, name, down if name == event else lambda *args, **kwargs: None)
    trainer = build(tmp_path, report_to="wandb")
    trainer.train()
    assert chaos.difference(whole[1], chaos.outcome(trainer)) == ""
    assert calls == [event]
    assert re_found("the tracker Wandb failed .*ConnectionError: tracker unreachable", caplog)


# Determinism


@pytest.mark.parametrize("kind", FASTEST)
def test_the_same_seed_gives_the_same_weights(tmp_path, kind):
    outcomes = []
    for n in range(2):
        trainer = chaos.build(kind, tmp_path / str(n))
        trainer.train()
        outcomes.append(chaos.outcome(trainer))
    assert chaos.difference(*outcomes) == ""


# The page


def test_every_proof_named_in_the_documentation_exists():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = faults_table.rows(page)
    assert len(rows) > 60
    for row in rows:
        proofs = faults_table.PROOF.findall(row)
        assert proofs, row
        for file, name in (proof.split("::") for proof in proofs):
            assert f"\ndef {name}(" in (root / file).read_text(encoding="utf-8"), (file, name)


# Folders that cannot be written, or are gone


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


@pytest.mark.parametrize(
    "file",
    [
        "held_out.jsonl",
        *(
            pytest.param(file, marks=pytest.mark.fault)
            for file in ("metrics.jsonl", "samples.jsonl", "token_rewards.jsonl")
        ),
    ],
)
def test_a_full_disk_at_an_evaluation_loses_nothing(tmp_path, monkeypatch, file):
    """Whichever log finds the disk full: one line, and the run continues from its checkpoint as if undisturbed."""
    options = {"eval_examples": examples(4), "eval_strategy": "steps", "eval_steps": 1}
    straight = build(tmp_path / "straight", **options)
    straight.train()
    opened, full = Path.open, []

    def limited(path, mode="r", *args, **how):
        if full and path.name.removesuffix(".tmp") == file and mode[0] in "awx":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        trainer = build(tmp_path / "run", At(2, lambda: full.append(True)), **options)
        with pytest.raises(RlkdError, match=rf"no space left for .*{re.escape(file)}") as error:
            trainer.train()
    assert error.value.exit_code == 1
    resumed = build(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint="auto")
    assert_same(weights(straight.policy), weights(resumed.policy))
    for name in ("metrics.jsonl", "held_out.jsonl", "samples.jsonl"):
        counts = [len((tmp_path / run / name).read_text().splitlines()) for run in ("straight", "run")]
        assert counts[0] == counts[1], name


def test_a_full_disk_when_the_student_is_saved(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    trainer.train()
    monkeypatch.setattr(type(trainer.policy.student), "save_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(RlkdError, match=r"no space left for .*: it needs about"):
        trainer.save_model()


def test_a_folder_that_is_removed_under_the_run(tmp_path):
    trainer = build(tmp_path / "run", At(2, lambda: shutil.rmtree(tmp_path / "run")))
    with pytest.raises(RlkdError, match=r"run was removed while this run was writing to it"):
        trainer.train()
    trainer = build(tmp_path / "again")
    trainer.train()
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "again").write_text("a file now")
    with pytest.raises(RlkdError, match=r"again was removed|again is a file"):
        trainer.save_model()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_output_that_is_no_folder(tmp_path, kind):
    place = tmp_path / kind
    place.write_text("mine") if kind == "file" else place.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"is a file, not a folder|is a link to nowhere, which does not exist"):
        build(place).train()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.fault
def test_a_read_only_file_system(tmp_path, server, whole):
    """A run that is resumed where nothing can be written ends at once, before it trains."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        shutil.copytree(whole[0], disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in (disk / "run", disk / "new"):
            process = PROCESSES.Process(target=short_run, args=(str(folder), str(tmp_path / "log")))
            process.start()
            process.join(120)
            message = (tmp_path / "log").read_text()
            assert process.exitcode == 2, message
            assert "is on a read-only file system. Name another folder." in message.splitlines()[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_full_disk_for_the_outputs_of_a_teacher(tmp_path, monkeypatch):
    """A sparse file would be filled through a mapping, and the process die of SIGBUS."""

    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RlkdError, match=r"no space left for .*logits\.npy: it needs 0\.01 MB"):
            make_tkd(tmp_path, preset="kd", teacher_cache="logits").train()
    assert not list((tmp_path / "teacher_cache").iterdir())
    make_tkd(tmp_path, preset="kd", teacher_cache="logits").train()
