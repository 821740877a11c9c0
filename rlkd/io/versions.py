"""Versions of the packages that decide results, the code of rlkd included, and what differs between two runs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def versions_of(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Versions of python and of `packages`; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code_digest() -> str:
    """SHA-256 (its first 16 digits) of rlkd's modules: it tells apart what one version number stands for."""
    digest = sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:16]


def changed_versions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`torch 2.10 -> 2.11` for each name that both have and that differs; null is a package that was not there."""
    return [f"{name} {then[name]} -> {now[name]}" for name in then if name in now and then[name] != now[name]]
