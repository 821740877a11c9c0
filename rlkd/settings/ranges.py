"""Dataclasses of settings: ranges, declared with a field's type and checked for every way a value can come in; plain
values, as JSON has them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import MISSING, Field
from enum import Enum
from functools import cache
from inspect import get_annotations
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from ..errors import ConfigError

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]

# Its field, in words, and as a comparison.
LIMITS: dict[type, tuple[str, str, Any]] = {
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "above", operator.gt),
    Le: ("le", "at most", operator.le),
}

FOREIGN = {"transformers", "trl"}
# Of TrainingArguments, which checks little: what would fail late, or train on nothing.
THEIRS = {
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_grad_norm": NonNegative,
    "weight_decay": NonNegative,
}


def check_ranges(section: Any) -> None:
    """Raise ConfigError naming every field of a dataclass whose value is out of its declared range."""
    problems = []
    kind: Any = type(section)
    for name, limits in _limits(kind).items():
        value = getattr(section, name)
        if value is not None and not all(_holds(limit, value) for limit in limits):
            problems.append(f"{name} = {value!r}: must be {in_words(limits)}")
    if problems:
        raise ConfigError("\n".join(problems))


def type_hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, limits included."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: THEIRS.get(name, hint) for name, hint in hints.items()}


def limits_of(hint: Any) -> tuple[Any, ...]:
    """The limits declared with a type, or with a member of a union."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(limit for member in get_args(hint) for limit in limits_of(member))
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def in_words(limits: tuple[Any, ...]) -> str:
    """`at least 1`, `above 0`, `at least 0 and at most 1`."""
    kinds = [(limit, *LIMITS[type(limit)]) for limit in limits]
    return " and ".join(f"{words} {getattr(limit, bound)}" for limit, bound, words, _ in kinds)


@cache
def _limits(kind: Any) -> dict[str, tuple[Any, ...]]:
    return {name: limits for name, hint in type_hints(kind).items() if (limits := limits_of(hint))}


def _holds(limit: Any, value: float) -> bool:
    bound, _, compare = LIMITS[type(limit)]
    return compare(value, getattr(limit, bound))


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return plain(value.to_dict()) if hasattr(value, "to_dict") else str(value)


def default_of(item: Field) -> Any:
    """The default of a field as JSON has it; None for one that must be given."""
    if item.default is not MISSING:
        return plain(item.default)
    return plain(item.default_factory()) if item.default_factory is not MISSING else None


def own_names(kind: type) -> set[str]:
    """The settings that rlkd, or a recipe, declares: those of transformers and TRL left out."""
    return {
        name for base in kind.__mro__ if base.__module__.split(".")[0] not in FOREIGN for name in get_annotations(base)
    }
