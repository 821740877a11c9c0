"""Models as CTranslate2 describes them, weights included, and which of them it can describe."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from ..records import given
from .encoder_decoder import T5_FAMILY
from .generation import FORBIDDEN, NO_RULES, rules_of
from .language_model import LanguageModel
from .spec import ModelSource

# Model type -> the class of CTranslate2's converter.
TRANSLATORS = {
    "t5": "T5Loader",
    "mt5": "MT5Loader",
    "umt5": "UMT5Loader",
    "bart": "BartLoader",
    "mbart": "MBartLoader",
    "pegasus": "PegasusLoader",
}
GENERATORS = {
    "llama": "LlamaLoader",
    "mistral": "MistralLoader",
    "qwen2": "Qwen2Loader",
    "qwen3": "Qwen3Loader",
    "gemma": "GemmaLoader",
    "gpt2": "GPT2Loader",
    "gptj": "GPTJLoader",
    "gpt_bigcode": "GPTBigCodeMHALoader",
    "codegen": "CodeGenLoader",
    "opt": "OPTLoader",
}
# Where BART's family normalises: the converter reads it; transformers 5 has dropped it from their configurations.
NORMS = {
    "bart": {"normalize_before": False, "normalize_embedding": True},
    "mbart": {"normalize_before": True, "normalize_embedding": True},
    "pegasus": {"normalize_before": True, "normalize_embedding": False},
}
ROPE = ("default", "linear", "llama3")
INSTALL = "pip install 'rlkd[ctranslate2]'"
# Names of the number that normalisation adds to a variance.
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def objection(
    model: ModelSource, compute_type: str, device: torch.device, loaders: Mapping[str, str], role: str = "teacher"
) -> str | None:
    """Why CTranslate2 cannot compute with this model, or keep to what its checkpoint says of answers, as a sentence;
    None if it can. Loads no weights. loaders: the model types that are wanted.
    """
    kind = model.config.model_type
    if find_spec("ctranslate2") is None:
        return f"ctranslate2 is not installed ({INSTALL})."
    if model.adapted:
        return f"the {role} has PEFT adapters; merge_and_unload() them first."
    if model.quantized:
        return f"the {role}'s weights are already quantized (bitsandbytes)."
    if kind not in loaders:
        return f"it does not convert '{kind}' models, only {', '.join(loaders)}."
    supported = _supported(device.type)
    if not supported:
        return f"it cannot use this {device.type}."
    if compute_type not in supported:
        return f"it does not compute in {compute_type} on this {device.type}, only {', '.join(supported)}."
    if compute_type == "float16" and kind in T5_FAMILY:
        return "float16 overflows to inf in T5 models, and greedy decoding does not notice: use bfloat16 or float32."
    if reason := _unlike(model.config):
        return f"it does not compute {reason}, which the {role} has."
    if moving := getattr(model, "rules", NO_RULES).moving:
        what = ", ".join(moving)
        return f"it does not compute log-probabilities under {what} (the {role}'s generation_config)."
    return None


def _unlike(config: Any) -> str | None:
    """What a decoder-only model of a known type has and the converter gets wrong."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "attention in a sliding window"
    if config.model_type == "mistral" and config.sliding_window is not None:
        return "attention in a sliding window (sliding_window)"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if rope in ROPE else f"positions of rope_type '{rope}'"


def specification(lm: LanguageModel, names: list[str]) -> Any:
    """CTranslate2's description of the model, whose tokens are called `names`, of ids 0 .. valid_vocab - 1. The
    converters of some decoder-only models take the PyTorch model apart: use it no more.
    """
    from ctranslate2.converters import transformers as converters
    from ctranslate2.specs.model_spec import OPTIONAL, visit_spec

    model, config, head = lm.model, lm.model.config, lm.head()
    for name, value in NORMS.get(config.model_type, {}).items():
        if not hasattr(config, name):
            setattr(config, name, value)
    with torch.no_grad():
        loader = {**TRANSLATORS, **GENERATORS}[config.model_type]
        spec = getattr(converters, loader)().get_model_spec(model)
        # The converter relies on tie_word_embeddings, which transformers 5 sets to True for every T5, untied or not.
        spec.decoder.scale_outputs = OPTIONAL if head.scale == 1.0 else head.scale
        # Rows beyond the tokenizer are not tokens: they may neither be chosen nor enter the normalizer.
        valid = lm.valid_vocab
        encoder = getattr(spec, "encoder", None)
        for part in (*(encoder.embeddings if encoder else ()), spec.decoder.embeddings, spec.decoder.projection):
            part.weight = part.weight[:valid]
        bias = torch.zeros(valid) if head.bias is None else head.bias[:valid].detach().clone()
        bias[list(head.rules.banned)] = FORBIDDEN
        if head.bias is not None or head.rules.banned:
            spec.decoder.projection.bias = bias

        def own(part: Any, name: str, value: Any) -> None:
            # Quantization works in place and would overwrite the model.
            if isinstance(value, torch.Tensor):
                setattr(part, name.rsplit("/", 1)[-1], value.detach().to("cpu", copy=True))

        visit_spec(spec, own)
    spec.config.layer_norm_epsilon = next((getattr(config, name) for name in EPSILONS if hasattr(config, name)), None)
    if encoder:
        spec.register_source_vocabulary(names)
        spec.register_target_vocabulary(names)
        spec.config.decoder_start_token = names[given(rules_of(lm).start_id)]
    else:
        spec.register_vocabulary(names)
    return spec


def _supported(device: str) -> list[str]:
    import ctranslate2

    if device not in ("cpu", "cuda"):
        return []
    try:
        return sorted(ctranslate2.get_supported_compute_types(device))
    except (RuntimeError, ValueError):
        # No driver, or not the CUDA libraries that this build needs.
        return []
