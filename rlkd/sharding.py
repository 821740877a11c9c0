"""The whole weights of a model that FSDP2 may have sharded over processes: every access to them, in one place.

A sharded model holds its part of each parameter, as a DTensor. What is marked "collective" must be called by every
process, equally often. For a model that is not sharded all of this is plain access without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards `model`."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of `model` and no forward communicates, so that processes may run
    different numbers of them: sampling takes as many steps as the longest answer. Collective at the start alone.

    Weights are read through the modules: `state_dict()` would shard them again.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if isinstance(model, FSDPModule):
        # Else the first layer to run would take itself for the root. There is no public name for this.
        model._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # The root's own weights stay until its backward pass, as FSDP2 does by default.
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def whole(tensor: Any) -> Any:
    """A tensor with the parts of all processes. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(value: Tensor, like: Any) -> Tensor:
    """Of a whole tensor, which every process has, the part that is held of `like`."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `model.load_state_dict(state)`, of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: part_like(value, own.get(name)) for name, value in state.items()})


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of `source`, whole, into `target`, an unsharded model of the same make. Collective."""
    to = dict(target.named_parameters())
    for name, weight in source.named_parameters():
        if to[name] is not weight:  # a frozen base of adapters is the same in both
            to[name].copy_(whole(weight))


def tied_as(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, whole tensors by name, in which the names of one parameter of `model` share one tensor again."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: state[names.get(name, name)] for name in state}


def whole_optimizer_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, on the CPU; empty unless `keep`. Collective."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        gathered = {name: whole(value) for name, value in values.items()}  # one parameter at a time
        if keep:
            moments[number] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in gathered.items()}
    return {**state, "state": moments} if keep else {}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """As `optimizer.load_state_dict(state)`, of what an optimizer of whole or of sharded parameters has saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: part_like(v, p) if getattr(v, "shape", None) == p.shape else v for name, v in values.items()}
        for number, values in state["state"].items()
        for p in (parameters[number],)
    }
    optimizer.load_state_dict({**state, "state": moments})
