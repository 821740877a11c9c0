"""YAML from outside, read within limits: what a small file says cannot take much time or memory.

Values are as in YAML 1.2 where YAML 1.1 surprises: 12:30, 010 and 2024-01-31 are text, 1e-5 is a number.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError, SafeConstructor

from ..errors import ConfigError, shown

Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
T = TypeVar("T")

# The largest of promptsource's 279 files has 60 KB and 900 nodes.
MAX_BYTES = 2**20
MAX_NODES = 50_000  # keys, values and collections; an alias counts as all that it stands for
MAX_CHARACTERS = 2**22  # of all scalars, aliases included
MAX_DEPTH = 40

# Of 64 bits: among larger numbers thousands have the same hash, which makes a mapping's keys slow to tell apart.
_INT = r"[-+]?(0b[01_]{1,64}|0x[0-9a-fA-F_]{1,16}|0|[1-9][0-9_]{,19})$"
_FLOAT = r"(?=.{1,40}$)[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?$"
_SCALARS = {
    "null": r"(~|null|Null|NULL|)$",
    "bool": r"(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$",
    "int": _INT,
    "float": rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
    "merge": r"<<$",
}


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


class Loader(Base):
    """yaml.SafeLoader of a text within the limits: `get_single_node` raises YAMLError for one beyond them.

    Only text, numbers, booleans, null, lists and mappings are constructed; a subclass may add tags.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as in yaml
    yaml_constructors: dict[Any, Any] = {  # noqa: RUF012
        _tag("str"): SafeConstructor.construct_yaml_str,
        _tag("seq"): SafeConstructor.construct_yaml_seq,
        _tag("map"): SafeConstructor.construct_yaml_map,
        None: SafeConstructor.construct_undefined,
    }

    def __init__(self, text: str):
        _check(text)
        super().__init__(text)


def _typed(name: str, construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The constructor of scalars that refuses what does not look like its type, as in `!!int 1:1`."""

    def constructor(loader: Any, node: yaml.Node) -> Any:
        text = loader.construct_scalar(node)
        if not re.match(_SCALARS[name], text):
            raise ConstructorError(None, None, f"{shown(text)} is no {name}", node.start_mark)
        return construct(loader, node)

    return constructor


for _name, _pattern in _SCALARS.items():
    Loader.add_implicit_resolver(_tag(_name), re.compile(_pattern), None)
for _name in ("null", "bool", "int", "float"):
    Loader.add_constructor(_tag(_name), _typed(_name, getattr(SafeConstructor, f"construct_yaml_{_name}")))


def load(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for a key that is given twice."""
    loader = Loader(text)
    root = loader.get_single_node()
    for key, first in repeated_keys(root):
        raise ConstructorError(None, None, f"key {shown(key.value)} is already given in line {first}", key.start_mark)
    return None if root is None else loader.construct_document(root)


def read(path: Path, parse: Callable[[str], T] = load) -> T:
    """What `parse` makes of a UTF-8 file. Raises ConfigError, with the line, for a file that cannot be read."""
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start:,}.") from None
    try:
        return parse(text)
    except yaml.YAMLError as error:
        line, column, said = problem(error, text)
        raise ConfigError(f"{path}:{line}:{column}: not valid YAML: {said}.") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file, read no further than just beyond the limit, whatever size it claims to have.

    Raises OSError, also for a file of more than `limit` bytes.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 10:,} KiB, the most that is read")
    return content


def problem(error: Exception, text: str) -> tuple[int, int, str]:
    """Line and column of a YAMLError, counted from 1, and what is wrong, on one line."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        said = f"it contains the control character U+{error.character:04X}"
        return before.count("\n") + 1, len(before) - before.rfind("\n"), said
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    if mark and said == "found character that cannot start any token":
        said = f"found character {text[mark.index]!r} that cannot start any token"
    if said.startswith("but "):
        said = f"{getattr(error, 'context', None)}, {said}"
    return *((mark.line + 1, mark.column + 1) if mark else (1, 1)), shorten(said, 200)


def repeated_keys(root: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, int]]:
    """Keys that a mapping gives again, where YAML would silently keep the last one, and the line of the first."""
    seen: set[int] = set()

    def walk(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, int]]:
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:
            return
        seen.add(id(node))
        lines: dict[tuple[str, str], int] = {}
        for child in node.value:
            key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
            if isinstance(key, yaml.ScalarNode):
                name = key.tag, key.value
                if name in lines:
                    yield key, lines[name]
                lines.setdefault(name, key.start_mark.line + 1)
            elif key is not None:
                yield from walk(key)
            yield from walk(value)

    if root is not None:
        yield from walk(root)


def _check(text: str) -> None:
    """Raise YAMLError for a text beyond the limits, before anything is made of it."""
    if len(text) > MAX_BYTES:
        raise ComposerError(None, None, f"it has more than {MAX_BYTES >> 10:,} KiB")
    if re.search("^%TAG", text, re.MULTILINE):
        raise ComposerError(None, None, "it defines tags with %TAG, which is not allowed")
    nodes = characters = 0
    sizes: dict[str | None, tuple[int, int]] = {}  # of what has an anchor
    opened: list[tuple[str | None, int, int]] = []
    for event in yaml.parse(text, Loader=Base):
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, *_ in opened):
                raise ComposerError(None, None, f"alias {shown(event.anchor)} is inside what it stands for", mark)
            more = sizes.get(event.anchor, (0, 0))
            nodes, characters = nodes + more[0], characters + more[1]
        elif isinstance(event, yaml.ScalarEvent):
            nodes, characters = nodes + 1, characters + len(event.value)
            sizes[event.anchor] = 1, len(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes, characters))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, written = opened.pop()
            sizes[anchor] = nodes - before, characters - written
        for size, limit, unit in (
            (nodes, MAX_NODES, "values"),
            (characters, MAX_CHARACTERS, "characters"),
            (len(opened), MAX_DEPTH, "levels"),
        ):
            if size > limit:
                raise ComposerError(None, None, f"it has more than {limit:,} {unit}, aliases written out", mark)
