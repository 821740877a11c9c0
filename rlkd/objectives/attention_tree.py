"""The tokens that Tree Knowledge Distillation matches: a tree grown from [CLS] down the layers' attention maps.

Xu, Ji, Xie, "Tree Knowledge Distillation for Compressing Transformer-Based Language Models". The paper's Algorithm 1,
its abstract and its text differ; `Variant` names the three readings. Every selection of tokens is a tensor
of counts [B, H, L]: how often token p counts for head slice h, so that one distance (`encoder.token_distance`)
serves them all. Shapes: B rows, L tokens (padding included), H heads, D width, d = D / H, K student layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice

Variant = Literal["algorithm1", "abstract", "flow"]
# Query positions [B, H, F] -> their attention rows [B, H, F, L], as scores or as probabilities: softmax keeps the order
# within a row, and the order is all that the tree reads.
AttentionRows = Callable[[Tensor], Tensor]


def rows_of_map(attention: Tensor) -> AttentionRows:
    """Rows of a whole attention map [B, H, L, L]."""

    def rows(nodes: Tensor) -> Tensor:
        return attention.gather(2, nodes[..., None].expand(*nodes.shape, attention.shape[-1]))

    return rows


def rows_of_query_key(query: Tensor, key: Tensor, biases: Sequence[Tensor], scaling: float) -> AttentionRows:
    """Rows scaling q_p k^T + biases of queries and keys [B, H, L, d], computed on demand and for those rows only.

    biases broadcast to [B, H, L, L]: added position biases or masks, or boolean masks (True = may be attended).
    """

    def rows(nodes: Tensor) -> Tensor:
        frontier = query.gather(2, nodes[..., None].expand(*nodes.shape, query.shape[-1]))
        # Full precision: in bfloat16 many scores of a row would tie.
        with torch.autocast(query.device.type, enabled=False):
            scores = frontier.float() @ key.float().transpose(2, 3) * scaling
        for bias in biases:
            whole = bias.expand(*query.shape[:3], key.shape[2])
            own = whole.gather(2, nodes[..., None].expand(*nodes.shape, key.shape[2]))
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own.float()
        return scores

    return rows


@torch.no_grad()
def attention_tree(
    rows: Sequence[AttentionRows],
    choosable: Tensor,
    heads: int,
    m: int,
    *,
    variant: Variant = "algorithm1",
    with_multiplicity: bool = False,
    exclude_self: bool = False,
) -> list[Tensor]:
    """The tree of each head: K tensors of counts [B, H, L] (float32), layer 1 first. No gradient.

        variant      td(h, K)            td(h, k), k < K
        algorithm1   top_m(A_K[root])    union over p in td(h, k+1) of top_m(A_k[p])
        abstract     {root}              union over p in td(h, k+1) of top_m(A_k[p])
        flow         {root}              union over p in td(h, k+1) of top_m(A_{k+1}[p])

    Args: rows, the K layers' attention, layer 1 first; choosable [B, L], False where a token may not be chosen
    (padding; [CLS] and [SEP] if they are excluded): a row with fewer than m such tokens has fewer children; heads H;
    with_multiplicity counts a token once for every parent that chose it, instead of once; exclude_self keeps a token
    from choosing itself. The root is token 0. Raises ValueError for m < 1 or no layers, ConfigError for an unknown
    variant.
    """
    check_choice("variant", variant, Variant)
    layers = len(rows)
    maps = {
        "algorithm1": range(layers - 1, -1, -1),
        "abstract": range(layers - 2, -1, -1),
        "flow": range(layers - 1, 0, -1),
    }
    if m < 1 or layers < 1:
        raise ValueError(f"a tree needs m >= 1 and at least 1 layer; got m = {m}, layers = {layers}")
    batch, length = choosable.shape
    nodes = torch.zeros(batch, heads, 1, dtype=torch.long, device=choosable.device)
    counts = torch.ones(batch, heads, 1, device=choosable.device)
    tree = [] if variant == "algorithm1" else [cls_token(choosable).repeat(1, heads, 1)]
    for k in maps[variant]:
        scores = rows[k](nodes).masked_fill(~choosable[:, None, None, :], -torch.inf)
        if exclude_self:
            scores = scores.scatter(-1, nodes[..., None], -torch.inf)
        values, children = scores.topk(min(m, length), dim=-1)
        # A token that may not be chosen is picked only for want of others, and then counts nothing.
        counts = (counts[..., None] * (values > -torch.inf)).flatten(2)
        nodes = children.flatten(2)
        level = torch.zeros(batch, heads, length, device=choosable.device).scatter_add(2, nodes, counts)
        if not with_multiplicity:
            level = level.clamp(max=1)
        tree.append(level)
        if nodes.shape[2] > length:  # every token once, with its count: no exponential growth
            nodes, counts = torch.arange(length, device=choosable.device).expand(batch, heads, length), level
    return tree[::-1]


def random_tokens(counts: Tensor, valid: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The counts [B, H, L] of one level of a tree, given to random tokens of `valid` [B, L] instead: the same number,
    as often.

    Baseline RAND of the paper. Drawn afresh at each call, each head and each level for itself.
    """
    draw = torch.rand(counts.shape, generator=generator, device=counts.device).masked_fill(~valid[:, None], -1)
    return torch.zeros_like(counts).scatter(2, draw.argsort(2, descending=True), counts.sort(2, descending=True).values)


def all_tokens(valid: Tensor, heads: int) -> Tensor:
    """Every non-padding token once for each head: [B, H, L] from `valid` [B, L] (ALL, eq. 10)."""
    return valid[:, None].expand(-1, heads, -1).float()


def cls_token(valid: Tensor) -> Tensor:
    """Token 0 alone, over the whole width: [B, 1, L] for `valid` [B, L] (patience, eq. 7)."""
    selected = torch.zeros(valid.shape[0], 1, valid.shape[1], device=valid.device)
    selected[..., 0] = 1
    return selected
