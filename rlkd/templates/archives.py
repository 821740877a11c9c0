"""Templates files in archives, read without unpacking. What an archive says of itself is not believed: every byte is
counted as it is read, and only regular files are.
"""

from __future__ import annotations

import gzip
import io
import logging
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from ..errors import DataError, shown
from ..io.bounded_yaml import MAX_BYTES

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
TEMPLATE_FILE = "templates.yaml"

# promptsource's archive has 0.2 MiB, 3 MiB unpacked, in 300 members.
MAX_ARCHIVE_BYTES = 2**24
MAX_UNPACKED_BYTES = 2**26
MAX_MEMBERS = 10_000
MAX_EXTENSION_BYTES = 2**10  # of a tar member's header, for a long name


class ArchiveError(DataError):
    """An archive that is not read: without the name of its file."""


def read_archive(name: str, content: bytes) -> dict[str, bytes]:
    """Every templates.yaml of an archive, by the name of the member.

    Members whose path is absolute or contains "..", links, devices and folders are skipped, which is logged.
    Raises DataError for an archive that is damaged, unpacks to too much or gives a member twice.
    """
    members = _zip_members(content) if name.endswith(".zip") else _tar_members(content, name.endswith("gz"))
    found: dict[str, bytes] = {}
    skipped = []
    try:
        for path, stream in members:
            if posixpath.basename(path) != TEMPLATE_FILE:
                continue
            if stream is None or path.startswith("/") or "\\" in path or ".." in path.split("/"):
                skipped.append(path)
                continue
            member = posixpath.normpath(path)
            if member in found:
                raise ArchiveError(f"contains {shown(member)} twice: not an archive of templates")
            found[member] = stream.read(MAX_BYTES + 1)
            if len(found[member]) > MAX_BYTES:
                raise ArchiveError(f"contains {shown(member)}, which has more than {MAX_BYTES >> 10:,} KiB")
    except ArchiveError as error:
        raise DataError(f"{name} {error}.") from None
    # zipfile raises RuntimeError and NotImplementedError for what it cannot unpack.
    except (OSError, EOFError, ValueError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        said = str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__
        raise DataError(f"{name} is not a readable archive: {said[:200]}. Download or create it again.") from error
    if skipped:
        logger.warning(
            "%s: skipped %d members that are no plain files inside it: %s", name, len(skipped), shown(skipped)
        )
    return found


class _Counted(io.RawIOBase):
    """A stream of which no more than MAX_UNPACKED_BYTES can be read."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.left = stream, MAX_UNPACKED_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(block)
        if self.left < 0:
            raise ArchiveError(f"unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB: not an archive of templates")
        return block


class _Header(tarfile.TarInfo):
    """Headers, those of extensions included, that are few and short: tarfile takes long over others, or never ends."""

    read = 0
    extensions = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        header = super().frombuf(buf, encoding, errors)
        cls.read += 1
        if cls.read > MAX_MEMBERS:
            raise ArchiveError(f"has more than {MAX_MEMBERS:,} members: not an archive of templates")
        if header.size < 0 or (header.type in cls.extensions and header.size > MAX_EXTENSION_BYTES):
            raise ArchiveError(f"contains a header of {header.size:,} bytes: not an archive of templates")
        return header


def _tar_members(content: bytes, zipped: bool) -> Iterator[tuple[str, IO[bytes] | None]]:
    """(name, stream) of the members, in order; None for what is no regular file."""
    raw = io.BytesIO(content)
    unpacked = _Counted(gzip.GzipFile(fileobj=raw) if zipped else raw)  # type: ignore[arg-type]
    header = type("Header", (_Header,), {})  # with a count of its own
    with tarfile.open(fileobj=unpacked, mode="r|", tarinfo=header) as tar:  # type: ignore[call-overload]
        for member in tar:
            # A sparse file is regular too, and reads as the zeros that it only claims.
            regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            yield member.name, tar.extractfile(member) if regular else None


def _zip_members(content: bytes) -> Iterator[tuple[str, IO[bytes] | None]]:
    """As `_tar_members`; only what is stored or deflated, which unpacks in pieces."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        if len(file.filelist) > MAX_MEMBERS:
            raise ArchiveError(f"has more than {MAX_MEMBERS:,} members: not an archive of templates")
        left = MAX_UNPACKED_BYTES
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            simple = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
            regular = kind in (0, stat.S_IFREG) and not info.is_dir() and simple
            if not regular or posixpath.basename(info.filename) != TEMPLATE_FILE:
                yield info.filename, None
                continue
            with file.open(info) as stream:
                counted = _Counted(stream)
                counted.left = left
                yield info.filename, counted  # type: ignore[misc]
                left = counted.left
