"""Footprint of a classifier: parameters, megabytes, milliseconds per sentence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def count_parameters(model: Any) -> int:
    """All weights, embeddings included."""
    return sum(p.numel() for p in model.parameters())


def megabytes(model: Any) -> float:
    """Size of the saved weights in units of 10^6 bytes, at the precision they have now."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


@torch.inference_mode()
def latency(
    models: Mapping[str, Any], batches: Mapping[str, Sequence[Mapping[str, Tensor]]], passes: int = 5
) -> dict[str, float]:
    """Milliseconds per sentence of each model: the median of `passes` passes over its batches (input_ids [B, L]).

    The models alternate, so that a slow phase of the machine affects all of them, after one warm-up pass. Tokenisation
    is not counted. Each model and its batches must be on one device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(passes + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for batch in batches[name]:
                model(**batch)
                if model.device.type != "cpu":
                    torch.accelerator.synchronize(model.device)  # wait for the result
            seconds[name].append(time.perf_counter() - start)
    sentences = {name: sum(len(batch["input_ids"]) for batch in batches[name]) for name in models}
    return {name: 1000 * statistics.median(seconds[name][1:]) / sentences[name] for name in models}
