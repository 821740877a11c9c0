"""Rendering of untrusted templates in a separate process.

The sandbox limits what it can count. The process limits the rest: it has little memory, can write no files and start no
processes, sees no secrets in its environment, and is killed when a row takes too long.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Lock
from time import process_time
from types import TracebackType
from typing import Any

from ..errors import DataError, cut
from .meter import DEFAULT_LIMITS, BudgetError, Limits, SandboxError
from .template import Template

logger = logging.getLogger(__name__)

ROWS_PER_MESSAGE = 256
# A new process imports jinja and yaml before it answers.
START_SECONDS = 60.0
# Seconds that each row adds to the time of a job.
SECONDS_PER_ROW = 0.1
# Of processor time, beyond the time limit of a row: for a process whose parent is gone.
GRACE_SECONDS = 2
OPEN_FILES = 32
_LOCK = Lock()
_ERRORS: dict[str, type[DataError]] = {"DataError": DataError, "SandboxError": SandboxError}


class RenderWorker:
    """Renders rows in a child process, which is killed when it exceeds a limit and restarted for the next row.

    `parts` is `Template.parts` for many rows. A context manager, whose exit ends the child. The child starts with the
    first rows, inherits no environment variable but the import path, and answers in JSON, so that nothing it sends can
    run code here. POSIX only.

    All rows together may take `limits.job_seconds`, and SECONDS_PER_ROW each: a template that hangs at every row ends
    the job instead of holding it up for days.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS):
        self.limits = limits
        self._left = limits.job_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> RenderWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one; the next rows start a new one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def parts(
        self, template: Template, rows: Iterable[Mapping[str, Any]], *, seed: int = 0
    ) -> Iterator[list[str] | DataError]:
        """For each row, what `template.parts(row, seed=seed)` returns or the DataError that it raises.

        A row that takes longer than `limits.seconds`, or kills the child, gives a SandboxError; the others render.
        Raises BudgetError when the rows of this worker have taken too long in total.
        """
        template = replace(template, trusted=True)  # in the child; and without its compiled form
        remaining = iter(rows)
        while batch := list(islice(remaining, ROWS_PER_MESSAGE)):
            while batch:
                done = 0
                for result in self._exchange(template, batch, seed):
                    done += 1
                    yield result
                batch = batch[done:]

    def _exchange(
        self, template: Template, rows: Sequence[Mapping[str, Any]], seed: int
    ) -> Iterator[list[str] | DataError]:
        """The result of each row, up to and with the first that exceeds a limit or cannot be sent."""
        try:
            message = ForkingPickler.dumps((template, [dict(row) for row in rows], seed))
        except Exception as error:  # of whatever objects the row holds
            if len(rows) > 1:
                yield from self._exchange(template, rows[:1], seed)
            else:
                yield DataError(f"{template}: the row cannot be sent to the rendering process: {cut(str(error))}.")
            return
        waiting = len(rows)
        try:
            connection = self._started()
            connection.send_bytes(message)
            while waiting:
                if not connection.poll(self.limits.seconds):
                    self._spend(self.limits.seconds, template)
                    yield SandboxError(f"{template} {self.limits.exceeded('seconds')}")
                    return
                answer = json.loads(connection.recv_bytes())
                waiting -= 1
                self._spend(max(float(answer["seconds"]), 0.0), template)
                yield _result(answer)
        except (EOFError, OSError):
            logger.warning("%s killed the process that rendered it; starting a new one", template)
            yield SandboxError(f"{template} {self.limits.exceeded('memory_mb')}")
        finally:
            if waiting:  # answers to rows that nobody asks for any more must not be taken for others
                self.close()

    def _spend(self, seconds: float, template: Template) -> None:
        self._left += SECONDS_PER_ROW - seconds
        if self._left < 0:
            raise BudgetError(f"{template} {self.limits.exceeded('job_seconds')}")

    def _started(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died between two rows
        if self._connection is not None:
            return self._connection
        self._connection, theirs = Pipe()
        limits = [self.limits.memory_mb, self.limits.seconds]
        path = [str(Path(__file__).resolve().parents[2]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), json.dumps(limits)],
            pass_fds=[theirs.fileno()],
            env={"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        if not self._connection.poll(START_SECONDS):
            self.close()
            raise DataError(
                f"the render worker did not start within {START_SECONDS:.0f} s. Try again on an idle machine."
            )
        self._connection.recv_bytes()
        return self._connection


@cache
def _shared(limits: Limits, process: int) -> RenderWorker:
    """The worker for rows that are rendered one at a time; a forked process gets its own."""
    worker = RenderWorker(limits)
    atexit.register(worker.close)
    return worker


def untrusted_parts(template: Template, row: Mapping[str, Any], seed: int) -> list[str]:
    """`template.parts(row, seed=seed)`, rendered by this process's shared worker. Raises the same errors."""
    with _LOCK:
        (result,) = _shared(template.limits, os.getpid()).parts(template, [row], seed=seed)
    if isinstance(result, DataError):
        raise result
    return result


def _result(answer: dict[str, Any]) -> list[str] | DataError:
    return _ERRORS[answer["error"]](answer["message"]) if "error" in answer else list(map(str, answer["parts"]))


def _serve(connection: Connection, memory_mb: int, seconds: float) -> None:
    """The child: receives templates and rows and sends one result per row, until the parent closes the connection."""
    # Whatever rendering imports is there before files are out of reach.
    Template("warm-up", "{{ [1] | choice }}", trusted=True).parts({})
    _limit_process(memory_mb)
    connection.send_bytes(b"ready")
    known: dict[Template, Template] = {}
    with suppress(EOFError, OSError):
        while True:
            template, rows, seed = connection.recv()
            template = known.setdefault(template, template)  # the one already compiled
            for row in rows:
                started = process_time()
                _limit("RLIMIT_CPU", int(started + seconds) + GRACE_SECONDS, hard=False)
                answer = _answer(template, row, seed)
                connection.send_bytes(json.dumps(answer | {"seconds": process_time() - started}).encode())


def _answer(template: Template, row: dict[str, Any], seed: int) -> dict[str, Any]:
    try:
        return {"parts": template.parts(row, seed=seed)}
    except DataError as error:
        kind = SandboxError if isinstance(error, SandboxError) else DataError
        return {"error": kind.__name__, "message": str(error)}


def _limit_process(memory_mb: int) -> None:
    """No more memory, no files written, no processes; each limit as far as the system has it."""
    _limit("RLIMIT_AS", memory_mb * 2**20)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_NPROC", 0)
    _limit("RLIMIT_NOFILE", OPEN_FILES)


def _limit(name: str, value: int, *, hard: bool = True) -> None:
    with suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        _, most = resource.getrlimit(kind)
        value = value if most < 0 else min(value, most)
        resource.setrlimit(kind, (value, value if hard else most))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), *json.loads(sys.argv[2]))
