"""One writer per output, and a graceful stop on a signal."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import LockedError
from .files import check_folder, make_folder

logger = logging.getLogger(__name__)

# One Ctrl-C reaches a worker of torchrun twice, from the terminal and from the launcher.
ONE_PRESS = 0.25


@contextmanager
def writer_lock(path: Path) -> Iterator[Path]:
    """Hold a lock while writing what `path` names. The kernel frees it when its process dies, however it dies.

    Raises LockedError (exit code 75) naming the process and the host that hold it.
    """
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    check_folder(path.parent)
    lock, owner = (path.with_name(f".{path.name}.{kind}") for kind in ("lock", "owner"))
    for link in (lock, owner):
        if link.is_symlink():  # in a folder of someone else; writing would reach the file that it names
            link.unlink()
    held_lock = FileLock(lock, timeout=0)
    try:
        held_lock.acquire()
    except Timeout:
        held = _owner(owner)
        who = f"process {held['pid']} on {held['host']}" if held else "another process"
        raise LockedError(
            f"{path.parent} is being written by {who}. Wait until it finishes, or stop it, then repeat."
        ) from None
    try:
        if held := _owner(owner):
            logger.warning(
                "%s: recovered the lock of process %s on %s, which is no longer running",
                path,
                held["pid"],
                held["host"],
            )
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield path
    finally:
        owner.unlink(missing_ok=True)
        held_lock.release()


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text())
        return {"pid": held["pid"], "host": held["host"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Stop:
    """SIGTERM and SIGINT, recorded while `with stop:` runs; `signum` is None until one arrives. A second one exits
    immediately.

    Only the main thread receives signals; elsewhere, and outside the block, they have their previous effect.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if time.monotonic() - self._first > ONE_PRESS:
                raise SystemExit(128 + signum)
            return
        self.signum, self._first = signum, time.monotonic()
        # print and logging may be what the signal interrupted: write(2) is safe.
        os.write(2, b"stopping after saving finished work; press again to stop now\n")
