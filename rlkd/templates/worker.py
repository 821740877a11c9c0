"""Rendering of untrusted templates in a separate process.

The sandbox limits what it can count. The process limits the rest: it has little memory and no secrets in its
environment, and is killed when a row takes too long.
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
from pathlib import Path
from threading import Lock
from time import monotonic
from types import TracebackType
from typing import Any

from ..errors import DataError
from .meter import DEFAULT_LIMITS, Limits, SandboxError
from .template import Template

logger = logging.getLogger(__name__)

ROWS_PER_MESSAGE = 256
# A new process imports jinja and yaml before it answers.
START_SECONDS = 60.0
# Results are sent back this often.
FLUSH_SECONDS = 0.05
_LOCK = Lock()
_ERRORS: dict[str, type[DataError]] = {"DataError": DataError, "SandboxError": SandboxError}


class RenderWorker:
    """Renders rows in a child process, which is killed when it exceeds a limit and restarted for the next row.

    `parts` is `Template.parts` for many rows. A context manager, whose exit ends the child. The child starts with the
    first rows, inherits no environment variable but the import path, and answers in JSON, so that nothing it sends can
    run code here. POSIX only.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS):
        self.limits = limits
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
        """
        template = replace(template, trusted=True)  # in the child; and without its compiled form
        remaining, size = iter(rows), ROWS_PER_MESSAGE
        while batch := list(islice(remaining, ROWS_PER_MESSAGE)):
            while batch:
                results, error = self._exchange(template, batch[:size], seed)
                batch = batch[len(results) :]
                yield from results
                if error is None:
                    continue
                # Results come in groups: rows are sent one by one to find the one that killed the child.
                if size == 1:
                    batch, size = batch[1:], ROWS_PER_MESSAGE
                    yield error
                else:
                    size = 1

    def _exchange(
        self, template: Template, rows: Sequence[Mapping[str, Any]], seed: int
    ) -> tuple[list[list[str] | DataError], SandboxError | None]:
        """The results of the rows and, if some are missing, the error of the next row."""
        results: list[list[str] | DataError] = []
        try:
            connection = self._started()
            connection.send((template, [dict(row) for row in rows], seed))
            while len(results) < len(rows):
                if not connection.poll(self.limits.seconds + FLUSH_SECONDS):
                    self.close()
                    return results, SandboxError(f"{template} {self.limits.exceeded('seconds')}")
                results += map(_result, json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            self.close()
            logger.warning("%s killed the process that rendered it; starting a new one", template)
            return results, SandboxError(f"{template} {self.limits.exceeded('memory_mb')}")
        return results, None

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        self._connection, theirs = Pipe()
        path = [str(Path(__file__).resolve().parents[2]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), str(self.limits.memory_mb)],
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


def _serve(connection: Connection, memory_mb: int) -> None:
    """The child: receives templates and rows and sends one result per row, until the parent closes the connection."""
    _limit_memory(memory_mb)
    connection.send_bytes(b"ready")
    known: dict[Template, Template] = {}
    with suppress(EOFError, OSError):
        while True:
            template, rows, seed = connection.recv()
            template = known.setdefault(template, template)  # the one already compiled
            answers, sent = [], monotonic()
            for number, row in enumerate(rows, start=1):
                answers.append(_answer(template, row, seed))
                if number == len(rows) or monotonic() > sent + FLUSH_SECONDS:
                    connection.send_bytes(json.dumps(answers).encode())
                    answers, sent = [], monotonic()


def _answer(template: Template, row: dict[str, Any], seed: int) -> dict[str, Any]:
    try:
        return {"parts": template.parts(row, seed=seed)}
    except DataError as error:
        kind = SandboxError if isinstance(error, SandboxError) else DataError
        return {"error": kind.__name__, "message": str(error)}


def _limit_memory(megabytes: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # not every system has the limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size if hard < 0 else min(size, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
