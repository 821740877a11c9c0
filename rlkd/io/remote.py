"""Object storage through fsspec: inputs are copied to this machine and read there (`urls` refuses outputs).

A copy stands in a folder that is named after the identity of its files (names, sizes, the checksums that the store
gives), so that files that have changed are another copy. Credentials are the driver's: its variables and files.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from .files import explained, make_folder
from .redaction import redacted
from .urls import is_remote

# Scheme -> the package that reads it.
DRIVERS = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs",
    "memory": "fsspec", "file": "fsspec",
}  # fmt: skip
CACHE = "RLKD_REMOTE_CACHE"


@cache
def local_copy(source: str) -> Path:
    """The copy of a remote file, a folder or a pattern with *, ? or [...], where it can be read; it is made if there is
    none. Other sources are returned as they are. A process looks once, so that all its readers read the same.

    Raises DataError for a scheme that is not read, a driver that is missing, files that are not there or not readable.
    """
    if not is_remote(source):
        return Path(source).expanduser()
    system, path = _file_system(source)
    try:
        files = _files(system, path)
        if not files:
            raise DataError(f"'{redacted(source)}': there is no such file or folder.")
        identity = json.dumps([[name, info.get("size"), system.checksum(name)] for name, info in files.items()])
        root = _cache() / hashlib.sha256(f"{source}\n{identity}".encode()).hexdigest()[:16]
        for name, info in files.items():
            _fetch(system, name, info.get("size"), root / _inside(name))
    except DataError:
        raise
    # Each driver has errors of its own.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and str(error.filename).startswith(str(_cache())):
            raise explained(error, Path(error.filename), 0) from error
        reason = redacted(" ".join(f"{type(error).__name__}: {error}".split()))
        raise DataError(
            f"'{redacted(source)}' cannot be read: {reason[:200]}. Check its name and the access to it."
        ) from None
    return root / _inside(path)


def _file_system(source: str) -> tuple[Any, str]:
    """The driver, and the path in it."""
    import fsspec

    scheme = source.partition(":")[0].lower()
    if scheme not in DRIVERS:
        raise DataError(f"'{redacted(source)}': {scheme}:// is not read. Allowed: {', '.join(DRIVERS)}.")
    try:
        system, path = fsspec.core.url_to_fs(source)
    except ImportError:
        raise DataError(
            f"'{redacted(source)}': the driver of {scheme}:// is not installed: pip install {DRIVERS[scheme]}"
        ) from None
    # Of a driver without credentials, or of a URL that it does not take.
    except Exception as error:
        reason = redacted(" ".join(str(error).split()))[:200]
        raise DataError(f"'{redacted(source)}' cannot be opened: {type(error).__name__}: {reason}.") from None
    return system, path.rstrip("/")


def _files(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """The files that a path names, with what the store says of each."""
    if has_magic(path):
        found = system.glob(path, detail=True)
    elif system.isfile(path):
        found = {path: system.info(path)}
    else:
        found = system.find(path, detail=True) if system.exists(path) else {}
    return {name: found[name] for name in sorted(found) if found[name].get("type", "file") == "file"}


def _fetch(system: Any, name: str, size: int | None, target: Path) -> None:
    """Copy one file, unless it is there; under a name of its own until it is whole."""
    if target.is_file():
        return
    make_folder(target.parent)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        system.get_file(name, str(part))
        found = part.stat().st_size
        if size is not None and found != size:
            raise DataError(f"{name}: {found:,} of its {size:,} bytes arrived. Repeat the command.")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _inside(name: str) -> Path:
    """A path in a store as one in a folder. Raises DataError for one that would leave it."""
    parts = [part for part in PurePosixPath(name.split("://")[-1]).parts if part != "/"]
    if ".." in parts:
        raise DataError(f"'{name}' has '..' in it: name it without.")
    return Path(*parts)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or f"{base}/rlkd/remote").expanduser()
