"""Compatibility with transformers, shared by language models: renamed arguments, defaults of generate."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def cache_name(decoder: Any) -> str:
    """The decoder's name for its cache of keys and values, in arguments and output.

    transformers 5.24 renamed `past_key_values`, and warns of the old name.
    """
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@contextmanager
def own_generation_config(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation defaults (BART's n-gram ban ...), which `generate` would merge into ours."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
