"""Models without memory: what a forward or a step would take, counted before anything is loaded.

Weights are PyTorch's fake tensors, which have shapes and no values. The code that runs on them is that of training;
only token ids and masks are real, so that it may read lengths from them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Ledger(TorchDispatchMode):
    """Counts what is computed inside: `now` and `peak`, bytes of tensors made here and alive; `operations`, those of
    matrix products and attention.

    Whole numbers and truth values are computed for real, everything else on fake tensors alone. A number that is read
    from a fake tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.operations = 0, 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._enter(tensor, 0)  # a weight, or something that was there before
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if fake and func is aten._local_scalar_dense.default:
            return 1
        if func in INDEXED:
            args = (args[0], [place for one in args[1] for place in _places(one)], *args[2:])
        out = func(*args, **(kwargs or {})) if fake else _for_real(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor, tensor.untyped_storage().nbytes())
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _enter(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _for_real(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call without fake tensors, if it is of whole numbers or truth values; else a fake one."""
    with unset_fake():
        out = func(*args, **kwargs)
    floating = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(out))
    return func(*args, **kwargs) if floating else out


def _places(one: Any) -> tuple[Any, ...]:
    """What a real mask names, in place of the mask: the result then has a size."""
    if not isinstance(one, Tensor) or isinstance(one, FakeTensor) or one.dtype != torch.bool:
        return (one,)
    with unset_fake():
        return one.nonzero(as_tuple=True)


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made inside are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def weightless(make: Callable[[], Any]) -> Any:
    """The module that `make` builds, with fake weights; to be called in `without_memory`."""
    with unset_fake(), torch.device("meta"):
        module = make()
    return fake_weights(module)


def fake_weights(module: Any) -> Any:
    """The module with fake weights on a CPU in place of its own; shared ones stay shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, old in group.items():
                if old is not None and id(old) not in made:
                    new = torch.empty_like(old, device="cpu").detach()
                    own = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if own else new
                group[name] = old if old is None else made[id(old)]
    return module


def size_of(model: Any, *, trained: bool = False) -> int:
    """Bytes of a model's parameters and buffers, shared ones once; trained: of the parameters that are trained."""
    found = [p for p in model.parameters() if p.requires_grad] if trained else [*model.parameters(), *model.buffers()]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in found}.values())
