"""Computes the results of a study: each cell in its own process with one thread, up to `jobs` at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..errors import InterruptedRunError, RlkdError
from ..io.lock import Stop, writer_lock
from .study import Arm, Cell, Done, Result, Study, read_record, write_record

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # in a log they are carriage returns
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # seconds for a cell to stop after SIGTERM
LOG_LINES = 15  # lines of a failed cell's log to show

_to_runner: Connection | None = None  # in a cell's process


def run_study(study: Study, *, jobs: int | None = None, report: Callable[[], None] | None = None) -> None:
    """Compute every result that is not finished, then call `report` if any is, also after a failure or a signal.

    jobs: processes at a time; None, one per CPU. An interrupted result is computed again, and so is one whose
    inputs have changed.

    Raises ConfigError if the folder holds results of different settings or files of something else in the place of
    a cell's, LockedError while another process writes it, InterruptedRunError after SIGTERM or SIGINT, RlkdError at the
    end if a cell failed (the others are finished first).
    """
    with writer_lock(study.out / "study"), Stop() as stop, _environment():
        study.refuse_other_settings()
        study.refuse_other_files()
        runner = _Runner(study, jobs or os.cpu_count() or 1, stop)
        try:
            runner.run()
        finally:
            runner.end(0.0)
        if report is not None and runner.done:
            report()
        runner.raise_problems()


def say(text: str) -> None:
    """A line of progress with the time; of a cell, in its log and in the runner's output."""
    line = f"[{time.strftime('%H:%M:%S')}] {text}"
    print(line, flush=True)
    if _to_runner is not None:
        _to_runner.send(("line", line))


class _Runner:
    def __init__(self, study: Study, jobs: int, stop: Stop):
        self.study, self.jobs, self.stop = study, jobs, stop
        self.done: set[str] = set()
        self.failed: dict[str, int] = {}
        self.running: dict[Connection, tuple[Cell, BaseProcess, float]] = {}
        self.context = _context()

    def run(self) -> None:
        cells = self.study.cells
        self.done = {name for name, cell in cells.items() if self.study.finished(cell)}
        if self.done:
            say(f"{len(self.done)} of {len(cells)} results are in {self.study.out}")
        while self.stop.signum is None:
            for cell in self.ready()[: self.jobs - len(self.running)]:
                self.start(cell)
            if not self.running:
                return
            for connection in wait(list(self.running), timeout=POLL_SECONDS):
                self.receive(connection)  # type: ignore[arg-type]
        self.end(GRACE_SECONDS)

    def ready(self) -> list[Cell]:
        """Unfinished cells with finished inputs."""
        taken = {*self.done, *self.failed, *(cell.name for cell, *_ in self.running.values())}
        return [
            cell
            for name, cell in self.study.cells.items()
            if name not in taken and all(need.name in self.done for need in self.study.needed(cell).values())
        ]

    def start(self, cell: Cell) -> None:
        inputs = self.study.digests(cell) or {}
        record, arm = read_record(cell), self.study.arms[cell.arm]
        same = record is not None and (record["settings"], record["inputs"]) == (cell.settings, inputs)
        if record is not None and record["result"] is not None:
            say(f"{cell.name}: computed again, since its inputs have changed")
        if not (same and arm.resumes):
            shutil.rmtree(cell.folder, ignore_errors=True)
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_record(cell, inputs, None)
        cell.log_file.write_bytes(b"")
        results = {need: (other, read_record(other)) for need, other in self.study.needed(cell).items()}
        cell = replace(cell, inputs={need: Done(c.folder, r["result"]) for need, (c, r) in results.items() if r})
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_work, args=(arm, cell, sender), name=cell.name)
        process.start()
        sender.close()
        say(f"{cell.name}: started")
        self.running[receiver] = (cell, process, time.monotonic())

    def receive(self, connection: Connection) -> None:
        """What a cell's process sent: a line of progress or the result; None if it ended without one."""
        try:
            kind, text = connection.recv()
        except (EOFError, OSError):  # ended, perhaps in the middle of a message
            kind, text = "result", "null"
        if kind == "line":
            print(text, flush=True)
        else:
            self.finish(connection, json.loads(text))

    def finish(self, connection: Connection, result: Result | None) -> None:
        """Keep the result of a cell; None if it failed."""
        cell, process, started = self.running.pop(connection)
        connection.close()
        process.join()
        if result is None:
            self.failed[cell.name] = process.exitcode or 0
            say(f"{cell.name}: failed")
            return
        write_record(cell, self.study.digests(cell) or {}, result)
        self.done.add(cell.name)
        numbers = "".join(f", {name} {result[name]:.3g}" for name in self.study.headline if name in result)
        count = f"{len(self.done)} of {len(self.study.cells)}"
        say(f"{cell.name}: finished in {time.monotonic() - started:.0f} s{numbers} ({count})")

    def end(self, grace: float) -> None:
        """Stop the running cells: SIGTERM, then SIGKILL after `grace` seconds."""
        processes = [process for _, process, _ in self.running.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + grace
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()
        self.running.clear()

    def raise_problems(self) -> None:
        """Raises InterruptedRunError after a signal, RlkdError if cells failed."""
        total = len(self.study.cells)
        if self.stop.signum is not None:
            raise InterruptedRunError(
                f"stopped by {signal.Signals(self.stop.signum).name}: {len(self.done)} of {total} results are in "
                f"{self.study.out}. Repeat the command to compute the rest.",
                self.stop.signum,
            )
        if self.failed:
            cells = self.study.cells
            waiting = [name for name in cells if name not in self.done and name not in self.failed]
            lines = [_failure(cells[name], code) for name, code in self.failed.items()]
            lines += [f"not started, since they depend on failed results: {', '.join(waiting)}"] if waiting else []
            raise RlkdError(
                f"{len(self.failed)} of {total} results failed:\n" + "\n".join(lines) + "\n"
                f"{len(self.done)} are in {self.study.out}. Fix the cause and repeat the command to compute the rest."
            )


def _context() -> Any:
    """How processes are started. On Linux they have loaded what this one has of rlkd, which saves seconds for each.

    Not with a GPU: a process cannot use CUDA if it was forked after CUDA was initialised, which some libraries do when
    they are imported.
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch is not None and torch.cuda.is_available()):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("rlkd.")])
    return context


def _work(arm: Arm, cell: Cell, connection: Connection) -> None:
    """The main function of a cell's process."""
    global _to_runner
    _to_runner = connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner gets it too, and stops its cells with SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(cell.log_file, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    connection.send(("result", json.dumps(arm.run(cell))))


def _end_with_parent() -> None:
    """A killed runner leaves no cell running: the next runner may start the same one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _environment() -> Iterator[None]:
    """The environment that processes of cells start in: libraries read it when they are loaded."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        _restore(before)


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _failure(cell: Cell, code: int) -> str:
    """Why a cell failed: its exit code and the end of its log."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    text = cell.log_file.read_text(encoding="utf-8", errors="replace") if cell.log_file.exists() else ""
    return "\n".join(
        [f"{cell.name}: {how}, see {cell.log_file}", *(f"    {x}" for x in text.splitlines()[-LOG_LINES:])]
    )
