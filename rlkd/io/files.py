"""Durable writes, to a temporary name, flushed to disk, then renamed: after a crash a file is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, DataError, RlkdError
from .urls import refuse_remote


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. Raises RlkdError naming the file, and the MB needed if the disk is full."""
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


def write_text(path: Path, text: str) -> None:
    """Replace the text of `path`, in UTF-8; its folder is created if necessary. Raises as `write_durably` does."""
    make_folder(path.parent)
    write_durably(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Append `text` to `path`; both the file and its folder are created if necessary. Raises RlkdError naming the file
    if it cannot be written; it is then as before.
    """
    make_folder(path.parent)
    size = path.stat().st_size if path.exists() else None
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size or 0)
        raise explained(error, path, len(text)) from error


def check_folder(path: Path) -> None:
    """Raise ConfigError unless `path` is a folder that can be written, or can be made one. Nothing is created."""
    refuse_remote(path)
    found = path
    while not os.path.lexists(found) and found != found.parent:
        found = found.parent
    if not found.exists():
        raise ConfigError(
            f"{path}: {found} is a link to {os.readlink(found)}, which does not exist. Name another folder."
        )
    if not found.is_dir():
        raise ConfigError(f"{path}: {found} is a file, not a folder. Name another folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        why = "is on a read-only file system" if _read_only(found) else "cannot be written: permission denied"
        raise ConfigError(f"{path}: {found} {why}. Name another folder.")


def make_folder(path: Path) -> None:
    """Create a folder, and those above it. Raises as `check_folder` does, and RlkdError if the disk is full."""
    refuse_remote(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        check_folder(path)
        raise explained(error, path, 0) from error


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: without it a rename may be lost in a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(error: OSError, path: Path, size: int) -> Exception:
    """The RlkdError to raise for a failed write of `size` bytes to `path`; `error` itself if it has no number."""
    if error.errno is None:
        return error
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        gone = error.errno == errno.ENOENT and not path.parent.exists()
        reason = f"the folder {path.parent} was removed" if gone else os.strerror(error.errno)
        return RlkdError(f"{path} cannot be written: {reason}. What was committed before is intact.")
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
