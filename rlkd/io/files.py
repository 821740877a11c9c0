"""Durable writes, to a temporary name, flushed to disk, then renamed: after a crash a file is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ..errors import DataError, RlkdError


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. Raises RlkdError naming the file and the MB needed if the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A folder of someone else may hold a link of that name, which must not be followed.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise explained(error, path, len(content)) from error


def append_text(path: Path, text: str) -> None:
    """Append `text` to `path`, created if necessary. Raises RlkdError naming the file if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise explained(error, path, len(text)) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: without it a rename may be lost in a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(error: OSError, path: Path, size: int) -> Exception:
    """The error to raise for a failed write of `size` bytes: an RlkdError if the disk is full, else `error` itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    needed = max(size / 1e6, 0.01)
    return RlkdError(
        f"no space left for {path}: it needs {needed:.2f} MB. What was committed before is intact: free some space "
        "and repeat the command."
    )


def refuse_links(*paths: Path) -> None:
    """Raise DataError if a path is a symbolic link: what is written there would change a file elsewhere."""
    for path in paths:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, and a change would reach that. Copy the folder first, with "
                "the files that its links name (cp -rL)."
            )


def sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
