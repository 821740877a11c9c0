"""Runs that are killed, stopped, starved or shared: afterwards the disk holds what an undisturbed run leaves."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import stub
from rlkd.errors import ConfigError, LockedError, RlkdError
from rlkd.io import files
from rlkd.labels.store import load_pseudolabels

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["stub"])


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process that runs are forked from, with everything imported; Python 3.11 does not tell it our sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        first = PROCESSES.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The source, and the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    source = stub.write_rows(folder / "rows.jsonl")
    stub.label(source, folder / "out", stub.StubEngine(folder / "journal"))
    return source, folder / "out"


def start(source: Path, out: Path, seconds: float = 0.002):
    arguments = (str(source), str(out), str(out) + ".journal", seconds, str(out) + ".log")
    process = PROCESSES.Process(target=stub.run, args=arguments, daemon=True)
    process.start()
    return process


def answered(out: Path) -> Counter:
    journal = Path(str(out) + ".journal")
    return Counter(journal.read_text().splitlines() if journal.exists() else ())


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def check_equal(out: Path, whole: Path) -> None:
    assert stub.shards(out) == stub.shards(whole)
    visible = {file.name for file in out.iterdir() if not file.name.startswith(".")}
    assert visible == {file.name for file in whole.iterdir() if not file.name.startswith(".")}
    assert (out / "README.md").read_bytes() == (whole / "README.md").read_bytes()


def kill_and_resume(source: Path, out: Path, whole: Path, delay: float) -> bool:
    """Kill a run after `delay` seconds and finish it; False if its labels were finished by then."""
    process = start(source, out)
    time.sleep(delay)
    process.kill()
    process.join()
    if process.exitcode == 0 or any(entry["kind"] == "finished" for entry in stub.entries(out)):
        return False
    assert process.exitcode == -signal.SIGKILL
    committed = [entry["file"] for entry in stub.entries(out) if entry["kind"] == "shard"]
    inodes = {name: (out / name).stat().st_ino for name in committed}
    second = start(source, out)
    second.join(120)
    assert second.exitcode == 0, Path(str(out) + ".log").read_text()
    check_equal(out, whole)
    # What was committed was left alone, and at most one shard's prompts were answered twice.
    assert {name: (out / name).stat().st_ino for name in committed} == inodes
    made = [entry["shard"] for entry in stub.entries(out) if entry["kind"] == "shard"]
    assert sorted(made) == list(range(13))
    prompts = answered(whole.parent / "whole")
    redone = answered(out) - prompts
    assert not prompts - answered(out)
    assert redone.total() <= stub.SHARD_INPUTS * len(stub.TEMPLATES)
    return True


def kill_at_random(tmp_path, whole, kills: int, seed: int) -> None:
    source, reference = whole
    random_source = random.Random(seed)
    # How long a run takes here and now; its journal is also what every run must have answered.
    for name in ("warm", "timed"):
        begun = time.monotonic()
        undisturbed = start(source, tmp_path / name)
        undisturbed.join()
        assert undisturbed.exitcode == 0
        duration = time.monotonic() - begun
    os.replace(tmp_path / "timed.journal", reference.parent / "whole.journal")
    killed = attempts = 0
    while killed < kills:
        attempts += 1
        assert attempts < 5 * kills, "runs end before they can be killed"
        out = tmp_path / str(attempts)
        killed += kill_and_resume(source, out, reference, random_source.uniform(0, duration))


def test_killed_at_a_few_random_moments(tmp_path, whole):
    kill_at_random(tmp_path, whole, 3, seed=0)


@pytest.mark.fault
def test_killed_at_twenty_random_moments(tmp_path, whole):
    kill_at_random(tmp_path, whole, 20, seed=1)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_every_answer(tmp_path, whole, signum, code):
    source, reference = whole
    out = tmp_path / "out"
    process = start(source, out, seconds=0.02)
    wait_for(lambda: answered(out).total() > 40)
    os.kill(process.pid, signum)
    process.join(15)
    assert process.exitcode == code
    message = Path(str(out) + ".log").read_text()
    assert f"stopped by {signal.Signals(signum).name}" in message
    assert "Repeat the command to continue" in message
    before = answered(out)
    assert stub.entries(out)[-1]["kind"] in ("partial", "shard")
    stub.label(source, out, stub.StubEngine(Path(str(out) + ".journal")))
    check_equal(out, reference)
    # Nothing was answered twice: prompts are distinct within the rows of this source.
    assert (
        answered(out).total()
        == sum(entry["status"]["ok"] for entry in stub.entries(out) if entry["kind"] == "shard") // 2
    )
    assert before.total() > 40


def test_a_damaged_partial_is_not_used(tmp_path, whole):
    source, reference = whole
    out = tmp_path / "out"
    process = start(source, out, seconds=0.05)
    wait_for(lambda: any(out.glob("labels-*")) and answered(out).total() % 16 > 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(15)
    for partial in out.glob("partial-*"):
        partial.write_bytes(partial.read_bytes()[:-1] + b"x")
    stub.label(source, out)
    check_equal(out, reference)


def test_a_second_interrupt_ends_at_once(tmp_path, whole):
    source, _ = whole
    out = tmp_path / "out"
    process = start(source, out, seconds=30)
    wait_for(lambda: (out / "manifest.jsonl").exists())
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(15)
    assert process.exitcode == 130
    assert time.monotonic() - begun < 5


def test_two_writers(tmp_path, whole):
    source, reference = whole
    out = tmp_path / "out"
    process = start(source, out, seconds=0.5)
    wait_for(lambda: (out / "manifest.jsonl").exists())
    with pytest.raises(LockedError, match=f"process {process.pid} on {socket.gethostname()}") as error:
        stub.label(source, out)
    assert error.value.exit_code == 75
    second = start(source, out)
    second.join(60)
    assert second.exitcode == 75
    process.kill()
    process.join()
    # A dead process holds nothing.
    stub.label(source, out)
    check_equal(out, reference)


def test_a_full_disk_is_named_with_what_is_needed(tmp_path, whole, monkeypatch):
    source, reference = whole
    out = tmp_path / "out"
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        RlkdError, match=r"no space left for .*(labels-\d+\.parquet|manifest\.jsonl).*0\.\d\d MB"
    ) as error:
        stub.label(source, out)
    assert error.value.exit_code == 1
    monkeypatch.setattr(files.os, "fsync", sync)
    assert not list(out.glob("*.tmp"))
    assert any(entry["kind"] == "shard" for entry in stub.entries(out))
    stub.label(source, out)
    check_equal(out, reference)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_output_that_is_no_folder(tmp_path, whole, kind):
    place = tmp_path / kind
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"is a file, not a folder|is a link to nowhere, which does not exist"):
        stub.label(whole[0], place)
    assert not (tmp_path / "nowhere").exists()
    if kind == "file":
        assert place.read_text() == "mine"


def test_a_folder_that_is_removed_while_it_is_written(tmp_path, whole):
    out = tmp_path / "out"

    class Engine(stub.StubEngine):
        def answer(self, *args):
            if out.exists() and any(out.glob("labels-*.parquet")):
                shutil.rmtree(out)
            return super().answer(*args)

    with pytest.raises(RlkdError, match=r"out/.* cannot be written: the folder .*out was removed") as error:
        stub.label(whole[0], out, Engine())
    assert error.value.exit_code == 1
    assert not out.exists()


@pytest.mark.fault
def test_a_full_tmpfs(tmp_path, whole):
    source, reference = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        out = disk / "out"
        process = PROCESSES.Process(
            target=stub.run, args=(str(source), str(out), str(tmp_path / "journal"), 0, str(tmp_path / "log"))
        )
        process.start()
        process.join(60)
        assert process.exitcode == 1
        assert "no space left for" in (tmp_path / "log").read_text()
        committed = [entry["file"] for entry in stub.entries(out) if entry["kind"] == "shard"]
        assert committed
        assert all(stub.shards(out)[name] == stub.shards(reference)[name] for name in committed)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        stub.label(source, out)
        check_equal(out, reference)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_undisturbed_run_is_what_it_should_be(whole):
    """The oracle of this file: every row, template and sample once, in order, with the status the templates give."""
    _, out = whole
    rows = load_pseudolabels(out, statuses=None).to_list()
    expected = [(n, name, sample) for n in range(100) for name in ("some", "fails") for sample in range(2)]
    assert [(row["row"], row["template"], row["sample"]) for row in rows] == expected
    for row in rows:
        skipped = row["template"] == "some" and row["row"] % 7 == 3
        failed = row["template"] == "fails" and row["row"] % 11 == 5
        assert row["status"] == ("skipped" if skipped else "failed" if failed else "ok")
        assert (row["label"] is None) == (row["error"] is not None) == (skipped or failed)
    assert {row["error"] for row in rows if row["status"] == "skipped"} == {"template does not apply"}
    assert all("ZeroDivisionError" in row["error"] for row in rows if row["status"] == "failed")
    assert set(load_pseudolabels(out)["status"]) == {"ok"}
