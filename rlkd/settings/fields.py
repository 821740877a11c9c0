"""Fields of settings dataclasses: which are rlkd's own, and their values in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field
from enum import Enum
from inspect import get_annotations
from typing import Any

FOREIGN = {"transformers", "trl"}


def plain(value: Any) -> Any:
    """The JSON value of a setting."""
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
    """The default of a field as a JSON value; None for a required field."""
    if item.default is not MISSING:
        return plain(item.default)
    return plain(item.default_factory()) if item.default_factory is not MISSING else None


def own_names(kind: type) -> set[str]:
    """The settings that rlkd or a recipe declares, without those of transformers and TRL."""
    return {
        name for base in kind.__mro__ if base.__module__.split(".")[0] not in FOREIGN for name in get_annotations(base)
    }
