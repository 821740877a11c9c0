"""The architectures of language models that rlkd knows, in one table; no other code distinguishes architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from .encoder_decoder import BART_FAMILY, M2M_FAMILY, NOISE, T5_FAMILY, EncoderDecoder, check_precision, positions
from .generation import check_supported
from .language_model import LanguageModel
from .vocabulary import check_vocabulary_fits, valid_vocab


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    wrap                (transformers model, number of valid ids) -> LanguageModel
    model_types         of the configurations it takes
    is_encoder_decoder  in the same configurations
    auto_class          transformers' class that loads such a model
    lora_task_type      what PEFT calls it
    noise               configuration fields that `load_model` sets to 0: those that make a forward random
    check               (configuration, role, name, dtype): raises ModelError if the model cannot be used that way
    positions           configuration -> longest prompt and longest answer in tokens, None where there is no limit
    """

    wrap: Callable[[Any, int], LanguageModel]
    model_types: tuple[str, ...]
    is_encoder_decoder: bool
    auto_class: str
    lora_task_type: str
    noise: tuple[str, ...]
    check: Callable[[Any, str, str, torch.dtype], None]
    positions: Callable[[Any], tuple[int | None, int | None]] = lambda config: (None, None)

    def takes(self, config: Any) -> bool:
        """Whether models with this configuration have this architecture."""
        return config.model_type in self.model_types and _is_encoder_decoder(config) == self.is_encoder_decoder


LANGUAGE_MODELS: dict[str, Architecture] = {
    "encoder-decoder": Architecture(
        wrap=EncoderDecoder,
        model_types=T5_FAMILY + BART_FAMILY + M2M_FAMILY,
        is_encoder_decoder=True,
        auto_class="AutoModelForSeq2SeqLM",
        lora_task_type="SEQ_2_SEQ_LM",
        noise=NOISE,
        check=check_precision,
        positions=positions,
    ),
}


def architecture_of(config: Any, role: str, name: str) -> Architecture:
    """The first architecture that takes models of this configuration. Raises ModelError if none does; `role` and `name`
    identify the model in the message.
    """
    for architecture in LANGUAGE_MODELS.values():
        if architecture.takes(config):
            return architecture
    if not _is_encoder_decoder(config):
        raise ModelError(
            f"{role} '{name}' is a '{config.model_type}' model without an encoder-decoder. rlkd trains encoder-decoder "
            "models for now (T5, T0, Flan-T5, mT5, BART, Pegasus, Marian); decoder-only models are planned."
        )
    supported = [kind for architecture in LANGUAGE_MODELS.values() for kind in architecture.model_types]
    raise ModelError(f"{role} '{name}' has model_type '{config.model_type}'. Supported: {', '.join(supported)}.")


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def language_model(model: Any, tokenizer: Any) -> LanguageModel:
    """A transformers model (possibly PEFT-wrapped) as rlkd uses it, over the ids of its tokenizer.

    Raises ModelError if no architecture takes the model, the tokenizer has ids that its embedding lacks, or its
    generation_config has settings that rlkd does not apply.
    """
    name = getattr(model.config, "name_or_path", None) or type(model).__name__
    architecture = architecture_of(model.config, "model", name)
    size = valid_vocab(tokenizer)
    check_vocabulary_fits(model.config, size, "model", name)
    check_supported(model.generation_config, "model", name)
    return architecture.wrap(model, size)
