"""Frozen encoders: loading one with or without a head, and its layers' outputs, pooled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice
from ...choices import Pool
from ...errors import ModelError
from ..loading import check_saved_weights, load_config, load_pretrained


def load_encoder_config(name: str, *, allow_bin: bool = False) -> Any:
    """The configuration of an encoder-only model. Raises ModelError for other models, and damaged files."""
    from . import bilstm  # noqa: F401  (registers its configuration)

    config = load_config(name, "model")
    if config.is_encoder_decoder or not getattr(config, "num_hidden_layers", None):
        raise ModelError(
            f"model '{name}' ('{config.model_type}') is not an encoder-only model with layers. Give a BERT-like model "
            "or a classifier made of one."
        )
    check_saved_weights(name, "model", allow_bin=allow_bin)
    return config


def load_encoder(name: str, config: Any, *, allow_bin: bool = False) -> Any:
    """The model in evaluation mode, float32, with its classification head if it was saved with one.

    Raises ModelError if weights that its layers need are missing or damaged.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    classifies = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    family = AutoModelForSequenceClassification if classifies else AutoModel
    # A pooler or a head only reads the layers: fresh ones do not change them.
    model = load_pretrained(
        family, name, "model", config=config, dtype=torch.float32, allow_bin=allow_bin, needs="layers"
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def pooled_layers(
    model: Any, batches: Iterable[tuple[list[int], dict[str, Tensor]]], wanted: Sequence[tuple[int, Pool]]
) -> dict[tuple[int, Pool], np.ndarray]:
    """Features [rows, D] of each (layer, pool) of `wanted`, float32, in the order of the rows' numbers.

    Layer 0 is the embeddings. cls is the first token; mean is that of all tokens but padding.
    batches: rows' numbers, and what the model reads of them (input_ids, attention_mask [B, L] and the like).
    Raises ConfigError for another pool, ModelError if the number of layers differs from the model's
    configuration.
    """
    for _, pool in wanted:
        check_choice("pool", pool, Pool)
    device = next(model.parameters()).device
    parts: dict[tuple[int, Pool], list[Tensor]] = {choice: [] for choice in wanted}
    order: list[int] = []
    layers = model.config.num_hidden_layers
    for numbers, batch in batches:
        order += numbers
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        states = model(**inputs, output_hidden_states=True).hidden_states
        if len(states) != layers + 1:
            raise ModelError(
                f"a '{model.config.model_type}' model returns {len(states)} hidden states, expected are the embeddings "
                f"and {layers} layers. Probe another model."
            )
        mask = inputs["attention_mask"][:, :, None]
        for layer, pool in wanted:
            h = states[layer].float()
            pooled = h[:, 0] if pool == "cls" else (h * mask).sum(1) / mask.sum(1).clamp(min=1)
            parts[layer, pool].append(pooled.cpu())
    back = torch.tensor(order).argsort()
    return {choice: torch.cat(rows)[back].numpy() for choice, rows in parts.items()}
