"""Dataclasses of settings, filled from flags and one YAML file; every mistake is reported before any model loads.

TRL's TrlParser turns the dataclasses into flags. It does not validate a YAML file (a misspelt choice, 3.7 for an int, a
repeated key), so the file is checked here. Flags override the file, the file overrides the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType, NoneType
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from ..checks import choices_of, field_types, in_words, members_of
from ..errors import ConfigError, RlkdError, nearest, shown
from ..io import bounded_yaml
from ..io.outputs import prepare_outputs
from ..io.redaction import redact_command_line, redacted
from .fields import default_of, own_names, plain
from .paths import config_file

MOST_PROBLEMS = 20  # fits on one screen
NOTHING: Mapping[str, Any] = MappingProxyType({})
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # variables that they set


def parse_config(
    dataclass_types: tuple[type, ...],
    argv: list[str] | None = None,
    *,
    preset: Mapping[str, Any] = NOTHING,
) -> tuple[Any, ...]:
    """One instance per dataclass, filled from `argv` (by default the command line), the file that `--config` names and
    `preset`, in that order.

    Raises ConfigError for everything that is not valid in either, all problems of the file at once.
    """
    values, origins = _given(dataclass_types, argv, preset)
    _refuse_missing(dataclass_types, values)
    built = _build(dataclass_types, values, origins)
    if argv is None:
        redact_command_line()
    return built


@dataclass(frozen=True)
class Setting:
    """One setting of a run: value, resolved and without secrets; origin, `default`, `preset`, file:line or flag;
    allowed, in words; section, its dataclass; own, False for settings of transformers or TRL.
    """

    name: str
    value: Any
    origin: str
    allowed: str
    default: Any
    help: str
    section: str
    own: bool


def describe_config(
    dataclass_types: tuple[type, ...], argv: list[str], *, preset: Mapping[str, Any] = NOTHING
) -> list[Setting]:
    """Every setting that `parse_config` would fill, and where its value comes from. Raises ConfigError as that does."""
    values, origins = _given(dataclass_types, argv, preset)
    _refuse_missing(dataclass_types, values)
    hints = _hints(dataclass_types)
    return [
        Setting(
            item.name,
            redacted(plain(getattr(section, item.name)), item.name),
            origins.get(item.name, "default"),
            in_words(hints[item.name]),
            redacted(default_of(item), item.name),
            item.metadata.get("help", ""),
            type(section).__name__,
            item.name in own_names(type(section)),
        )
        for section in _build(dataclass_types, values, origins)
        for item in fields(section)
        if item.init
    ]


def _given(
    dataclass_types: tuple[type, ...], argv: list[str] | None, preset: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that the preset, the file and the flags give, and the origin of each."""
    from .trl_compat import TrlParser  # loads torch, which `run_main` does not need

    hints = _hints(dataclass_types)
    argv = sys.argv[1:] if argv is None else argv
    parser = TrlParser(dataclass_types, allow_abbrev=False, exit_on_error=False)  # type: ignore[arg-type]
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file of settings; flags override it.")
    _complete_choices(parser, hints)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    parser.set_defaults_with_config(**dict.fromkeys(hints, argparse.SUPPRESS))  # to return only what argv sets
    flags = _flags(parser, argv, hints)

    files = flags.pop("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times ({', '.join(files)}): only one file is allowed.")
    values, origins = _read(config_file(files[0]), hints) if files else ({}, {})
    values = {**preset, **values, **flags}
    return values, dict.fromkeys(preset, "preset") | origins | {name: f"--{name}" for name in flags}


def run_main(main: Callable[[], None]) -> None:
    """Run a script with log lines on stderr. An RlkdError is printed without a traceback and sets the exit code; under
    a launcher, whose own traceback follows and whose code is 1, the code is also the last line.
    """
    prepare_outputs()
    try:
        main()
    except RlkdError as error:
        message = f"error: {redacted(str(error))}"
        print(message, file=sys.stderr)
        _tell_launcher(message, error.exit_code)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        # Of a library that reads or writes: a full disk, a folder that is gone, a network.
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(1) from None


def _tell_launcher(message: str, code: int) -> None:
    """accelerate and torchrun end with code 1 and a traceback of their own, whatever a script ends with."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows of a process that failed
        shown = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": shown}}))
    if any(name in os.environ for name in LAUNCHERS):
        print(
            f"exit code {code}; what follows is the launcher's, which ends with 1 (one process needs none: "
            f"python {Path(sys.argv[0]).name})",
            file=sys.stderr,
            flush=True,
        )


def _refuse(problems: list[str]) -> NoReturn:
    more = len(problems) - MOST_PROBLEMS
    raise ConfigError("\n".join(problems[:MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])))


def _hints(dataclass_types: tuple[type, ...]) -> dict[str, Any]:
    """The type of every setting, by name; no two dataclasses may share a name."""
    owners: dict[str, str] = {}
    hints: dict[str, Any] = {}
    for kind in dataclass_types:
        types = field_types(kind)
        for field in fields(kind):
            if field.name in owners:
                raise TypeError(
                    f"{owners[field.name]} and {kind.__name__} both have a field {field.name!r}: rename one"
                )
            owners[field.name] = kind.__name__
            if field.init:
                hints[field.name] = types[field.name]
    return hints


def _complete_choices(parser: argparse.ArgumentParser, hints: dict[str, Any]) -> None:
    """Give flags the choices that TRL's parser does not know: those of a `OneOf`, and `null` where it is allowed."""
    for action in parser._actions:
        hint = hints.get(action.dest)
        choices = tuple(choices_of(hint))
        if not choices:
            continue
        action.choices = choices
        if NoneType in members_of(hint) and action.nargs is None:
            parse: Any = action.type
            action.choices = (*choices, None)
            action.type = lambda text, parse=parse, null={"null", "none"} - {*choices}: (
                None if text in null else parse(text)
            )


def _flags(parser: argparse.ArgumentParser, argv: list[str], hints: dict[str, Any]) -> dict[str, Any]:
    """The settings given on the command line."""
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = (error.argument_name or "command line").split("/")[0]
        hint = hints.get(flag.lstrip("-"))
        said = re.split(r" \(choose| but expected", error.message)[0]  # argparse's own list of choices is left out
        allowed = f": allowed are {in_words(hint)}" if hint else ""
        wrong = re.search(r"invalid choice: '([^']*)'", said)
        close = nearest(wrong[1], list(map(str, choices_of(hint)))) if wrong else ""
        raise ConfigError(f"{flag}: {said}{allowed}.{close} See --help.") from None
    if unknown:
        misspelt = [text.partition("=")[0] for text in unknown if re.match("-+[a-zA-Z]", text)]
        known = [f"--{name}" for name in (*hints, "config")]
        problems = [
            f"{flag} is not a flag.{nearest('--' + flag.lstrip('-').replace('-', '_'), known)}" for flag in misspelt
        ]
        stray = f"{unknown[0]!r} does not belong to a flag: settings are given as --name value."
        _refuse([*(problems or [stray]), "See --help."])
    return vars(namespace)


def _read(path: Path, hints: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The checked settings of a YAML file and the line of each; all problems of the file are reported at once."""
    if not path.exists():
        others = [other.name for other in path.parent.glob("*.y*ml")]
        raise ConfigError(f"--config {path}: no such file.{nearest(path.name, others)}")
    return bounded_yaml.read(path, lambda text: _check_file(path, text, hints))


def _check_file(path: Path, text: str, hints: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    loader = bounded_yaml.Loader(text)
    root = loader.get_single_node()
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: the file must contain settings, one 'name: value' per line.")
    repeated = bounded_yaml.repeated_keys(root)
    problems = [(key.start_mark.line + 1, f"key {shown(key.value)} is given twice.") for key, _ in repeated]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    loader.flatten_mapping(root)
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _source(text, key)
        line = key.start_mark.line + 1
        if name not in hints:
            close = nearest(name, list(hints)) if len(problems) < MOST_PROBLEMS else ""  # which takes time
            problems.append((line, f"key {shown(name)} is not a setting.{close}"))
            continue
        try:
            values[name], origins[name] = _value(loader, node, hints[name]), f"{path}:{line}"
        except (TypeError, ValueError):
            problem = f"{name} = {redacted(_source(text, node), name)}: allowed are {in_words(hints[name])}."
            problems.append((line, problem + _remedy(node, hints[name])))
    if problems:
        _refuse([f"{path}:{line}: {problem}" for line, problem in sorted(problems)])
    return values, origins


def _source(text: str, node: yaml.Node) -> str:
    """The text of a node in the file, on one line."""
    return shorten(text[node.start_mark.index : node.end_mark.index], 80)


def _remedy(node: yaml.Node, hint: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return ""
    return " Put it in quotes." if str in members_of(hint) else nearest(node.value, [str(c) for c in choices_of(hint)])


def _value(loader: bounded_yaml.Loader, node: yaml.Node, hint: Any) -> Any:
    """The value of a node as the type `hint`; ValueError for another type. Types unknown to pydantic always pass."""
    value = loader.construct_object(node, deep=True)
    choices = {type(choice) for choice in choices_of(hint)}
    if isinstance(value, bool) and choices and bool not in {*choices, *members_of(hint)}:
        value = node.value  # YAML 1.1 reads `no` as false; as a choice it is a word
    try:  # strict JSON: 3 is a valid float; 3.7 is not an int, "3" not a number, 1 not a bool
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except PydanticUserError:
        return value


def _refuse_missing(kinds: tuple[type, ...], values: dict[str, Any]) -> None:
    required = [f.name for kind in kinds for f in fields(kind) if f.init and f.default is f.default_factory is MISSING]
    missing = [f"--{name}" for name in required if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: required. Give it as a flag or in the file of --config.")


def _build(kinds: tuple[type, ...], values: dict[str, Any], origins: dict[str, str]) -> tuple[Any, ...]:
    """The dataclasses; an error of a `__post_init__` is reported with the settings involved and their origins."""
    instances, problems = [], []
    for kind in kinds:
        own = {field.name: values[field.name] for field in fields(kind) if field.name in values}
        try:
            instances.append(kind(**own))
        except (ValueError, ConfigError) as error:
            named = [name for name in own if re.search(rf"\b{name}\b", str(error))] or own
            given = ", ".join(f"{name} ({origins[name]})" for name in named)
            problems.append(f"{kind.__name__}: {error}" + (f"\n  given: {given}" if given else ""))
    if problems:
        _refuse(problems)
    return tuple(instances)
