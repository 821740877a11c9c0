"""Settings of a checkpoint's generation_config that rlkd does not apply: refused, or ignored and said."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import ModelError, cut

logger = logging.getLogger(__name__)

# Settings that change the distribution in ways rlkd does not compute, and their values without effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_decoder_ids": ([],),
    "guidance_scale": (1.0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
# Devices of a search against repeating the prompt. As temperature and top_p they are not of the distribution that is
# distilled: labels, rollouts, scores and losses all do without, so that they agree.
OF_SEARCH: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "repetition_penalty": (1.0,),
}
# In a decoder-only model this one counts the prompt as well.
OF_WHOLE_TEXTS: dict[str, tuple[Any, ...]] = {"no_repeat_ngram_size": (0,)}
_SAID: set[tuple[str, str]] = set()


def check_supported(generation: Any, role: str, name: str) -> None:
    """Raises ModelError for a transformers.GenerationConfig with settings that can be neither applied nor ignored."""
    for key, value in _set(generation, UNSUPPORTED):
        raise ModelError(
            f"{role} '{name}': its generation_config sets {key} = {cut(repr(value), 60)}, which rlkd does not apply. "
            "Remove it from generation_config.json if answers should do without."
        )


def ignored_settings(generation: Any, *, continues: bool) -> tuple[tuple[str, Any], ...]:
    """(name, value) of the settings that are ignored; continues: of a model whose answers continue their prompts."""
    return _set(generation, {**OF_SEARCH, **(OF_WHOLE_TEXTS if continues else {})})


def say_ignored(ignored: tuple[tuple[str, Any], ...], role: str, name: str) -> None:
    """Log what `ignored_settings` found, once for each model."""
    settings = ", ".join(f"{key} = {value}" for key, value in ignored)
    if not ignored or (name, settings) in _SAID:
        return
    _SAID.add((name, settings))
    logger.warning(
        "%s '%s': its generation_config sets %s, which is ignored: labels, rollouts, scores and evaluations are of the "
        "model's own distribution", role, name, settings,
    )  # fmt: skip


def _set(generation: Any, neutral: dict[str, tuple[Any, ...]]) -> tuple[tuple[str, Any], ...]:
    """(name, value) of those settings that have another value than the neutral ones."""
    values = [(key, getattr(generation, key, None)) for key in sorted(neutral)]
    return tuple((key, value) for key, value in values if value is not None and value not in neutral[key])
