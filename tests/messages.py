"""Every message a user can meet, and the test that provokes it.

`pytest --messages FILE` notes which error is made where while the tests run, writes FILE (place, message, test; one
line per message, tab-separated) and fails if some message was provoked by no test. A message is a call that makes one
of our errors, a call of a helper that does so when a condition fails, or a ValueError or TypeError raised in rlkd/.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlkd"
HELPERS = {"_require"}
FOLDER = "RLKD_MESSAGES"


def our_errors(package: Path = PACKAGE) -> set[str]:
    """RlkdError and all classes below it, by name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {"RlkdError"}
    while more := {c.name for c in classes if {getattr(base, "id", "") for base in c.bases} & found} - found:
        found |= more
    return found


OURS = our_errors()
Hits = dict[tuple[str, int], str]  # (file, line) -> the first test that came by


@dataclass(frozen=True)
class Message:
    """A place in rlkd/ where a message is made: lines first to last of `file`."""

    file: str
    first: int
    last: int
    text: str

    def test(self, hits: Hits) -> str | None:
        return next((hits[self.file, n] for n in range(self.first, self.last + 1) if (self.file, n) in hits), None)


def messages(package: Path = PACKAGE) -> list[Message]:
    """All of a package's messages, in the order of its files."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(package).as_posix()
        for call in _calls(tree):
            found.append(Message(file, call.lineno, call.end_lineno or call.lineno, _text(call)))
    return found


def _calls(tree: ast.AST, function: str = "") -> Iterator[ast.Call]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", "")
            if name in {"ValueError", "TypeError"}:
                yield node.exc
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in OURS | HELPERS and function not in HELPERS:
            yield node
        yield from _calls(node, getattr(node, "name", function) if isinstance(node, ast.FunctionDef) else function)


def _text(call: ast.Call) -> str:
    """The first words of a message; what is filled in shows as {...}."""
    texts = []
    for node in call.args:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                texts.append(part.value)
    return " ".join(" ".join(texts).split())[:100] or ast.unparse(call)[:100]


# Noting what is made


class Recorder:
    """Notes every line of rlkd/ that an error of ours was made from, or that an error caught by pytest.raises left."""

    def __init__(self) -> None:
        self.hits: Hits = {}

    def install(self) -> None:
        from _pytest.raises import RaisesExc

        from rlkd.errors import RlkdError

        recorder = self

        def make(error: RlkdError, *args: Any) -> None:
            Exception.__init__(error, *args)
            recorder.note_frames(sys._getframe(1))
            recorder.note_last(sys.exc_info()[2])  # made while another error is handled: it tells that one

        leave = RaisesExc.__exit__

        def caught(self: Any, kind: Any, error: Any, traceback: TracebackType | None) -> bool:
            recorder.note_last(traceback)
            return leave(self, kind, error, traceback)

        RlkdError.__init__ = make  # type: ignore[method-assign]
        RaisesExc.__exit__ = caught  # type: ignore[method-assign]

    def note_frames(self, frame: FrameType | None) -> None:
        while frame is not None:
            self._note(frame.f_code.co_filename, frame.f_lineno)
            frame = frame.f_back

    def note_last(self, traceback: TracebackType | None) -> None:
        while traceback is not None:
            if traceback.tb_next is None or not _inside(traceback.tb_next.tb_frame.f_code.co_filename):
                self._note(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
            traceback = traceback.tb_next

    def _note(self, file: str, line: int) -> None:
        if _inside(file):
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
            self.hits.setdefault((Path(file).relative_to(PACKAGE).as_posix(), line), test)

    def save(self, folder: Path) -> None:
        rows = [[*place, test] for place, test in self.hits.items()]
        (folder / f"{os.getpid()}.json").write_text(json.dumps(rows))


def _inside(file: str) -> bool:
    return file.startswith(str(PACKAGE) + os.sep)


def read_hits(folder: Path) -> Hits:
    rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    return {(file, line): test for file, line, test in reversed(rows)}


# Hooks, which conftest.py passes on to pytest


def add_option(parser: Any) -> None:
    parser.addoption("--messages", metavar="FILE", help="list every error message with the test that provokes it")


def configure(config: Any) -> None:
    """Record in this process, and in those that pytest-xdist starts from it."""
    if config.getoption("--messages") and not hasattr(config, "workerinput"):
        os.environ[FOLDER] = tempfile.mkdtemp()
    if FOLDER in os.environ:
        config.messages = Recorder()
        config.messages.install()


def finish(session: Any) -> None:
    """Write what was recorded; at the end of it all, the list."""
    if not hasattr(session.config, "messages"):
        return
    folder = Path(os.environ[FOLDER])
    session.config.messages.save(folder)
    if hasattr(session.config, "workerinput"):
        return
    hits = read_hits(folder)
    listed = [(message, message.test(hits)) for message in messages()]
    lines = [f"rlkd/{m.file}:{m.first}\t{m.text}\t{test or 'NO TEST'}\n" for m, test in listed]
    Path(session.config.getoption("--messages")).write_text("".join(lines), encoding="utf-8")
    missed = [f"rlkd/{m.file}:{m.first}: no test provokes: {m.text}" for m, test in listed if test is None]
    print("", *missed, f"{len(listed)} messages, {len(listed) - len(missed)} provoked by a test", sep="\n")
    if missed and session.exitstatus == 0:
        session.exitstatus = 1
