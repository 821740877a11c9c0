"""Models from folders and the hub: what cannot take its role is refused from its configuration, before weights load.

The only module that calls transformers' `from_pretrained` for models and configurations: no code of a model ever runs
(trust_remote_code), and pickled weights load on request only. Adapter folders load as their base with the adapter.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import check_choice
from ..errors import ModelError
from ..tensors import where_not_finite
from .adapters import Adapter, adapter_of, attach, check_adapter, merge
from .architectures import Architecture, architecture_of
from .folders import AGAIN, CONFIG, GENERATION, check_json, check_place, check_weights, explained, saved_shapes
from .generation import load_generation_config
from .spec import Quantization

Needs = Literal["all", "layers", "first layers"]
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
    """The model's configuration, before any weights; an adapter has its base's. Raises ModelError if it cannot be
    found or read.
    """
    from transformers import AutoConfig

    folder = check_place(name, role)
    if adapter := adapter_of(name, role, revision):
        config = load_config(adapter.base, adapter.base_role, adapter.base_revision)
        config.name_or_path = name
        return config
    if folder is not None:
        if not (folder / CONFIG).exists():
            raise ModelError(
                f"{role} '{name}' is a folder without config.json. Point it at a saved transformers model."
            )
        check_json(folder, (CONFIG, GENERATION), role, name)
    with explained(role, name, CONFIG):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not all(isinstance(kind, str) for kind in config.architectures or ()):
        raise ModelError(f"{role} '{name}': {CONFIG} has architectures that are no names of classes. {AGAIN}")
    return config


def check_saved_weights(name: str, role: str, revision: str | None = None, *, allow_bin: bool = False) -> None:
    """Raise ModelError if the weights of a local model, or of an adapter and its base, are missing, damaged or pickled.
    No tensor is loaded.
    """
    if adapter := adapter_of(name, role, revision):
        check_adapter(adapter, allow_bin=allow_bin)
        check_saved_weights(adapter.base, adapter.base_role, adapter.base_revision, allow_bin=allow_bin)
    elif folder := check_place(name, role):
        check_weights(folder, role, name, allow_bin=allow_bin)


def load_model(
    name: str,
    role: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    attention: str | None = None,
    quantization: Any = None,
    allow_bin: bool = False,
    keep_adapter: bool = False,
) -> Any:
    """Load a language model of a known architecture with every dropout at 0 and its untied head protected.

    Dropout is off because the log-probability a token was sampled with must be the one the loss recomputes
    (T5's attention dropout survives the usual helpers). keep_adapter: an adapter is not merged, and can be trained.
    Raises ModelError: before any weights load if the model cannot take its role, after that if the checkpoint lacks
    weights.
    """
    import transformers

    torch_dtype = resolve_dtype(dtype, f"{role}_dtype")
    config, architecture = _without_noise(name, role, revision, torch_dtype)
    extra = {"quantization_config": quantization} if quantization is not None else {}
    return load_pretrained(
        getattr(transformers, architecture.auto_class),
        name,
        role,
        config=config,
        revision=revision,
        allow_bin=allow_bin,
        keep_adapter=keep_adapter,
        dtype=torch_dtype,
        attn_implementation=attention,
        **extra,
    )


def random_model(
    name: str, role: str, *, dtype: str = "float32", revision: str | None = None, attention: str | None = None
) -> Any:
    """A model with the configuration of a folder or hub id, as `load_model` would load it, and random weights. Raises
    ModelError if it cannot take its role.
    """
    import transformers

    torch_dtype = resolve_dtype(dtype, f"{role}_dtype")
    config, architecture = _without_noise(name, role, revision, torch_dtype)
    kind = getattr(transformers, architecture.auto_class)
    model = kind.from_config(config, dtype=torch_dtype, attn_implementation=attention, trust_remote_code=False)
    model.generation_config = load_generation_config(name, role, revision)
    return model.eval()


def _without_noise(name: str, role: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Architecture]:
    """The configuration with every dropout at 0, and its architecture. Raises ModelError as `check_config`."""
    from transformers import PreTrainedConfig

    config = load_config(name, role, revision)
    architecture = architecture_of(config, role, name)
    architecture.check(config, role, name, dtype)
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for key in architecture.noise:
            if hasattr(part, key):
                setattr(part, key, 0.0)
    return config, architecture


def load_pretrained(
    kind: Any,
    name: str,
    role: str,
    *,
    config: Any,
    revision: str | None = None,
    allow_bin: bool = False,
    keep_adapter: bool = False,
    needs: Needs = "all",
    **options: Any,
) -> Any:
    """`kind.from_pretrained` (a model class, or an Auto class) with every weight in its place.

    Args: needs, what must be there: all; layers: the head beyond them may be missing or of another shape, and starts at
    random; first layers: the checkpoint may have more of them than `config` as well; options, as in transformers.
    Raises ModelError if files are damaged, weights are missing, do not fit the configuration or are not finite.
    """
    if adapter := adapter_of(name, role, revision):
        return _load_adapter(kind, adapter, config, keep_adapter, {**options, "allow_bin": allow_bin})
    check_saved_weights(name, role, revision, allow_bin=allow_bin)
    asked = {
        "config": config,
        "revision": revision,
        "trust_remote_code": False,
        "use_safetensors": None if allow_bin else True,
        "weights_only": True,
        "ignore_mismatched_sizes": True,  # they are reported below
        "output_loading_info": True,
    }
    # Else transformers asks a public service to convert a hub model that has pickles only.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    with explained(role, name, "the model"), _quiet():
        try:
            model, loading = kind.from_pretrained(name, **asked, **options)
        except Exception:
            _check_complete(*_compared(kind, name, config), role, name, needs)
            raise
    _check_complete(model, loading, role, name, needs)
    if needs != "first layers":
        _check_depth(model, loading["unexpected_keys"], role, name)
    check_finite(model, role, name)
    protect_untied_head(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = load_generation_config(name, role, revision)
    return model


def _load_adapter(kind: Any, adapter: Adapter, config: Any, keep: bool, options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    check_adapter(adapter, allow_bin=options["allow_bin"])
    options["revision"] = adapter.base_revision
    base = load_pretrained(kind, adapter.base, adapter.base_role, config=config, **options)
    with explained(adapter.role, adapter.name, f"the adapter of '{adapter.base}'"):
        model = attach(adapter, base, trainable=keep)
        if hasattr(base, "generation_config") and (Path(adapter.name) / GENERATION).exists():
            base.generation_config = GenerationConfig.from_pretrained(adapter.name)
    check_finite(model, adapter.role, adapter.name)
    if keep or getattr(base, "is_quantized", False):
        return model
    return merge(adapter, model)


def _check_complete(model: Any, loading: dict[str, Any], role: str, name: str, needs: Needs) -> None:
    def needed(keys: Any) -> list[Any]:
        named = [key if isinstance(key, tuple) else (key,) for key in keys]
        return sorted(key for key in named if needs == "all" or not _in_head(model, key[0]))

    kind = model.config.model_type
    if wrong := needed(loading["mismatched_keys"]):
        key, held, expected = wrong[0]
        raise ModelError(
            f"{role} '{name}': {len(wrong)} weights have other shapes than {CONFIG} says, first {key}: "
            f"{list(held)} in the file, {list(expected)} expected. Restore the config.json of these weights."
        )
    # Weights tied to one that was loaded are not counted as missing.
    if missing := [key for (key,) in needed(loading["missing_keys"])]:
        raise ModelError(
            f"{role} '{name}' lacks {len(missing)} weights of its architecture, which would stay random: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
            f"Point it at a complete {kind} checkpoint, head included."
        )


def _compared(kind: Any, name: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """What a model that transformers failed to load would be, without memory, and the weights whose shapes differ."""
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    saved, wanted = saved_shapes(Path(name)), model.state_dict()
    wrong = [
        (key, saved[key], wanted[key].shape)
        for key in wanted.keys() & saved.keys()
        if saved[key] != [*wanted[key].shape]
    ]
    return model, {"mismatched_keys": wrong, "missing_keys": []}


def _in_head(model: Any, key: str) -> bool:
    """Whether a weight only reads what the layers give: a classifier's head or a pooler."""
    prefix = model.base_model_prefix
    inside = key.startswith(f"{prefix}.") if hasattr(model, prefix) else not key.startswith("classifier")
    return not inside or "pooler" in key


def _check_depth(model: Any, unexpected: Any, role: str, name: str) -> None:
    """Raise ModelError if weights are left over that belong to layers beyond those of the configuration."""
    sizes = {name: len(module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}

    def beyond(key: str) -> bool:
        lists = [(key[: found.start()], int(found[1])) for found in re.finditer(r"\.(\d+)\.", key)]
        # A checkpoint may have the prefix that the model lacks, or the other way round.
        return any(
            number >= size and (f".{name}".endswith(f".{known}") or f".{known}".endswith(f".{name}"))
            for name, number in lists
            for known, size in sizes.items()
        )

    if layers := sorted(filter(beyond, unexpected)):
        raise ModelError(
            f"{role} '{name}': {CONFIG} has fewer layers than the weights, {len(layers)} of which would be left out, "
            f"first {layers[0]}. Restore the config.json of these weights."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing and misfitting weights, which are checked here."""
    log = logging.getLogger("transformers.modeling_utils")
    before, log.disabled = log.disabled, True  # a level of its own makes transformers say more
    try:
        yield
    finally:
        log.disabled = before


def check_finite(model: Any, role: str, name: str) -> None:
    """Raise ModelError naming the first weight that is NaN or infinite, whether or not it is ever used."""
    if found := where_not_finite(chain(model.named_parameters(), model.named_buffers())):
        key, where = found
        raise ModelError(f"{role} '{name}': {key} holds values that are not finite (NaN or infinite): {where}. {AGAIN}")


def quantization_config(name: Quantization) -> Any:
    """bitsandbytes' settings for a frozen model's linear layers, head excepted; None for 'none'.

    Raises ConfigError for another name.
    """
    from transformers import BitsAndBytesConfig

    check_choice("quantization", name, Quantization)
    if name == "none":
        return None
    # At every layer of every forward it says that int8 casts its inputs; how far that moves answers is measured.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
