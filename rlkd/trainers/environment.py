"""What reaches a run from outside its settings: accelerate's configuration and variables of libraries."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate.utils import DynamoBackend, PrecisionType

from ..errors import ConfigError
from ..io.versions import variables
from .parallel import LAUNCH, check_sharding, sharding_wanted

logger = logging.getLogger(__name__)

MIXED_PRECISION, COMPILER = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# Setting (None: there is none) and variable of what shards a model in ways that no trainer has; FSDP: `parallel.py`.
SHARDING = {
    "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
    "Megatron-LM": (None, "ACCELERATE_USE_MEGATRON_LM"),
}


def check_launch(args: Any) -> None:
    """Raise ConfigError for what accelerate's configuration or environment asks for and no trainer here can do: before
    any weights load.
    """
    for what, (setting, variable) in SHARDING.items():
        origin = setting if setting and getattr(args, setting, None) else f"{variable}, as accelerate's configuration"
        if origin == setting or os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{what} ({origin}) is not supported. Shard the student with FSDP2: `{LAUNCH}`; or use DDP: "
                "`accelerate launch --multi_gpu`."
            )
    check_sharding(args)
    for variable, kinds in ((MIXED_PRECISION, PrecisionType), (COMPILER, DynamoBackend)):
        value, allowed = os.environ.get(variable), [str(kind.value).lower() for kind in kinds]
        if value is not None and value.lower() not in allowed:
            raise ConfigError(f"{variable} = {value!r}: allowed are {', '.join(allowed)}")
    if sharding_wanted() and (compiler := os.environ.get(COMPILER, "no")).lower() != "no":
        raise ConfigError(f"{COMPILER} = {compiler!r}: not with FSDP2: leave it out")


def check_half_precision(precision: str, *, setting: bool) -> None:
    """Raise ConfigError for float16, which generating students do not survive. setting: `fp16` asks for it."""
    if precision == "fp16":
        origin = (
            "fp16 = True" if setting else f"mixed_precision: fp16 of accelerate's configuration ({MIXED_PRECISION})"
        )
        raise ConfigError(f"{origin}: float16 overflows to inf in T5 models. Use bf16: true (GPU) or neither.")


def use_one_gpu(args: Any) -> None:
    """One process trains on one GPU: transformers would run it on all that it sees, with batches larger by as many."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible, and this process uses the first. For all of them: accelerate launch "
            f"--multi_gpu --num_processes {args.n_gpu}; CUDA_VISIBLE_DEVICES chooses one."
        )
        args._n_gpu = 1


def warn_of_ignored(args: Any) -> None:
    """Log the settings of accelerate that transformers' Trainer does not read."""
    value = os.environ.get(ACCUMULATION)
    if value not in (None, "1", str(args.gradient_accumulation_steps)):
        logger.warning(
            f"gradient_accumulation_steps {value} of accelerate's configuration is not used: the run accumulates over "
            f"{args.gradient_accumulation_steps} (set gradient_accumulation_steps)"
        )


def describe_environment(accelerator: Any) -> dict[str, str]:
    """What an accelerator really does, and the variables that change numbers: runs that differ here are other runs."""
    compiler = accelerator.state.dynamo_plugin
    backend = str(compiler.backend.value).lower()
    found = {
        "mixed_precision": str(accelerator.mixed_precision),
        # The launcher names a mode for no compiler, too.
        "compiler": backend if backend == "no" else f"{backend}, mode {compiler.mode}",
        "device": accelerator.device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if sharding_wanted():
        found["sharding"] = "FSDP2"
    return found | variables()
