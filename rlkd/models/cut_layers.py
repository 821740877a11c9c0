"""A student cut from its teacher: some of its layers, evenly spread, with everything around them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from .loading import protect_untied_head
from .saving import new_folder, save_student
from .spec import ModelSpec

# Fields of configurations that are a number of layers.
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")
SHARE = 3  # one layer of so many is kept, rounded up


def kept_layers(layers: int) -> list[int]:
    """The layers (from 0) that are kept of so many: a third of them, the first and the last among them if two or more
    are (as DistilBART keeps them, Shleifer and Rush 2020, arXiv 2010.13002).
    """
    count = -(-layers // SHARE)
    return [round(k * (layers - 1) / (count - 1)) for k in range(count)] if count > 1 else [0]


def cut_config(config: Any) -> Any:
    """The configuration of the cut model: its numbers of layers, and lists with a value for each layer.

    Raises ModelError if the family describes its layers in another way.
    """
    cut = copy.deepcopy(config)
    for part in (cut, *(getattr(cut, name) for name in cut.sub_configs)):
        depths = {name: value for name in DEPTHS if isinstance(value := vars(part).get(name), int)}
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and "layer" in name and len(value) in depths.values():
                setattr(part, name, [value[k] for k in kept_layers(len(value))])
        for name, value in depths.items():
            setattr(part, name, len(kept_layers(value)))
    try:
        type(cut).from_dict(cut.to_dict())  # as the saved model is read
    except Exception as error:  # whatever a family's own checks raise
        raise _uncut(config) from error
    return cut


def cut_layers(model: Any) -> Any:
    """A model of the same family with the layers `kept_layers` of every stack; all weights are the model's.

    Raises ModelError if its layers are not alike, or not found.
    """
    small = type(model)(cut_config(model.config)).to(model.dtype)
    if (head := model.get_output_embeddings()) is not None and head.weight is not model.get_input_embeddings().weight:
        own = small.get_output_embeddings()
        own.weight = nn.Parameter(own.weight.detach().clone())
        protect_untied_head(small)
    places = {
        f"{name}.": {old: new for new, old in enumerate(kept_layers(len(stack)))}
        for name, stack in _stacks(model)
        if len(stack) > 1
    }
    weights = dict(_moved(model.state_dict(), places))
    own = small.state_dict()
    if not places or {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in weights.items()}:
        raise _uncut(model.config)
    small.load_state_dict(weights)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def write_small(spec: ModelSpec, out: Path) -> None:
    """Write the model that `spec` names, its layers cut, in float32, with its tokenizer, to the new folder `out`.

    Raises ModelError as `cut_layers`, ConfigError if `out` holds something.
    """
    small = cut_layers(spec.load(device="cpu")).float()
    with new_folder(out) as folder:
        save_student(small, folder)
        spec.tokenizer.save_pretrained(folder)


def _stacks(model: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield name, module


def _moved(weights: Mapping[str, Any], places: Mapping[str, Mapping[int, int]]) -> Iterator[tuple[str, Any]]:
    """The weights that are kept, under their new names."""
    for name, tensor in weights.items():
        stack = next((stack for stack in places if name.startswith(stack)), None)
        if stack is None:
            yield name, tensor
            continue
        number, rest = re.match(r"(\d+)(.*)", name.removeprefix(stack)).groups()  # type: ignore[union-attr]
        if int(number) in places[stack]:
            yield f"{stack}{places[stack][int(number)]}{rest}", tensor


def _uncut(config: Any) -> ModelError:
    return ModelError(
        f"student = 'small': the layers of a '{config.model_type}' model are not alike, or not found, so that none can "
        "be left out. Name a student."
    )
