"""PEFT adapter folders as models: the base model they name, with the adapter merged into it.

What `save_pretrained` writes for a student trained with `use_peft` holds the adapter alone. `BASE_RECORD` beside it
holds the checksums of a local base model, so that a base that has changed since is noticed.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..io.files import write_durably
from .folders import (
    ADAPTER_CONFIG,
    AGAIN,
    GENERATION,
    SAFETENSORS,
    check_json,
    check_place,
    check_weights,
    read_json,
    weights_files,
)

BASE_RECORD = "base_model.json"
# Adapters whose effect is not in the weights: rlkd calls encoder, decoder and head directly, and would lose it.
PROMPT_LEARNING = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"}

# Settings of LoRA that make another adapter, not only another training of it.
LORA_SETTINGS = ("r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora")


@dataclass(frozen=True)
class Adapter:
    """An adapter: its name (folder or hub id) and revision, the role it has in errors, and the base model's."""

    name: str
    role: str
    revision: str | None
    base: str
    base_revision: str | None

    @property
    def base_role(self) -> str:
        return f"{self.role} '{self.name}': its base model"


def adapter_of(name: str, role: str, revision: str | None = None) -> Adapter | None:
    """The adapter that `name` is, None for a whole model. Raises ModelError for an adapter that cannot be used."""
    folder = check_place(name, role)
    if folder is None:
        config = _hub_adapter(name, revision)
    elif (folder / ADAPTER_CONFIG).exists():
        config = read_json(folder, ADAPTER_CONFIG, role, name)
        _check_unambiguous(folder, role, name)
    else:
        return None
    if config is None:
        return None
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if kind in PROMPT_LEARNING or config.get("megatron_config"):
        raise ModelError(
            f"{role} '{name}' is an adapter of the kind {kind}, which is not merged into weights. "
            "rlkd reads adapters that are: LoRA and its relatives."
        )
    if not isinstance(base, str) or not base:
        raise ModelError(f"{role} '{name}': {ADAPTER_CONFIG} does not name a base model (base_model_name_or_path).")
    if folder is not None and Path(base).resolve() == folder.resolve():
        raise ModelError(f"{role} '{name}': {ADAPTER_CONFIG} names the adapter itself as its base model.")
    adapter = Adapter(name, role, revision, base, config.get("revision"))
    _check_base(adapter, folder)
    return adapter


def check_adapter(adapter: Adapter, *, allow_bin: bool = False) -> None:
    """Raise ModelError if the adapter's own weights are missing or damaged; a hub's are left to its client."""
    folder = check_place(adapter.name, adapter.role)
    if folder is not None:
        check_json(folder, (GENERATION,), adapter.role, adapter.name)
        check_weights(folder, adapter.role, adapter.name, allow_bin=allow_bin, adapter=True)


def attach(adapter: Adapter, base: Any, *, trainable: bool = False) -> Any:
    """The base model with the adapter as a PEFT model. Raises ModelError unless each weight of the one finds its place
    in the other: PEFT would leave the rest at random, or out.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing weights, which are an error below
        model = PeftModel.from_pretrained(base, adapter.name, revision=adapter.revision, is_trainable=trainable)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(weight.shape) for name, weight in own.items()}
    held = load_peft_weights(adapter.name, device="cpu", revision=adapter.revision)
    # An adapter may bring whole weights of the base along: embeddings.
    whole = model.state_dict().keys()
    found = {name: tuple(weight.shape) for name, weight in held.items() if name in wanted or name not in whole}
    if different := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ModelError(
            f"{adapter.role} '{adapter.name}' does not fit its base model '{adapter.base}': {len(different)} weights "
            f"of the adapter differ, first {different[0]}. {AGAIN}"
        )
    return model


def merge(adapter: Adapter, model: Any) -> Any:
    """The base model with the adapter in its weights. Raises ModelError for an adapter of weights that several parts of
    the model share: each part has its own adapter, and merged they would add up.
    """
    if shared := _adapted_and_shared(model):
        raise ModelError(
            f"{adapter.role} '{adapter.name}' adapts {shared}, whose weights the model shares with another part, and "
            "cannot be merged. Train an adapter without the embeddings and the tied head (lora_target_modules)."
        )
    with warnings.catch_warnings():
        # PEFT takes an untied head, which it corrects in the configuration, for a surprise.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload(safe_merge=True)
    merged.name_or_path = merged.config.name_or_path = adapter.name
    return merged


def check_same_settings(adapter: Adapter, wanted: Any) -> None:
    """Raise ConfigError unless the settings `wanted` (a PeftConfig) are those of the adapter that is trained further;
    modules that are not named are the adapter's.
    """
    from peft import PeftConfig

    own = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
    different = [
        f"{setting} {_plain(ours)} (the adapter has {_plain(theirs)})"
        for setting, theirs in ((name, getattr(own, name, None)) for name in LORA_SETTINGS)
        if (ours := getattr(wanted, setting, None)) is not None and _plain(ours) != _plain(theirs)
    ]
    if different:
        raise ConfigError(
            f"{adapter.role} '{adapter.name}' is an adapter, and use_peft trains it further, but the settings differ: "
            f"{', '.join(different)}. Give the adapter's own, leave use_peft out (the merged model is trained), or "
            "merge it first (rlkd merge-adapter) to train a new adapter."
        )


def add_adapter(model: Any, config: Any) -> Any:
    """The model with a new adapter. A base from the hub is recorded with its commit. Raises ConfigError if PEFT cannot
    make it.
    """
    from peft import get_peft_model

    config.revision = getattr(model.config, "_commit_hash", None)
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"use_peft: PEFT cannot adapt this student: {' '.join(str(error).split())[:200]}") from error
    if shared := _adapted_and_shared(adapted):
        raise ConfigError(
            f"use_peft: {shared} would be adapted, whose weights the model shares with another part, so that "
            "the adapter could never be merged. Leave the embeddings and the tied head out of lora_target_modules."
        )
    return adapted


def base_of(model: Any) -> Any:
    """The base of a PEFT model, without its adapters, as a model of its own. Its weights are the same tensors, of which
    there is no second copy; training the adapters does not change them.
    """
    from peft.utils.other import ModulesToSaveWrapper

    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    made = copy.deepcopy(model, shared)
    for module in list(made.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, ModulesToSaveWrapper):  # `unload` would keep what is trained
                setattr(module, name, part.original_module)
    return made.unload()


def without_dropout(model: Any) -> Any:
    """The PEFT model with its dropout at 0, in its saved configuration too."""
    for config in model.peft_config.values():
        config.lora_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def record_base(folder: Path, base: str) -> None:
    """Write the checksums of a local base model's weights beside an adapter."""
    if Path(base).is_dir():
        record = {"base_model": base, "sha256": weights_files(Path(base))}
        write_durably(folder / BASE_RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _adapted_and_shared(model: Any) -> str | None:
    """The name of an adapted part whose weights another part of the PEFT model has too, None if there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def place(weight: Any) -> int:
        return weight.data_ptr() or id(weight)  # 0 without memory

    places = Counter(place(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        adapted: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if hasattr(adapted, "weight") and places[place(adapted.weight)] > 1:
            return name
    return None


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def _check_unambiguous(folder: Path, role: str, name: str) -> None:
    if (folder / SAFETENSORS).exists():
        raise ModelError(
            f"{role} '{name}' holds a whole model ({SAFETENSORS}) and an adapter ({ADAPTER_CONFIG}): which one is "
            "meant is not known. Move one of them to another folder."
        )


def _check_base(adapter: Adapter, folder: Path | None) -> None:
    """Raise ModelError if the base model is gone, or changed since the adapter was saved."""
    try:
        base = check_place(adapter.base, adapter.base_role)
    except ModelError as error:
        raise ModelError(
            f"{adapter.role} '{adapter.name}' is an adapter of '{adapter.base}', and there is no such folder. Restore "
            f"it, or write its new place into base_model_name_or_path of {ADAPTER_CONFIG}."
        ) from error
    if base is None or folder is None or not (folder / BASE_RECORD).exists():
        return
    recorded = read_json(folder, BASE_RECORD, adapter.role, adapter.name).get("sha256")
    if recorded != weights_files(base):
        raise ModelError(
            f"{adapter.role} '{adapter.name}': the weights of its base model '{adapter.base}' have changed since the "
            f"adapter was saved, so the two do not belong together. Restore the base model; if the change is meant, "
            f"delete {BASE_RECORD} from the adapter."
        )


@lru_cache(maxsize=64)
def _hub_adapter(name: str, revision: str | None) -> dict[str, Any] | None:
    from transformers.utils import find_adapter_config_file

    try:
        path = find_adapter_config_file(name, revision=revision)
        return None if path is None else json.loads(Path(path).read_bytes())
    except Exception:  # no such model, or no hub: what reads the configuration says so
        return None
