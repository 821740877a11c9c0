"""The architectures of language models that rlkd knows, in one table; no other code distinguishes architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from . import decoder_only, encoder_decoder
from .chat import end_turns
from .generation import AnswerRules, read_rules
from .language_model import LanguageModel
from .not_applied import check_supported, ignored_settings, say_ignored
from .positions import Positions
from .vocabulary import check_ends, fitted_vocab


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
    positions           configuration -> how long prompts and answers may be
    rules               as `generation.read_rules`, which it is by default
    """

    wrap: Callable[[Any, int], LanguageModel]
    model_types: tuple[str, ...]
    is_encoder_decoder: bool
    auto_class: str
    lora_task_type: str
    noise: tuple[str, ...]
    check: Callable[[Any, str, str, torch.dtype], None]
    positions: Callable[[Any], Positions] = lambda config: Positions()
    rules: Callable[[Any, Any, str, str, int], AnswerRules] = read_rules

    def takes(self, config: Any) -> bool:
        """Whether models with this configuration have this architecture."""
        return config.model_type in self.model_types and _is_encoder_decoder(config) == self.is_encoder_decoder


LANGUAGE_MODELS: dict[str, Architecture] = {
    "encoder-decoder": Architecture(
        wrap=encoder_decoder.EncoderDecoder,
        model_types=encoder_decoder.FAMILIES,
        is_encoder_decoder=True,
        auto_class="AutoModelForSeq2SeqLM",
        lora_task_type="SEQ_2_SEQ_LM",
        noise=encoder_decoder.NOISE,
        check=encoder_decoder.check_precision,
        positions=encoder_decoder.positions,
    ),
    "decoder-only": Architecture(
        wrap=decoder_only.DecoderOnly,
        model_types=decoder_only.FAMILIES,
        is_encoder_decoder=False,
        auto_class="AutoModelForCausalLM",
        lora_task_type="CAUSAL_LM",
        noise=decoder_only.NOISE,
        check=decoder_only.check,
        positions=decoder_only.positions,
        rules=decoder_only.read_rules,
    ),
}


# What cannot be a language model here -> its types, of those that a checkpoint is likely to have.
REFUSED: dict[str, tuple[str, ...]] = {
    "an encoder, which writes no text": (
        "bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "modernbert", "xlm-roberta",
        "camembert", "big_bird",
    ),
    "a state-space or recurrent model, whose state is not that of single tokens": (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "rwkv", "xlstm", "recurrent_gemma", "jamba", "bamba", "zamba",
        "zamba2", "nemotron_h", "granitemoehybrid", "lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear",
    ),
    "a mixture of experts, whose routers rlkd does not train": (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe",
        "dbrx", "llama4", "llama4_text", "glm4_moe", "ernie4_5_moe",
    ),
    "a model with ALiBi instead of positions, which rlkd does not pass on": ("bloom", "mpt"),
    "a model of more than text: take one for text alone (gemma3_text)": (
        "gemma3", "gemma3n", "gemma4", "mllama", "llava", "qwen2_vl", "qwen2_5_vl", "phi4_multimodal", "idefics3",
    ),
}  # fmt: skip


def architecture_of(config: Any, role: str, name: str) -> Architecture:
    """The first architecture that takes models of this configuration. Raises ModelError if none does; `role` and `name`
    identify the model in the message.
    """
    for architecture in LANGUAGE_MODELS.values():
        if architecture.takes(config):
            return architecture
    kind, supported = config.model_type, [kind for known in LANGUAGE_MODELS.values() for kind in known.model_types]
    if kind in supported:
        half = "is_encoder_decoder: true" if _is_encoder_decoder(config) else "no encoder (is_encoder_decoder: false)"
        raise ModelError(f"{role} '{name}' is a '{kind}' model with {half} in config.json, which is not trained here.")
    reason = next((f", {what}" for what, kinds in REFUSED.items() if kind in kinds), "")
    raise ModelError(f"{role} '{name}' has model_type '{kind}'{reason}. Supported: {', '.join(supported)}.")


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def language_model(model: Any, tokenizer: Any) -> LanguageModel:
    """A transformers model (possibly PEFT-wrapped) as rlkd uses it, over the ids of its tokenizer. If this is set to
    its chat template, so is the model's generation_config: answers end with the token that ends a turn.

    Raises ModelError if no architecture takes the model, the tokenizer has ids that its embedding lacks, or its
    generation_config has settings that rlkd does not apply.
    """
    name = getattr(model.config, "name_or_path", None) or type(model).__name__
    architecture = architecture_of(model.config, "model", name)
    check_ends(tokenizer, "model", name)
    size = fitted_vocab(tokenizer, model.config, "model", name)
    check_supported(model.generation_config, "model", name)
    say_ignored(ignored_settings(model.generation_config, continues=not architecture.is_encoder_decoder), "model", name)
    end_turns(model.generation_config, model.config, tokenizer)
    return architecture.wrap(model, size)
