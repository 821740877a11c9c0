"""Models from folders and the hub: what cannot take its role is refused from its configuration, before weights load."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice
from ..errors import ModelError
from ..tensors import where_not_finite
from .architectures import architecture_of
from .spec import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_config(config: Any, role: str, name: str, dtype: torch.dtype) -> None:
    """Refuse a model that cannot take `role`, from its configuration alone. Raises ModelError."""
    architecture_of(config, role, name).check(config, role, name, dtype)


def resolve_dtype(dtype: str, field: str) -> torch.dtype:
    """'float32' | 'bfloat16' | 'float16' -> torch.dtype. Raises ModelError naming the field."""
    if dtype not in DTYPES:
        raise ModelError(f"{field} = '{dtype}': allowed are {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load_config(name: str, role: str, revision: str | None = None) -> Any:
    """The model's configuration, before any weights. Raises ModelError if it cannot be found."""
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"{role} '{name}' is a folder without config.json. Point it at a saved transformers model.")
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{role} '{name}' is neither a local folder nor a model that could be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def load_model(
    name: str,
    role: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    attention: str | None = None,
    quantization: Any = None,
) -> Any:
    """Load a language model of a known architecture with every dropout at 0 and its untied head protected.

    Dropout is off because the log-probability a token was sampled with must be the one the loss recomputes
    (T5's attention dropout survives the usual helpers). Raises ModelError: before any weights load if the model cannot
    take its role, after that if the checkpoint lacks weights.
    """
    import transformers

    torch_dtype = resolve_dtype(dtype, f"{role}_dtype")
    config = load_config(name, role, revision)
    architecture = architecture_of(config, role, name)
    architecture.check(config, role, name, torch_dtype)
    for key in architecture.noise:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    extra = {"quantization_config": quantization} if quantization is not None else {}
    model, loading = getattr(transformers, architecture.auto_class).from_pretrained(
        name,
        config=config,
        dtype=torch_dtype,
        revision=revision,
        attn_implementation=attention,
        output_loading_info=True,
        **extra,
    )
    # Weights tied to one that was loaded are not counted as missing.
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{role} '{name}' lacks {len(missing)} weights of its architecture, which would stay random: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
            f"Point it at a complete {config.model_type} checkpoint, head included."
        )
    protect_untied_head(model)
    check_finite(model, role, name)
    return model


def check_finite(model: Any, role: str, name: str) -> None:
    """Raise ModelError naming the first weight that is NaN or infinite, whether or not it is ever used."""
    if found := where_not_finite(chain(model.named_parameters(), model.named_buffers())):
        raise ModelError(
            f"{role} '{name}' has weights that are not finite: {found}. The checkpoint is damaged, or its training "
            "diverged: use another one."
        )


def quantization_config(name: Quantization) -> Any:
    """bitsandbytes' settings for a frozen model's linear layers, head excepted; None for 'none'.

    Raises ConfigError for another name.
    """
    from transformers import BitsAndBytesConfig

    check_choice("quantization", name, Quantization)
    if name == "none":
        return None
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def protect_untied_head(model: Any) -> None:
    """Keep a later tie_weights() from overwriting an untied lm_head (T0, Flan-T5, v1.1).

    T5Config forces tie_word_embeddings=True, and the model class lists lm_head.weight as tied to shared.weight.
    When they are separate tensors after loading, the entry is dropped from this instance.
    """
    keys = getattr(model, "_tied_weights_keys", None)
    if not isinstance(keys, dict) or "lm_head.weight" not in keys:
        return
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        model._tied_weights_keys = {k: v for k, v in keys.items() if k != "lm_head.weight"}
        if isinstance(getattr(model, "all_tied_weights_keys", None), dict):
            model.all_tied_weights_keys.pop("lm_head.weight", None)
