"""Sharded training with FSDP2, as `accelerate launch` asks for it: what is refused, and how it is set up.

The student's weights, gradients and optimizer state are sharded; teacher, reference policy and a behaviour policy that
lags are whole in every process. `rlkd.sharding` has every access to the student's whole weights.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ..errors import ConfigError

USE_FSDP = "ACCELERATE_USE_FSDP"
EXAMPLE = "recipes/accelerate/fsdp2.yaml"
LAUNCH = f"accelerate launch --config_file {EXAMPLE}"


class Supported(NamedTuple):
    """The one value of a setting of accelerate's `fsdp_config` that is supported. default: without its variable."""

    default: str
    value: str
    why: str


# By the variable that `accelerate launch` makes of `fsdp_...`.
SUPPORTED = {
    "FSDP_VERSION": Supported("1", "2", "FSDP1 is not supported"),
    "FSDP_AUTO_WRAP_POLICY": Supported("NO_WRAP", "TRANSFORMER_BASED_WRAP", "weights are gathered layer by layer"),
    "FSDP_STATE_DICT_TYPE": Supported("SHARDED_STATE_DICT", "FULL_STATE_DICT", "checkpoints hold whole weights"),
    "FSDP_RESHARD_AFTER_FORWARD": Supported("true", "true", "nothing else is tested"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": Supported(
        "false", "false", "teacher and reference policy need their weights in every process"
    ),
    "FSDP_OFFLOAD_PARAMS": Supported("false", "false", "nothing else is tested"),
    "FSDP_ACTIVATION_CHECKPOINTING": Supported("false", "false", "gradient_checkpointing of the trainer does it"),
    "FSDP_IGNORED_MODULES": Supported("none", "none", "the gradients of these would not be averaged"),
}
# Others keep sums or factors of whole matrices, or make their own copies of the weights.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def sharding_wanted() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get(USE_FSDP, "false").lower() in ("true", "1")


def check_sharding(args: Any) -> None:
    """Raise ConfigError for what sharded training does not have: before any weights load."""
    if getattr(args, "fsdp", None):
        raise ConfigError(f"fsdp = {args.fsdp!r}: the launcher says how to shard: leave it out, and use `{LAUNCH}`")
    if not sharding_wanted():
        return
    if not args.shards:
        raise ConfigError(
            f"FSDP ({USE_FSDP}): {type(args).__name__} trains students that are not sharded. Use one process, or "
            "several with DDP: `accelerate launch --multi_gpu`."
        )
    for variable, (default, value, why) in SUPPORTED.items():
        found = os.environ.get(variable, default)
        if found.lower() != value.lower():
            raise ConfigError(f"{variable.lower()} = {found} of accelerate's configuration: {why}: set it to {value}")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(f"FSDP ({USE_FSDP}): one process has nothing to shard. Use `{LAUNCH}`, or leave FSDP out.")
    if not args.use_cpu and not torch.accelerator.is_available():
        # accelerate would let every process train alone.
        raise ConfigError("use_cpu = False: FSDP2 finds no GPU on this machine: set it to true")
    for name, (sharded, remedy) in _settings(args).items():
        if not sharded:
            raise ConfigError(f"{name} = {getattr(args, name)!s}: not with FSDP2: {remedy}")


def _settings(args: Any) -> dict[str, tuple[bool, str]]:
    """{setting: (whether its value can be had, what to do if not)}."""
    optimizer = getattr(args.optim, "value", args.optim)
    coefs = [name for name in ("hidden_coef", "attention_coef") if getattr(args, name, 0) > 0]
    return {
        "optim": (optimizer in OPTIMIZERS, f"set it to one of {', '.join(OPTIMIZERS)}"),
        "torch_compile": (not args.torch_compile, "leave it out"),
        "auto_find_batch_size": (not args.auto_find_batch_size, "leave it out"),
        **dict.fromkeys(coefs, (False, "layers of a sharded student are not compared: set it to 0")),
    }


def check_student(student: Any) -> None:
    """Raise ConfigError for a student that is not sharded: adapters."""
    if sharding_wanted() and hasattr(student, "peft_config"):
        raise ConfigError(
            "use_peft: an adapter is small and is not sharded: use DDP (`accelerate launch --multi_gpu`), with "
            "load_in_4bit where the frozen model is too large."
        )


def shard_with(accelerator: Any) -> None:
    """Make `accelerator` shard with FSDP2, on CPUs too: accelerate 1.15 replicates there, without a word.

    Weights are gathered in their own precision, and autocast rounds in the forward pass as it does with DDP.
    """
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()  # of its own: it remembers the layers of the model it wrapped
    for of in (state, PartialState()):
        of.distributed_type = DistributedType.FSDP
    # It is the position bias that T5's layers pass on, which the next one adds out of place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w*T5Block\) returned a view")
