"""Attention rows of a model's own forward, without its attention maps.

`output_attentions=True` would force the eager path, which in training returns maps after dropout. Instead one
attention function is registered with transformers: it is sdpa, and while `recorded_attention` is open it also keeps
the detached queries and keys, from which `attention_tree` computes the few rows it needs; while `recorded_scores` is
open, the scores before softmax, with their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import ModelError
from ...objectives.attention_tree import AttentionRows, rows_of_query_key

RECORDED_SDPA = "rlkd_recorded_sdpa"
AttentionSource = Literal["sdpa", "eager"]
# Called with (query, key [B, H, L, d], mask, position bias, scaling) of every attention layer.
Recorder = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], None]
_recorder: ContextVar[Recorder | None] = ContextVar("_recorder", default=None)


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


@contextmanager
def recorded_attention() -> Iterator[list[AttentionRows]]:
    """Collects the rows of every attention layer that runs inside, in order.

    Open it around one forward only: gradient checkpointing runs the layers again in the backward pass, outside.
    """
    record: list[AttentionRows] = []

    def rows(query: Tensor, key: Tensor, mask: Tensor | None, position_bias: Tensor | None, scaling: float) -> None:
        biases = [b.detach() for b in (mask, position_bias) if b is not None]
        record.append(rows_of_query_key(query.detach(), key.detach(), biases, scaling))

    with _recording(rows):
        yield record


@contextmanager
def recorded_scores() -> Iterator[list[Tensor]]:
    """Collects q k^T / sqrt(d) + position bias, [B, H, L, L], of every attention layer that runs inside, in order.

    Differentiable, and without masks; not under gradient checkpointing, which runs the layers without gradients.
    """
    record: list[Tensor] = []

    def scores(query: Tensor, key: Tensor, mask: Tensor | None, position_bias: Tensor | None, scaling: float) -> None:
        found = query.float() @ key.float().transpose(2, 3) * scaling
        record.append(found if position_bias is None else found + position_bias.float())

    with _recording(scores):
        yield record


def _recorded_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    recorder = _recorder.get()
    if recorder is not None:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        recorder(query, key, attention_mask, options.get("position_bias"), scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(RECORDED_SDPA, _recorded_sdpa)
AttentionMaskInterface.register(RECORDED_SDPA, sdpa_mask)


def prepare_attention(model: Any, role: str) -> AttentionSource:
    """Make the attention of `model` readable; returns how: 'sdpa' recorded, or 'eager' maps where the family has no
    other.

    Tries it out on two tokens. Raises ModelError if the model has no attention to read, or if only maps after dropout
    could be had (an eager model that trains with attention dropout).
    """
    layers = getattr(model.config, "num_hidden_layers", 0)
    if layers and getattr(model, "_supports_sdpa", False):
        previous = model.config._attn_implementation
        model.set_attn_implementation(RECORDED_SDPA)
        with recorded_attention() as record:
            _try_out(model)
        if len(record) == layers:
            return "sdpa"
        model.set_attn_implementation(previous)
    if layers and hasattr(model, "set_attn_implementation") and model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    try:
        maps = _try_out(model, output_attentions=True).attentions
    except TypeError:
        maps = None
    if not layers or maps is None or len(maps) != layers or any(a is None or a.dim() != 4 for a in maps):
        raise ModelError(
            f"{role}: a '{model.config.model_type}' model does not expose its attention, neither through transformers' "
            "attention interface nor as maps, so no tree can be grown. Choose a preset without a tree (ft, kd, pkd), "
            "or a BERT-like model."
        )
    dropout = next((p for name in ATTENTION_DROPOUT if (p := getattr(model.config, name, 0.0))), 0.0)
    if role == "student" and dropout:
        raise ModelError(
            f"student: a '{model.config.model_type}' model exposes its attention only after dropout ({dropout:g}), "
            "which would drop the tree's nodes at random. Set attention_probs_dropout_prob to 0 in its configuration."
        )
    return "eager"


def score_attention(model: Any, role: str) -> None:
    """Make `recorded_scores` see the attention of an encoder-decoder `model`, which goes on with sdpa.

    Raises ModelError if its attention does not go through transformers' attention interface.
    """
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation(RECORDED_SDPA)
        one = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with recorded_scores() as record, torch.no_grad():
            model.get_encoder()(input_ids=one)
        if len(record) == model.config.num_hidden_layers:
            return
    raise ModelError(
        f"{role}: a '{model.config.model_type}' model does not show its attention through transformers' attention "
        "interface: set attention_coef to 0 (hidden_coef needs none)."
    )


ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def _try_out(model: Any, **options: Any) -> Any:
    training = model.training
    model.eval()
    two = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            return model(input_ids=two, attention_mask=two, **options)
    finally:
        model.train(training)
