"""A user's function, named in a setting as module:function."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, nearest

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def imported(name: str, setting: str) -> Callable[..., Any]:
    """The function `module:function`, from the Python path or the working directory. Raises ConfigError naming the
    setting if there is none.
    """
    module, _, attribute = name.partition(":")
    here, before = os.getcwd(), list(sys.path)
    try:
        sys.path.append(here)  # as `python -m` would have it
        found = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"{setting} = {name!r}: cannot import {module} ({type(error).__name__}: {error}). Looked in the Python "
            f"path and in {here}"
        ) from error
    finally:
        sys.path[:] = before
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ConfigError(
            f"{setting} = {name!r}: {module} has no function {attribute}.{nearest(attribute, dir(found))}"
        )
    return function
