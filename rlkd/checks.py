"""Ranges and choices, declared with a type and checked wherever a value comes from.

A dataclass declares them with its fields (`Fraction`, `Literal["max", "lse"]`, an Enum, `Annotated[str, OneOf(names)]`)
and calls `check_settings(self)` at the start of `__post_init__`. A function calls `check_choice`. The parser of YAML
files and flags (`settings.parsing`) reads the same declarations.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import Field, fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from .errors import ConfigError, nearest, shown

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Lt(1)]  # of something that is split in two

# Its attribute, its text, and its comparison.
LIMITS: dict[type, tuple[str, str, Any]] = {
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "above", operator.gt),
    Le: ("le", "at most", operator.le),
    Lt: ("lt", "below", operator.lt),
}
WORDS = {bool: "true, false", int: "whole numbers", float: "numbers", str: "text", NoneType: "null", dict: "mappings"}
# Ranges of fields of transformers' TrainingArguments that it does not check: they would fail late, or train on no data.
FOREIGN_RANGES = {
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_grad_norm": NonNegative,
    "weight_decay": NonNegative,
}
# Tags of words: outside of every entity; its first, a further, its last, its only word (IOB and IOBES).
OUTSIDE = "O"
TAG = re.compile(r"O|[BIES](-.+)?")


class OneOf:
    """Choices given by a collection, such as the keys of a dictionary: `Annotated[str, OneOf(REWARDS)]`.

    The collection is read at every check, so names that are added to it later are allowed at once.
    """

    def __init__(self, names: Collection[Any]):
        self.names = names

    def __repr__(self) -> str:
        return f"OneOf({', '.join(map(repr, self.names))})"


def check_settings(section: Any) -> None:
    """Check all fields of a dataclass against their declared ranges and choices; types are not checked.

    Raises ConfigError with one line for each wrong field: name, value, what is allowed, the nearest choice.
    """
    kind: Any = type(section)
    found = (_problem(name, getattr(section, name), hint) for name, hint in _constrained(kind).items())
    if problems := [problem for problem in found if problem]:
        raise ConfigError("\n".join(problems))


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise ConfigError unless the argument `name` has an allowed value: of a Literal type, or of a collection."""
    if problem := _problem(name, value, allowed if get_origin(allowed) else Annotated[str, OneOf(allowed)]):
        raise ConfigError(problem)


def field_types(kind: Any) -> dict[str, Any]:
    """The declared type of every field that the constructor takes, choices as Literals (see `resolved`)."""
    return {name: resolved(hint) for name, hint in _declared(kind).items()}


def resolved(hint: Any) -> Any:
    """A type whose choices are Literals: those of `Annotated[str, OneOf(names)]` as they are now, and those that
    `Enum | str` stands for. Other types are returned as they are.
    """
    members = members_of(hint)
    if enums := [member for member in members if isinstance(member, type) and issubclass(member, Enum)]:
        return _literal([item.value for item in enums[0]], NoneType in members)
    names = registered_names(hint)
    if names is None:
        return hint
    if len(members) > 1:
        return Union[tuple(map(resolved, members))]  # noqa: UP007 - of a tuple
    return list[resolved(*get_args(hint))] if get_origin(hint) is list else _literal(names)  # type: ignore[misc]


def members_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself if it is none."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def choices_of(hint: Any) -> list[Any]:
    """The choices that a resolved type admits, those of its union members and list items included."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    nested = get_args(hint) if get_origin(hint) in (Union, UnionType, list) else ()
    return [choice for member in nested for choice in choices_of(member)]


def registered_names(hint: Any) -> Collection[Any] | None:
    """The names in the `OneOf` of a type, of a member of a union, or of a list's items; None without a `OneOf`."""
    own = [extra.names for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, OneOf)]
    nested = [names for argument in get_args(hint) if (names := registered_names(argument)) is not None]
    return next(iter([*own, *nested]), None)


def in_words(hint: Any) -> str:
    """What a resolved type admits: `'max', 'lse'`; `numbers (above 0), null`; `lists of text`."""
    if get_origin(hint) in (Union, UnionType):
        return ", ".join(map(in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(repr(item.value) for item in hint)
    if get_origin(hint) is Annotated:
        return f"{in_words(get_args(hint)[0])} ({_bounds_in_words(_limits_of(hint))})"
    if get_origin(hint) is list:
        return f"lists of {in_words(get_args(hint)[0])}"
    return WORDS.get(get_origin(hint) or hint, str(hint))


def _literal(choices: Collection[Any], or_none: bool = False) -> Any:
    literal: Any = Literal.__getitem__(tuple(choices))
    return literal | None if or_none else literal


@cache
def _declared(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True) | {
        name: hint for name, hint in FOREIGN_RANGES.items() if name in getattr(kind, "__dataclass_fields__", {})
    }
    return {field.name: _with_argparse_choices(field, hints[field.name]) for field in fields(kind) if field.init}


def _with_argparse_choices(field: Field, hint: Any) -> Any:
    """`str` with `choices` in its metadata, as transformers and TRL declare some fields, as a Literal."""
    choices = field.metadata.get("choices")
    return _literal(choices, NoneType in members_of(hint)) if choices else hint


@cache
def _constrained(kind: Any) -> dict[str, Any]:
    """The fields that have a range or choices."""
    return {name: hint for name, hint in _declared(kind).items() if _limits_of(hint) or choices_of(resolved(hint))}


def _problem(name: str, value: Any, hint: Any) -> str | None:
    """The error of a value, as text; None if it is valid."""
    limits = _limits_of(hint)
    if limits and value is not None and not all(_holds(limit, value) for limit in limits):
        return f"{name} = {shown(value)}: must be {_bounds_in_words(limits)}"
    hint = resolved(hint)
    choices = choices_of(hint)
    if not choices or _admits(hint, value):
        return None
    given = value if isinstance(value, (list, tuple)) else [value]
    wrong = next((str(item) for item in given if item not in choices), "")
    return f"{name} = {_shown(value)}: allowed are {in_words(hint)}.{nearest(wrong, list(map(str, choices)))}"


def _shown(value: Any) -> str:
    """`repr`, of an Enum that of its value."""
    return shown(value.value if isinstance(value, Enum) else value)


def _admits(hint: Any, value: Any) -> bool:
    """Whether a value is among the choices of a resolved type, or has the type of a member without choices."""
    value = value.value if isinstance(value, Enum) else value
    if get_origin(hint) in (Union, UnionType):
        return any(_admits(member, value) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, (list, tuple)) and all(_admits(get_args(hint)[0], item) for item in value)
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else get_origin(hint) or hint
    return kind is Any or isinstance(value, (int, float) if kind is float else kind)


def _limits_of(hint: Any) -> tuple[Any, ...]:
    """The limits declared with a type, or with a member of a union."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(limit for member in get_args(hint) for limit in _limits_of(member))
    return tuple(extra for extra in getattr(hint, "__metadata__", ()) if type(extra) in LIMITS)


def _bounds_in_words(limits: tuple[Any, ...]) -> str:
    """`at least 1`, `above 0`, `at least 0 and at most 1`."""
    kinds = [(limit, *LIMITS[type(limit)]) for limit in limits]
    return " and ".join(f"{words} {getattr(limit, bound)}" for limit, bound, words, _ in kinds)


def _holds(limit: Any, value: Any) -> bool:
    bound, _, compare = LIMITS[type(limit)]
    try:
        return compare(value, getattr(limit, bound))
    except TypeError:  # not a number
        return False


def tag_fault(names: Sequence[str]) -> str | None:
    """What keeps names from being the tags of entities; None if nothing does."""
    if wrong := [name for name in names if not TAG.fullmatch(name)]:
        return (
            f"'{wrong[0]}' is no tag of an entity: allowed are {OUTSIDE}, and B-, I-, E- or S- before a type (write L- "
            "as E-, U- as S-; if tags are numbers, set labels to their names in order)"
        )
    return None if OUTSIDE in names else f"there is no tag {OUTSIDE}, of words outside of every entity"
