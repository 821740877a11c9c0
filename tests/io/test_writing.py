"""Writing to disks that are full, read-only, or not there: one line that names the file, and nothing half written."""

import errno
import os
from pathlib import Path

import pytest

from rlkd.errors import ConfigError, RlkdError
from rlkd.io import files
from rlkd.io.files import append_text, check_folder, make_folder, write_durably, write_text
from rlkd.io.lock import writer_lock
from rlkd.settings.parsing import run_main


@pytest.mark.parametrize("make", [check_folder, make_folder, lambda path: write_text(path / "a.txt", "a")])
def test_what_is_no_folder_is_refused_by_name(tmp_path, make):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, message in (
        ("file", "file is a file, not a folder"),
        ("file/below/it", "file is a file, not a folder"),
        ("link", "link is a link to .*nowhere, which does not exist"),
        ("link/below", "link is a link to .*nowhere, which does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_folders_are_created_by_make_folder_only(tmp_path):
    check_folder(tmp_path / "a" / "b")
    check_folder(Path("relative"))
    assert list(tmp_path.iterdir()) == []
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("read_only", [True, False])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, read_only):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    monkeypatch.setattr(files, "_read_only", lambda path: read_only)
    with pytest.raises(ConfigError, match="read-only file system" if read_only else "permission denied"):
        check_folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="Name another folder"), writer_lock(tmp_path / "run"):
        pass


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left for .*x.txt: it needs 0.01 MB"),
        (errno.EDQUOT, "no space left for .*x.txt"),
        (errno.EROFS, "x.txt cannot be written: Read-only file system"),
        (errno.EACCES, "x.txt cannot be written: Permission denied"),
        (errno.EIO, "x.txt cannot be written: Input/output error"),
        (errno.EFBIG, "x.txt cannot be written: File too large"),
        (errno.EMFILE, "x.txt cannot be written: Too many open files"),
    ],
)
def test_writes_that_fail(tmp_path, monkeypatch, number, message):
    path = tmp_path / "x.txt"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", failing(number))
        with pytest.raises(RlkdError, match=message) as error:
            write_durably(path, b"after")
    assert (error.value.exit_code, path.read_text()) == (1, "before")
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_a_log_has_no_half_line_after_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_text(path, "one\n")
    opened = Path.open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **options: Half(opened(self, *args, **options)))
        with pytest.raises(RlkdError, match=r"no space left for .*log\.jsonl"):
            append_text(path, "two\n")
    assert path.read_text() == "one\n"
    append_text(path, "two\n")
    assert path.read_text() == "one\ntwo\n"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"cannot be written: permission denied\. Name another folder\."):
        check_folder(tmp_path / "a" / "b")


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(RlkdError, match=r"x.txt cannot be written: the folder .*gone was removed"):
        write_durably(tmp_path / "gone" / "x.txt", b"")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), "No such file or directory: '/a/b'"),
        (OSError("a library's own words,\n\non lines"), "a library's own words, on lines"),
    ],
)
def test_errors_of_the_system_are_one_line_and_code_1(capsys, error, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (1, 1)
    assert said in lines[0]
