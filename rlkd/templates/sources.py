"""Lookup of templates files: in folders, in archives, in an installed promptsource and in the cache.

Archives are read without unpacking, and promptsource is never imported: it needs an old Python, and its files are plain
data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ..errors import DataError, nearest
from ..io.files import sha256
from .aliases import template_name

TEMPLATE_FILE = "templates.yaml"
YAML_SUFFIXES = (".yaml", ".yml")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
T = TypeVar("T")

MAX_FILE_BYTES = 2**24
MAX_ARCHIVE_BYTES = 2**28

PROMPTSOURCE_ARCHIVE = "promptsource-0.2.3.tar.gz"
PROMPTSOURCE_SHA256 = "f106c889778a0fe5590e7183904bf964e1a01691c8a29451e44f3df5ddef05f5"
DOWNLOAD_HINT = "`rlkd prompts download` fetches promptsource's 2,085 templates over 180 data sets."
# Next to the package in a checkout, inside it in an installation (see pyproject.toml).
PACKAGE_PROMPTS = next(
    (p for p in (Path(__file__).resolve().parents[i] / "prompts" for i in (2, 1)) if p.is_dir()),
    Path("prompts").resolve(),
)


@dataclass(frozen=True)
class TemplatesFile:
    """The bytes of one templates file and where they come from.

    place   its name in errors: its path, or archive!member
    sha256  of the file, or of the archive that contains it
    source  where the lookup found it: a folder, an archive or the file itself
    """

    place: str
    content: bytes
    sha256: str
    source: str

    @cached_property
    def trusted(self) -> bool:
        """Whether it comes with rlkd or from promptsource itself; all other files are untrusted."""
        shipped = Path(self.place).resolve().is_relative_to(PACKAGE_PROMPTS)
        installed = installed_promptsource()
        return (
            shipped
            or self.sha256 == PROMPTSOURCE_SHA256
            or (installed is not None and Path(self.place).is_relative_to(installed))
        )


@dataclass(frozen=True)
class Source:
    """A folder, an archive or one YAML file of templates; `files` maps `dataset[/subset]` to a path or a member."""

    path: Path

    @cached_property
    def files(self) -> dict[str, str]:
        if self.path.is_dir():
            found = sorted(self.path.rglob(TEMPLATE_FILE))
            return {file.parent.relative_to(self.path).as_posix(): str(file) for file in found}
        if self.path.name.endswith(YAML_SUFFIXES):
            return {_dataset_of(self.path): str(self.path)}
        return dict(sorted((_key(member), member) for member in _members(self.path)))

    def place(self, dataset: str) -> str:
        """The path of a data set's file, or archive!member."""
        name = self.files[dataset]
        return f"{self.path}!{name}" if self.path.name.endswith(ARCHIVE_SUFFIXES) and self.path.is_file() else name

    def counts(self) -> dict[str, int]:
        """The number of templates of each data set, counted by their tags: no file is parsed."""
        if self.path.name.endswith(ARCHIVE_SUFFIXES) and self.path.is_file():
            contents = _read_members(self.path, set(self.files.values()))
            return {dataset: _count(contents[name]) for dataset, name in self.files.items()}
        return {dataset: _count(read_file(Path(name)).content) for dataset, name in self.files.items()}

    def read(self, dataset: str) -> TemplatesFile:
        """A data set's file. Raises DataError naming what cannot be read."""
        name, place = self.files[dataset], self.place(dataset)
        if place == name:
            return read_file(Path(name), source=str(self.path))
        return TemplatesFile(place, _read_members(self.path, {name})[name], sha256(self.path), str(self.path))


def sources(path: Path | None = None) -> list[Source]:
    """The places where templates are looked up, in order: `path` alone if given, else ./prompts, the prompts shipped
    with rlkd, an installed promptsource and the downloaded archive, as far as they exist.

    Raises: DataError if `path` is neither a folder, a YAML file nor an archive.
    """
    if path is not None:
        path = path.expanduser()
        if not (path.is_dir() or (path.is_file() and path.name.endswith((*YAML_SUFFIXES, *ARCHIVE_SUFFIXES)))):
            problem = "is neither" if path.exists() else "does not exist. It must be"
            kinds = f"a folder, a YAML file ({', '.join(YAML_SUFFIXES)}) or an archive ({', '.join(ARCHIVE_SUFFIXES)})"
            raise DataError(f"templates '{path}' {problem} {kinds}.")
        return [Source(path)]
    local = Path("prompts")
    folders = [PACKAGE_PROMPTS] if local.resolve() == PACKAGE_PROMPTS else [local, PACKAGE_PROMPTS]
    return [Source(p) for p in [*folders, installed_promptsource(), cached_archive()] if p is not None and p.exists()]


def find(dataset: str, places: list[Source]) -> TemplatesFile:
    """The file of `dataset[/subset]`, by promptsource's name or the hub id, from the first source that has it.

    Raises: DataError with the sources, the nearest name, the available subsets and the remedy.
    """
    for name in dict.fromkeys([dataset, template_name(dataset)]):
        for source in places:
            if name in source.files:
                return source.read(name)
    known = list(dict.fromkeys(name for source in places for name in source.files))
    where = " or ".join(str(source.path) for source in places) or "./prompts"
    subsets = [name for name in known if name.startswith(f"{template_name(dataset)}/")]
    if subsets:
        raise DataError(f"'{dataset}' has templates per subset in {where}. Name one of: {', '.join(subsets)}.")
    shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more (rlkd prompts list)" if len(known) > 20 else "")
    hint = "" if any(str(source.path).endswith(PROMPTSOURCE_ARCHIVE) for source in places) else f" {DOWNLOAD_HINT}"
    raise DataError(
        f"no templates for '{dataset}' in {where}. Available: {shown or 'none'}.{nearest(dataset, known)} "
        f"A file is named by its path: path/to/{TEMPLATE_FILE}[:Template name].{hint}"
    )


def installed_promptsource() -> Path | None:
    """The templates folder of an installed promptsource, found without importing it; None if there is none."""
    spec = importlib.util.find_spec("promptsource")
    folders = [Path(place) / "templates" for place in (spec.submodule_search_locations or [] if spec else [])]
    return next((folder for folder in folders if folder.is_dir()), None)


def cache_folder() -> Path:
    """$RLKD_CACHE, or rlkd in the user's cache folder."""
    if own := os.environ.get("RLKD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlkd"


def cached_archive() -> Path:
    """Where `rlkd prompts download` puts promptsource's archive."""
    return cache_folder() / PROMPTSOURCE_ARCHIVE


def read_file(file: Path, *, source: str | None = None) -> TemplatesFile:
    """One file. Raises DataError if it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. A templates file is UTF-8 YAML.") from error
    return TemplatesFile(str(file), content, hashlib.sha256(content).hexdigest(), source or str(file))


def _dataset_of(file: Path) -> str:
    """`dataset[/subset]` from the file's own fields, else the name of its folder."""
    from .parsing import parse

    try:
        own = parse(read_file(file).content).dataset
    except DataError:
        own = None  # reported, with the line, when the file is read
    return own or file.resolve().parent.name


def _key(member: str) -> str:
    """`dataset[/subset]` of an archive's member: its folder, counted from the last one named templates or prompts."""
    parts = member.split("/")[:-1]
    roots = [i for i, part in enumerate(parts) if part in ("templates", "prompts")]
    return "/".join(parts[roots[-1] + 1 :] if roots else parts)


def _members(archive: Path) -> list[str]:
    """The templates files of an archive. Links, absolute paths and paths with .. are ignored."""
    total = 0
    names = []
    for name, size, regular in _guard(archive, lambda: list(_entries(archive))):
        total += size
        if total > MAX_ARCHIVE_BYTES:
            raise DataError(
                f"{archive} unpacks to more than {MAX_ARCHIVE_BYTES >> 20} MiB: not an archive of templates."
            )
        safe = regular and not name.startswith("/") and ".." not in name.split("/") and "\\" not in name
        if safe and posixpath.basename(name) == TEMPLATE_FILE and size <= MAX_FILE_BYTES:
            names.append(name)
    return names


def _entries(archive: Path) -> Iterator[tuple[str, int, bool]]:
    """(name, size, whether it is a regular file) of all members."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                yield info.filename, info.file_size, not info.is_dir() and (info.external_attr >> 28) != 0o12
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            yield member.name, member.size, member.isreg()
            if member.offset_data > MAX_ARCHIVE_BYTES:
                return


def _read_members(archive: Path, names: set[str]) -> dict[str, bytes]:
    """The named members, which `_members` has checked to be regular files of limited size."""

    def read() -> dict[str, bytes]:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                return {name: file.read(name) for name in names}
        with tarfile.open(archive) as tar:
            streams = ((member.name, tar.extractfile(member)) for member in tar if member.name in names)
            return {name: stream.read() for name, stream in streams if stream is not None}

    return _guard(archive, read)


def _count(content: bytes) -> int:
    return len(re.findall(rb":\s*!Template\s", content))


def _guard(archive: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        said = str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__
        raise DataError(f"{archive} is not a readable archive: {said}. Download or create it again.") from error
