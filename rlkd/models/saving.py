"""Saving students, whole or as adapters, so that other programs read them as they were trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError
from .adapters import record_base
from .spec import ModelSpec


def save_student(model: Any, folder: str | Path) -> None:
    """Write what `from_pretrained` loads: the model, or its adapter with the checksums of a local base model."""
    model.save_pretrained(folder)
    if hasattr(model, "peft_config"):
        (config,) = model.peft_config.values()
        model.generation_config.save_pretrained(folder)
        record_base(Path(folder), str(config.base_model_name_or_path))


def merge_adapter(name: str, out: str | Path, *, dtype: str = "float32", allow_bin: bool = False) -> None:
    """Write an adapter's base model with the adapter merged into it, and the tokenizer, to the new folder `out`.

    Raises ModelError if `name` is not an adapter that loads, ConfigError if `out` holds something.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name a new one.")
    spec = ModelSpec(name, "adapter", dtype=dtype, allow_bin=allow_bin)
    if spec.adapter is None:
        raise ModelError(f"adapter '{name}' is a whole model, not an adapter: there is nothing to merge.")
    spec.check()
    merged = spec.load()
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_student(merged, unfinished)
    spec.tokenizer.save_pretrained(unfinished)
    if out.exists():
        out.rmdir()
    os.rename(unfinished, out)
