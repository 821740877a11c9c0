"""Lookup of templates files: in folders, in archives, in an installed promptsource and in the cache.

Archives are read without unpacking, and promptsource is never imported: it needs an old Python, and its files are plain
data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import DataError, cut, listed, nearest
from ..io.bounded_yaml import MAX_BYTES, read_bytes
from .aliases import template_name
from .archives import ARCHIVE_SUFFIXES, MAX_ARCHIVE_BYTES, TEMPLATE_FILE, read_archive

YAML_SUFFIXES = (".yaml", ".yml")

PROMPTSOURCE_ARCHIVE = "promptsource-0.2.3.tar.gz"
PROMPTSOURCE_SHA256 = "f106c889778a0fe5590e7183904bf964e1a01691c8a29451e44f3df5ddef05f5"
DOWNLOAD_HINT = "`rlkd prompts download` fetches promptsource's 2,085 templates over 180 data sets."
# Next to the package in a checkout, inside it in an installation (see pyproject.toml).
_BESIDE, _INSIDE = (Path(__file__).resolve().parents[i] / "prompts" for i in (2, 1))
PACKAGE_PROMPTS = _BESIDE if _BESIDE.is_dir() else _INSIDE


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
        """Whether it comes with rlkd or from promptsource's own archive; all other files are untrusted."""
        shipped = Path(self.place).resolve().is_relative_to(PACKAGE_PROMPTS)
        return shipped or self.sha256 == PROMPTSOURCE_SHA256


@dataclass(frozen=True)
class Source:
    """A folder, an archive or one YAML file of templates; `files` maps `dataset[/subset]` to a path or a member."""

    path: Path

    @property
    def is_archive(self) -> bool:
        return self.path.name.endswith(ARCHIVE_SUFFIXES) and self.path.is_file()

    @cached_property
    def files(self) -> dict[str, str]:
        if self.is_archive:
            return {dataset: member for dataset, (member, _) in sorted(self._archive[1].items())}
        if self.path.is_dir():
            found = sorted(self.path.rglob(TEMPLATE_FILE))
            return {file.parent.relative_to(self.path).as_posix(): str(file) for file in found}
        return {_dataset_of(self.path): str(self.path)}

    @cached_property
    def _archive(self) -> tuple[str, dict[str, tuple[str, bytes]]]:
        """The digest of an archive, and (member, content) of each data set, all from one reading of the file.

        Raises DataError for an archive that cannot be read, for two files of one data set, and for promptsource's
        archive if it is not the one that was published.
        """
        content = _read(self.path, MAX_ARCHIVE_BYTES, "An archive of templates is a small file")
        digest = hashlib.sha256(content).hexdigest()
        if self.path.name == PROMPTSOURCE_ARCHIVE and digest != PROMPTSOURCE_SHA256:
            raise DataError(
                f"{self.path} has sha256 {digest}, not {PROMPTSOURCE_SHA256}: it is damaged or was changed. Replace it "
                "by `rlkd prompts download`, or rename it if it is an archive of your own."
            )
        found: dict[str, tuple[str, bytes]] = {}
        for member, text in read_archive(str(self.path), content).items():
            other, _ = found.setdefault(_key(member), (member, text))
            if other != member:
                raise DataError(
                    f"{self.path}: {cut(other)} and {cut(member)} are both the templates of '{cut(_key(member))}'. "
                    "Remove one."
                )
        return digest, found

    def place(self, dataset: str) -> str:
        """The path of a data set's file, or archive!member."""
        name = self.files[dataset]
        return f"{self.path}!{name}" if self.is_archive else name

    def counts(self) -> dict[str, int]:
        """The number of templates of each data set, counted by their tags: no file is parsed."""
        return {dataset: _count(self.read(dataset).content) for dataset in self.files}

    def read(self, dataset: str) -> TemplatesFile:
        """A data set's file. Raises DataError naming what cannot be read."""
        if not self.is_archive:
            return read_file(Path(self.files[dataset]), source=str(self.path))
        digest, found = self._archive
        return TemplatesFile(self.place(dataset), found[dataset][1], digest, str(self.path))


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
        raise DataError(f"'{dataset}' has templates per subset in {where}. Name one of: {listed(subsets)}.")
    hint = "" if any(str(source.path).endswith(PROMPTSOURCE_ARCHIVE) for source in places) else f" {DOWNLOAD_HINT}"
    raise DataError(
        f"no templates for '{dataset}' in {where}. Available: {listed(known) or 'none'}.{nearest(dataset, known)} "
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
    content = _read(file, MAX_BYTES, "A templates file is UTF-8 YAML")
    return TemplatesFile(str(file), content, hashlib.sha256(content).hexdigest(), source or str(file))


def _read(file: Path, limit: int, remedy: str) -> bytes:
    """The content of a regular file: a device may have no end, and a pipe may never begin."""
    if file.exists() and not file.is_file():
        raise DataError(f"{file} cannot be read: it is no regular file. {remedy}.")
    try:
        return read_bytes(file, limit)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. {remedy}.") from error


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


def _count(content: bytes) -> int:
    return len(re.findall(rb":\s*!Template\s", content))
