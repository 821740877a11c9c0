"""Alternatives to Tree Knowledge Distillation: other ways to distil a large encoder into a small one.

When to use which: docs/tkd.md. Shapes: B rows, C labels, L tokens, H heads, D width (D_s of the student, D_t of the
teacher), M the mask [B, L] of real tokens. Gradients flow to the student (and to projections) only. PKD is
`encoder.token_distance` on `attention_tree.cls_token`; classic KD is `encoder.soft_cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .divergences import forward_kl


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (z_s - z_t)^2 over rows and labels, a scalar; logits [B, C] (Ba & Caruana 2014, arXiv 1312.6184)."""
    return F.mse_loss(student, teacher.detach())


def noisy_logits(
    teacher: Tensor, probability: float, deviation: float, generator: torch.Generator | None = None
) -> Tensor:
    """z_t (1 + xi), xi ~ N(0, deviation^2) for each logit of the rows chosen with `probability`; logits [B, C].

    One teacher in place of many (Sau & Balasubramanian 2016, arXiv 1610.09650, eq. 4). Raises ValueError for a
    probability outside [0, 1] or a negative deviation.
    """
    if not 0 <= probability <= 1 or deviation < 0:
        raise ValueError(f"probability = {probability}, deviation = {deviation}: must be in [0, 1] and at least 0")
    chosen = torch.rand(teacher.shape[0], 1, generator=generator, device=teacher.device) < probability
    noise = torch.randn(teacher.shape, generator=generator, device=teacher.device, dtype=teacher.dtype)
    return teacher * (1 + deviation * noise * chosen)


def tinybert_hidden(student: Tensor, teacher: Tensor, mask: Tensor, projection: Tensor | None = None) -> Tensor:
    """mean (H_s W - H_t)^2 over the real tokens' elements, a scalar (Jiao et al. 2020, arXiv 1909.10351, eqs 8 and 9).

    TinyBERT's hidden loss, and its embedding loss when given the embeddings. Args: student [B, L, D_s], teacher
    [B, L, D_t], mask [B, L]; projection W [D_s, D_t], learned, where widths differ. Raises ValueError if they differ
    without one.
    """
    projected = student if projection is None else student @ projection
    if projected.shape != teacher.shape:
        raise ValueError(
            f"hidden states {list(projected.shape)} (student) and {list(teacher.shape)} (teacher): give a projection "
            "[D_s, D_t] to the teacher's width"
        )
    squares = (projected - teacher.detach()).square() * mask[..., None]
    return squares.sum() / (mask.sum() * teacher.shape[-1]).clamp(min=1)


def tinybert_attention(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """mean (A_s - A_t)^2 over heads and pairs of real tokens, a scalar (Jiao et al. 2020, eq. 7).

    Args: student, teacher [B, H, L, L], scores before the softmax (as the authors advise) or probabilities; mask
    [B, L]. A pair that either model may not attend to (-inf, local attention) is left out. Raises ValueError unless
    heads and tokens agree.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention maps {list(student.shape)} (student) and {list(teacher.shape)} (teacher): heads and tokens "
            "must agree; `minilm_relation` compares models of different heads"
        )
    teacher = teacher.detach()
    pairs = mask[:, None, :, None] & mask[:, None, None, :] & (student != -torch.inf) & (teacher != -torch.inf)
    difference = torch.where(pairs, student - teacher, 0.0)  # not times the mask: 0 times inf is not a number
    return difference.square().sum() / pairs.sum().clamp(min=1)


def gram_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """mean_b sum over pairs of real tokens of (G_s - G_t)^2, a scalar: neuron selectivity transfer.

        G[p, q] = 1/D sum_i f_i[p] f_i[q],   f_i = neuron i over the row's tokens, scaled to length 1

    Of each row this is MMD^2 of the two sets of neurons with the kernel (x . y)^2 (Huang & Wang 2017, arXiv 1707.01219,
    eqs 6 and 8). Args: student [B, L, D_s], teacher [B, L, D_t], of any widths; mask [B, L].
    """

    def gram(hidden: Tensor) -> Tensor:
        neurons = F.normalize(hidden * mask[..., None], dim=1)
        return neurons @ neurons.transpose(1, 2) / hidden.shape[-1]

    return (gram(student) - gram(teacher.detach())).square().sum((1, 2)).mean()


def minilm_relation(student: Tensor, teacher: Tensor, mask: Tensor, relation_heads: int) -> Tensor:
    """mean KL(R_t || R_s) over relation heads and real tokens, a scalar, nats (MiniLMv2, arXiv 2012.15828, eqs 5-7).

        R[h, p] = softmax over q of x_h[p] . x_h[q] / sqrt(d),   d = D / relation_heads

    for queries, keys or values x, all heads side by side: the models may differ in heads and in width. Args: student
    [B, L, D_s], teacher [B, L, D_t], mask [B, L]. Raises ValueError unless relation_heads divides both widths.
    """
    widths = (student.shape[-1], teacher.shape[-1])
    if any(width % relation_heads for width in widths):
        raise ValueError(f"relation_heads = {relation_heads}: must divide the widths {widths[0]} and {widths[1]}")

    def relations(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (relation_heads, -1)).transpose(1, 2)
        scores = x @ x.transpose(2, 3) / x.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)

    divergence = forward_kl(relations(student), relations(teacher.detach()))  # [B, H, L]
    return (divergence * mask[:, None]).sum() / (mask.sum() * relation_heads).clamp(min=1)


def input_gradient(logits: Tensor, label: Tensor, inputs: Tensor, *, differentiable: bool = False) -> Tensor:
    """n(d z[c] / d x) of each row, n = scaling to length 1 over tokens and dimensions: [B, L, D], float32.

    Args: logits [B, C] computed from inputs (word embeddings) [B, L, D] that require a gradient; label c [B];
    differentiable keeps the graph of the gradient itself. Padding has no gradient.
    """
    chosen = logits.gather(1, label[:, None]).sum()
    own = torch.autograd.grad(chosen, inputs, create_graph=differentiable, retain_graph=True)[0].float()
    return F.normalize(own.flatten(1), dim=-1).view_as(own)


def gradient_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b || g_s - g_t ||^2 of normalised input gradients [B, L, D] (`input_gradient`), c = the teacher's label.

    Derivative matching (Czarnecki et al. 2017, arXiv 1706.04859; Srinivas & Fleuret 2018, arXiv 1803.00443, eq. 7).
    EXPERIMENTAL: it differentiates twice, 2.5 to 3 times the step. Raises ValueError for gradients of different shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"input gradients {list(student.shape)} (student) and {list(teacher.shape)} (teacher): derivatives can "
            "only be matched for equal embeddings' widths and the same tokens"
        )
    return (student - teacher.detach()).square().sum((1, 2)).mean()


def activation_boundaries(student: Tensor, teacher: Tensor, mask: Tensor, margin: float = 1.0) -> Tensor:
    """mean over real tokens and neurons of rho max(0, mu - s)^2 + (1 - rho) max(0, mu + s)^2, a scalar.

    s is a neuron's response before its activation function, rho = 1 where the teacher's is above 0 and mu the margin:
    the student's neurons should be on where the teacher's are, whatever their size (Heo et al. 2019, arXiv 1811.03233,
    eq. 3). Transformers have no ReLU networks; here the boundary of GELU and SiLU is taken at 0 too. Args: student
    [B, L, F], projected to the teacher's neurons where they differ in number; teacher [B, L, F], of which only the
    signs are read; mask [B, L]. Raises ValueError for other shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"neurons {list(student.shape)} (student) and {list(teacher.shape)} (teacher): project the student's to "
            "the teacher's"
        )
    side = torch.where(teacher.detach() > 0, 1.0, -1.0)
    squares = F.relu(margin - side * student).square() * mask[..., None]
    return squares.sum() / (mask.sum() * student.shape[-1]).clamp(min=1)
