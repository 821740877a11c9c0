"""A tiny random configuration of every family of encoders that transformers can classify texts with."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
# What a family needs besides, or instead (None: leaves out).
OWN: dict[str, dict[str, Any]] = {
    "funnel": {"block_sizes": [2, 2], "d_head": 8, "num_hidden_layers": None},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 2},
    "perceiver": {"d_latents": 16, "num_latents": 8, "d_model": 16},
    "reformer": {
        "axial_pos_embds_dim": (8, 8),
        "axial_pos_shape": (8, 8),
        "attention_head_size": 8,
        "is_decoder": False,
    },
    "squeezebert": {"embedding_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "mobilebert": {"intra_bottleneck_size": 16, "embedding_size": 16},
    "modernvbert": {"text_config": TEXT, "vision_config": TEXT},
    "ultravbert": {"text_config": TEXT, "vision_config": TEXT},
}
ENCODERS = sorted(
    name
    for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES or name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
)


def tiny_config(family: str, **more: Any) -> Any:
    """Of four layers, two heads and width 16, where the family has such."""
    given = {name: value for name, value in (SHAPE | OWN.get(family, {}) | more).items() if value is not None}
    return AutoConfig.for_model(family, **given)
