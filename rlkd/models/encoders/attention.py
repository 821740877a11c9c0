"""What a model's attention computes in its own forward, without its attention maps.

`output_attentions=True` would force the eager path, which in training returns maps after dropout. Instead one
attention function is registered with transformers: it is sdpa, and while `recorded_attention` is open it also keeps
queries, keys and values, from which `attention_tree` computes the few rows it needs, TinyBERT's term the scores and
MiniLM's the relations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import ModelError
from ...objectives.attention_tree import rows_of_map, rows_of_query_key

RECORDED_SDPA = "rlkd_recorded_sdpa"
AttentionSource = Literal["sdpa", "eager"]
_open_record: ContextVar[list[RecordedAttention] | None] = ContextVar("_open_record", default=None)


class RecordedAttention(NamedTuple):
    """Queries, keys and values of one layer [B, H, L, d], in the graph of the forward, and what is added to scores.

    biases broadcast to [B, H, L, L]: added position biases or masks, or boolean masks (True = may be attended).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[Tensor, ...]
    scaling: float

    def rows(self, nodes: Tensor) -> Tensor:
        """As in `AttentionRows`: scores [B, H, F, L] of the query positions nodes [B, H, F]."""
        biases = [bias.detach() for bias in self.biases]
        return rows_of_query_key(self.query.detach(), self.key.detach(), biases, self.scaling)(nodes)

    def scores(self) -> Tensor:
        """The whole map before its softmax [B, H, L, L], float32; -inf where a token may not be attended to."""
        with torch.autocast(self.query.device.type, enabled=False):
            scores = self.query.float() @ self.key.float().transpose(2, 3) * self.scaling
        for bias in self.biases:
            if bias.dtype == torch.bool:
                scores = scores.masked_fill(~bias, -torch.inf)
            else:  # masks are added as the lowest number of their type
                scores = (scores + bias.float()).masked_fill(bias <= torch.finfo(bias.dtype).min / 2, -torch.inf)
        return scores

    def vectors(self) -> list[Tensor]:
        """Queries, keys and values, all heads side by side: three of [B, L, H d]."""
        return [x.transpose(1, 2).flatten(2).float() for x in (self.query, self.key, self.value)]


class AttentionMap(NamedTuple):
    """The attention probabilities of one layer [B, H, L, L], of a family that gives nothing else."""

    probabilities: Tensor

    def rows(self, nodes: Tensor) -> Tensor:
        """As in `RecordedAttention`, of probabilities: their order is that of the scores."""
        return rows_of_map(self.probabilities.detach())(nodes)


LayerAttention = RecordedAttention | AttentionMap


def comparable_maps(student: LayerAttention, teacher: LayerAttention) -> tuple[Tensor, Tensor]:
    """Scores [B, H, L, L] of two layers, or their probabilities where one of them has only those."""
    if isinstance(student, RecordedAttention) and isinstance(teacher, RecordedAttention):
        return student.scores(), teacher.scores()
    own, theirs = (
        a.probabilities.float() if isinstance(a, AttentionMap) else a.scores().softmax(-1) for a in (student, teacher)
    )
    return own, theirs


@contextmanager
def recorded_attention() -> Iterator[list[RecordedAttention]]:
    """Collects the attention of every layer that runs inside, in order.

    Open it around one forward only: gradient checkpointing runs the layers again in the backward pass, outside.
    """
    record: list[RecordedAttention] = []
    token = _open_record.set(record)
    try:
        yield record
    finally:
        _open_record.reset(token)


def _recorded_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    record = _open_record.get()
    if record is not None:
        biases = tuple(b for b in (attention_mask, options.get("position_bias")) if b is not None)
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        record.append(RecordedAttention(query, key, value, biases, scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(RECORDED_SDPA, _recorded_sdpa)
AttentionMaskInterface.register(RECORDED_SDPA, sdpa_mask)


def prepare_attention(model: Any, role: str, *, vectors: bool = False) -> AttentionSource:
    """Make the attention of `model` readable; returns how: 'sdpa' recorded, or 'eager' maps where the family has no
    other.

    Tries it out on two tokens. Raises ModelError if the model has no attention to read, if only maps after dropout
    could be had (an eager model that trains with attention dropout), or, where `vectors` are needed, if it gives no
    queries, keys and values.
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
            "attention interface nor as maps, which the tree, attention and relations need. Choose a preset without "
            "them (ft, kd, pkd), or a BERT-like model."
        )
    if vectors:
        raise ModelError(
            f"{role}: a '{model.config.model_type}' model exposes only attention maps, not the queries, keys and "
            "values that the term relations compares. Choose another preset, or a BERT-like model."
        )
    dropout = next((p for name in ATTENTION_DROPOUT if (p := getattr(model.config, name, 0.0))), 0.0)
    if role == "student" and dropout:
        raise ModelError(
            f"student: a '{model.config.model_type}' model exposes its attention only after dropout ({dropout:g}), "
            "which would drop the tree's nodes at random. Set attention_probs_dropout_prob to 0 in its configuration."
        )
    return "eager"


def score_attention(model: Any, role: str) -> None:
    """Make `recorded_attention` see the attention of an encoder-decoder `model`, which goes on with sdpa.

    Raises ModelError if its attention does not go through transformers' attention interface.
    """
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation(RECORDED_SDPA)
        one = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with recorded_attention() as record, torch.no_grad():
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
