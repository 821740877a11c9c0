"""The study runner on cells that take no time: what is made, skipped, made again, refused and reported."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkd.errors import ConfigError, DataError, InterruptedRunError, LockedError, RlkdError
from rlkd.io.lock import writer_lock
from rlkd.jobs import study_runner
from rlkd.jobs.study import Arm, Cell, Study, file_digests, read_plan, write_record
from rlkd.jobs.study_runner import run_study, say

CALLS = "calls.txt"  # a line for each call of a cell, in the study's folder


@pytest.fixture(autouse=True)
def _light_processes(monkeypatch):
    """Cells of these tests need nothing of what other tests have loaded."""
    monkeypatch.setattr(study_runner, "_context", lambda: multiprocessing.get_context("forkserver"))


def note(cell: Cell) -> None:
    with (cell.out / CALLS).open("a") as file:
        file.write(cell.name + "\n")


def calls(out: Path) -> list[str]:
    return (out / CALLS).read_text().split() if (out / CALLS).exists() else []


def start(cell: Cell) -> dict[str, float]:
    note(cell)
    (cell.folder / "weights").write_text(str(cell.seed))
    return {"value": cell.settings.get("start", 1.0) * (cell.seed or 10), "cpu_seconds": 3.0}


def scaled(cell: Cell) -> dict[str, float]:
    """What it starts from times a factor, read from the other's result and from its folder."""
    note(cell)
    before = cell.inputs["warm-up"]
    assert (before.folder / "weights").read_text() == str(cell.seed)
    return {"value": before.result["value"] * cell.settings["factor"], "cpu_seconds": cell.settings["factor"]}


def as_long(cell: Cell) -> dict[str, float]:
    note(cell)
    return {"value": max(done.result["cpu_seconds"] for arm, done in cell.inputs.items() if arm != "teacher")}


def environment(cell: Cell) -> dict[str, object]:
    say("half way")
    print("only in the log")
    return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "task": cell.task, **cell.settings}


def failing(cell: Cell) -> dict[str, float]:
    note(cell)
    if cell.seed == cell.settings.get("breaks", 1) and not (cell.out / "fixed").exists():
        raise ValueError(f"this cell breaks at seed {cell.seed}")
    return {"value": 1.0, "cpu_seconds": 1.0}


def interrupts(cell: Cell) -> dict[str, float]:
    """Sends its runner a signal, then would take a minute."""
    note(cell)
    if not (cell.out / "fixed").exists():
        os.kill(multiprocessing.parent_process().pid, signal.SIGTERM)
        time.sleep(60)
    return {"value": 1.0}


def counts_on(cell: Cell) -> dict[str, float]:
    """Adds 0..9 up, a line of its folder each; what it finds there is where it continues. Waits for `go` at 5."""
    note(cell)
    (cell.folder / "pid").write_text(str(os.getpid()))
    progress = cell.folder / "progress"
    lines = progress.read_text().split() if progress.exists() else []
    found = len(lines)
    for number in range(found, 10):
        with progress.open("a") as file:
            file.write(f"{number}\n")
        while number == 5 and not (cell.out / "go").exists():
            time.sleep(0.02)
    total = sum(map(int, progress.read_text().split()))
    return {"value": float(total), "found": found if cell.settings.get("tell") else 0}


def killed(cell: Cell) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def study(out: Path, **changes: object) -> Study:
    """A teacher, and per seed a warm-up, two arms that start from it, and one that needs the CPU seconds of both."""
    arms = {
        "teacher": Arm(start, seeds=()),
        "warm-up": Arm(start, ("teacher",), {"start": 2.0}),
        "double": Arm(scaled, ("warm-up",), {"factor": 2.0}),
        "triple": Arm(scaled, ("warm-up",), {"factor": 3.0}),
        "as-long": Arm(as_long, ("teacher", "double", "triple")),
    }
    return Study(out, arms | changes, (1, 2), headline=("value",))


def test_cells_get_what_they_need_from_their_own_seed(tmp_path, capfd):
    reports = []
    grid = study(tmp_path)
    run_study(grid, jobs=2, report=lambda: reports.append(grid.numbers("double", "value")))
    assert grid.numbers("warm-up", "value") == {1: 2.0, 2: 4.0}
    assert grid.numbers("triple", "value") == {1: 6.0, 2: 12.0}
    assert grid.numbers("as-long", "value") == {1: 3.0, 2: 3.0}
    assert grid.results("teacher") == {None: {"value": 10.0, "cpu_seconds": 3.0}}
    assert reports == [{1: 4.0, 2: 8.0}]
    assert (tmp_path / "seed-2" / "warm-up" / "weights").read_text() == "2"
    order = calls(tmp_path)
    assert sorted(order) == sorted(grid.cells)
    for name, cell in grid.cells.items():
        assert all(order.index(need.name) < order.index(name) for need in grid.needed(cell).values())
    assert "seed-2/triple: finished in" in (shown := capfd.readouterr().out)
    assert ", value 12 (" in shown


def test_the_order_of_arms_and_seeds_and_the_number_of_processes_change_nothing(tmp_path):
    first = study(tmp_path / "a")
    run_study(first, jobs=1)
    second = study(tmp_path / "b")
    second = Study(second.out, dict(reversed(second.arms.items())), (2, 1))
    run_study(second, jobs=3)
    for arm in first.arms:
        assert first.results(arm) == second.results(arm)


def test_finished_cells_are_skipped_and_a_missing_one_is_made(tmp_path, capfd):
    run_study(study(tmp_path))
    (tmp_path / CALLS).unlink()
    run_study(study(tmp_path))
    assert calls(tmp_path) == []
    assert f"9 of 9 results are in {tmp_path}" in capfd.readouterr().out
    (tmp_path / "seed-1" / "as-long.json").unlink()
    run_study(study(tmp_path))
    assert calls(tmp_path) == ["seed-1/as-long"]


def test_other_settings_are_refused_before_anything_is_made(tmp_path):
    run_study(study(tmp_path))
    (tmp_path / CALLS).unlink()
    changed = study(tmp_path, double=Arm(scaled, ("warm-up",), {"factor": 4.0}), new=Arm(start))
    reports = []
    change = r"\n  seed-1/double\.json, seed-2/double\.json: factor was 2\.0, is 4\.0\n"
    with pytest.raises(ConfigError, match=change) as refused:
        run_study(changed, report=lambda: reports.append(1))
    assert "triple" not in str(refused.value)
    assert (calls(tmp_path), reports) == ([], [])
    assert changed.results("double") == {}
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}" / "double.json").unlink()
    run_study(changed)
    assert changed.numbers("double", "value") == {1: 8.0, 2: 16.0}
    assert changed.numbers("as-long", "value") == {1: 4.0, 2: 4.0}


@pytest.mark.parametrize("place", ["teacher", "seed-2/double"])
def test_files_of_something_else_are_not_deleted(tmp_path, place):
    mine = tmp_path / place / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("a year of work")
    with pytest.raises(ConfigError, match=f"{place} exists and has no {mine.parent.name}.json next to it"):
        run_study(study(tmp_path))
    assert (mine.read_text(), calls(tmp_path)) == ("a year of work", [])
    mine.unlink()
    run_study(study(tmp_path))
    assert len(calls(tmp_path)) == 9


def test_a_result_whose_record_was_deleted_is_computed_again_from_an_empty_folder(tmp_path):
    grid = study(tmp_path)
    run_study(grid)
    stale = grid.cells["seed-1/double"].folder / "stale"
    stale.touch()
    grid.cells["seed-1/double"].record_file.unlink()
    run_study(grid)
    assert calls(tmp_path).count("seed-1/double") == 2
    assert not stale.exists()


def test_what_was_made_from_another_input_is_made_anew_and_not_reported_before(tmp_path, capfd):
    grid = study(tmp_path)
    run_study(grid)
    (tmp_path / CALLS).unlink()
    (tmp_path / "seed-1" / "triple" / "stale").touch()
    warm = grid.cells["seed-1/warm-up"]
    write_record(warm, grid.digests(warm), {"value": 7.0, "cpu_seconds": 3.0})
    assert grid.numbers("triple", "value") == {2: 12.0}
    assert grid.numbers("as-long", "value") == {2: 3.0}
    run_study(grid)
    assert sorted(calls(tmp_path)) == ["seed-1/as-long", "seed-1/double", "seed-1/triple"]
    assert grid.numbers("triple", "value") == {1: 21.0, 2: 12.0}
    assert not (tmp_path / "seed-1" / "triple" / "stale").exists()
    assert "seed-1/triple: computed again" in capfd.readouterr().out


def test_a_failing_cell_loses_only_what_needs_it(tmp_path):
    arms = {"broken": Arm(failing), "after": Arm(as_long, ("teacher", "broken")), "shot": Arm(killed, seeds=())}
    reports = []
    grid = study(tmp_path, **arms)
    with pytest.raises(RlkdError) as error:
        run_study(grid, jobs=2, report=lambda: reports.append(grid.results("broken")))
    message = str(error.value)
    assert error.value.exit_code == 1
    assert message.startswith("2 of 14 results failed")
    assert "seed-1/broken: exit code 1, see " in message
    assert "ValueError: this cell breaks at seed 1" in message
    assert "shot: killed by SIGKILL" in message
    assert "not started, since they depend on failed results: seed-1/after" in message
    assert reports == [{2: {"value": 1.0, "cpu_seconds": 1.0}}]
    assert grid.numbers("as-long", "value") == {1: 3.0, 2: 3.0}
    (tmp_path / "fixed").touch()
    (tmp_path / CALLS).unlink()
    with pytest.raises(RlkdError, match="1 of 14 results failed"):
        run_study(grid)
    assert "seed-1/broken" in calls(tmp_path)
    assert "seed-2/broken" not in calls(tmp_path)


def test_a_cell_has_its_own_process_thread_settings_and_log(tmp_path, capfd):
    before = os.environ.get("MKL_NUM_THREADS")
    tasks = {"cola": {"metric": "matthews"}, "trec": {"metric": "accuracy"}}
    grid = Study(tmp_path, {"arm": Arm(environment, (), {"steps": (1, 2)})}, (1, 2), tasks)
    run_study(grid, jobs=2)
    results = [*grid.results("arm", "cola").values(), *grid.results("arm", "trec").values()]
    assert len({result["pid"] for result in results} | {os.getpid()}) == 5
    assert {result["threads"] for result in results} == {"1"}
    assert [(result["task"], result["metric"]) for result in results] == 2 * [("cola", "matthews")] + 2 * [
        ("trec", "accuracy")
    ]
    assert results[0]["steps"] == [1, 2]
    shown, log = capfd.readouterr().out, (tmp_path / "cola" / "seed-1" / "arm.log").read_text()
    assert shown.count("half way") == 4
    assert "only in the log" not in shown
    assert "half way" in log
    assert "only in the log" in log
    assert os.environ.get("MKL_NUM_THREADS") == before


def test_a_signal_ends_cells_and_says_how_to_continue(tmp_path):
    reports = []
    grid = study(tmp_path, stop=Arm(interrupts, ("triple",), seeds=(2,)))
    with pytest.raises(InterruptedRunError, match="Repeat the command to compute the rest") as stopped:
        run_study(grid, jobs=2, report=lambda: reports.append(grid.numbers("triple", "value")))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert reports == [{1: 6.0, 2: 12.0}]
    assert grid.results("stop") == {}
    (tmp_path / "fixed").touch()
    run_study(grid)
    assert grid.results("stop") == {2: {"value": 1.0}}


RUNNER = """
import sys
from pathlib import Path
sys.path[:0] = [{here!r}]
import test_study
if __name__ == "__main__":
    test_study.run_study(test_study.resumable(Path({out!r})))
"""


def resumable(out: Path) -> Study:
    arms = {
        "resumes": Arm(counts_on, (), {"tell": True}, resumes=True),
        "starts-again": Arm(counts_on, ("resumes",), {"tell": True}),
    }
    return Study(out, arms, (1,))


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize("interrupted", ["resumes", "starts-again"])
def test_a_runner_killed_in_the_middle_of_a_cell_continues_to_the_same_result(tmp_path, interrupted):
    out, script = tmp_path / "out", tmp_path / "runner.py"
    out.mkdir()
    script.write_text(RUNNER.format(here=str(Path(__file__).parent), out=str(out)))
    progress = out / "seed-1" / interrupted / "progress"
    if interrupted == "starts-again":
        (out / "go").touch()
        run_study(Study(out, {"resumes": resumable(out).arms["resumes"]}, (1,)))
        (out / "go").unlink()
    runner = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        until(lambda: progress.exists() and progress.read_text().split()[-1:] == ["5"])
    finally:
        runner.kill()
        runner.wait()
    pid = int((out / "seed-1" / interrupted / "pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())  # the cell ends with its runner
    (out / "go").touch()
    assert progress.read_text().split()[-1] == "5"
    assert json.loads((out / "seed-1" / f"{interrupted}.json").read_text())["result"] is None
    grid = resumable(out)
    run_study(grid)
    assert grid.numbers("resumes", "value") == grid.numbers("starts-again", "value") == {1: 45.0}
    assert grid.numbers("resumes", "found") == {1: 6 if interrupted == "resumes" else 0}
    assert grid.numbers("starts-again", "found") == {1: 0}
    assert sorted(calls(out)) == sorted([f"seed-1/{interrupted}", "seed-1/resumes", "seed-1/starts-again"])


def test_an_interrupted_cell_of_other_settings_starts_from_an_empty_folder(tmp_path):
    (tmp_path / "go").touch()
    cell = resumable(tmp_path).cells["seed-1/resumes"]
    cell.folder.mkdir(parents=True)
    (cell.folder / "progress").write_text("7\n")
    write_record(Cell(cell.arm, 1, None, tmp_path, {"tell": "other"}), {}, None)
    run_study(resumable(tmp_path))
    assert resumable(tmp_path).numbers("resumes", "value") == {1: 45.0}


def test_two_runners_do_not_share_a_folder(tmp_path):
    with writer_lock(tmp_path / "study"), pytest.raises(LockedError, match="is being written by process") as error:
        run_study(study(tmp_path))
    assert error.value.exit_code == 75
    assert calls(tmp_path) == []


def test_needs_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="arm 'a' needs 'b', which is not an arm"):
        Study(tmp_path, {"a": Arm(start, ("b",))}, (1,))
    with pytest.raises(ConfigError, match=r"arms depend on each other: .* -> "):
        Study(tmp_path, {"a": Arm(start, ("b",)), "b": Arm(start, ("a",))}, (1,))
    with pytest.raises(ConfigError, match="needs 'b', which has several seeds, but not seed None"):
        Study(tmp_path, {"a": Arm(start, ("b",), seeds=()), "b": Arm(start)}, (1, 2))
    trials = Study(tmp_path, {"a": Arm(start, ("b",)), "b": Arm(start, seeds=(1,))}, (1, 2))
    assert [need.seed for cell in ("seed-1/a", "seed-2/a") for need in trials.needed(trials.cells[cell]).values()] == [
        1,
        1,
    ]


def test_files_are_known_by_their_content(tmp_path):
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("two")
    first = file_digests(tmp_path, ["a.jsonl", "b.jsonl"])
    (tmp_path / "b.jsonl").write_text("three")
    second = file_digests(tmp_path, ["a.jsonl", "b.jsonl"])
    assert (first["a.jsonl"], len(set(first.values()))) == (second["a.jsonl"], 2)
    assert first["b.jsonl"] != second["b.jsonl"]
    with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
        file_digests(tmp_path, ["a.jsonl", "c.jsonl"])


def test_quick_sizes_replace_what_they_name(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("rows: {a: 1, b: 2}\nseeds: [1, 2]\nquick: {rows: {b: 3}, seeds: [1]}\n")
    assert read_plan(file, quick=False) == {"rows": {"a": 1, "b": 2}, "seeds": [1, 2]}
    assert read_plan(file, quick=True) == {"rows": {"a": 1, "b": 3}, "seeds": [1]}


@pytest.mark.parametrize("text", ["", "- a", "rows: 1", "quick: 1\nrows: 2", "a"])
def test_a_plan_without_quick_sizes(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.yaml: must be a mapping, whose key 'quick' is a mapping"):
        read_plan(file, quick=False)
