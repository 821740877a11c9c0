"""Which engines there are, and the choice among them."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from ...errors import ConfigError
from ...models.encoder_decoder import EncoderDecoder
from .protocol import Decoding, Engine
from .torch_engine import TorchEngine

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "ctranslate2"]


def make_engine(
    name: EngineName,
    lm: EncoderDecoder,
    decoding: Decoding | None,
    *,
    compute_type: str | None = None,
    batch_tokens: int = 4096,
    threads: int = 0,
    parallel: int = 1,
) -> Engine:
    """The engine of that name for a teacher; 'auto' takes the fastest that gives the same answers, and logs why.

    Args: decoding, None if the engine only scores given answers (ranking); compute_type, of CTranslate2: float32,
    bfloat16, float16 or int8 (an approximation: see `agreement`), by default the teacher's own; batch_tokens, padded
    tokens per forward (torch); threads per forward, 0 for one per core, and forwards in parallel (CTranslate2).
    Raises ConfigError if the engine is unknown, not installed, or cannot do what `decoding` or compute_type asks for.
    """
    if name not in get_args(EngineName):
        raise ConfigError(f"engine = '{name}': allowed are {', '.join(get_args(EngineName))}.")
    reason = "asked for."
    if name != "torch":
        from . import ctranslate2_engine as ct2

        precision = compute_type or str(lm.model.dtype).removeprefix("torch.")
        objection = ct2.objection(lm, decoding, precision)
        if objection is None and name == "auto":
            objection = ct2.reservation(decoding)
        if objection is None:
            logger.info("engine: ctranslate2 in %s", precision)
            return ct2.CTranslate2Engine(lm, precision, threads=threads, parallel=parallel)
        if name == "ctranslate2":
            raise ConfigError(f"engine = 'ctranslate2': {objection} Use --engine torch.")
        reason = f"with CTranslate2, {objection}"
    if compute_type is not None:
        raise ConfigError(
            f"compute_type = '{compute_type}' is a precision of CTranslate2, and engine = '{name}' means PyTorch here: "
            f"{reason} Leave it out (PyTorch computes in the teacher's dtype)."
        )
    logger.info("engine: torch: %s", reason)
    return TorchEngine(lm, batch_tokens)
