"""What decides the last bits of results besides settings: versions, the code of rlkd, variables and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
# They change the arithmetic of libraries, and nothing else shows that they are set.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_CUDNN_V8_API_DISABLED",
    "XLA_DOWNCAST_BF16",
    "XLA_USE_BF16",
)


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


def variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def describe_machine(device: str) -> dict[str, str]:
    """The GPU, or the processor's instructions and the threads; `device` as torch names it."""
    import torch

    if torch.device(device).type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)}
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}


def changed_versions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`torch 2.10 -> 2.11` for each name that both have and that differs; null is a package that was not there."""
    return [f"{name} {then[name]} -> {now[name]}" for name in then if name in now and then[name] != now[name]]
