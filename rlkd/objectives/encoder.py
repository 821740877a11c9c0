"""Terms of Tree Knowledge Distillation for encoder-only classifiers: one distance with token selections.

    L = w_ce CE + w_kd KD + beta PT + gamma_s TD(student tree) + gamma_t TD(teacher tree) + gamma_r TD(random) + eta ALL

Which terms a method has is in `trainers.encoders.terms`; those of other papers are in `neighbours`.
Sources: TKD (Xu, Ji, Xie; eqs 1-10 and Table 1), KD (Hinton et al. 2015, arXiv 1503.02531), PKD (Sun et al. 2019, arXiv
1908.09355). Shapes as in `attention_tree`; C labels. Gradients flow to the student only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice
from ..tensors import masked_mean
from .divergences import forward_kl

DistanceReduction = Literal["mean", "sum"]


def weighted_terms(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """weight x term for every scalar of `terms` []; the loss is their sum."""
    return {name: weights[name] * value for name, value in terms.items()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE = mean over labelled rows of -log softmax(z)[label], a scalar; logits [B, C], labels [B], negative = none.

    0 if no row of the batch has a label (a transfer set, trained on the teacher alone).
    """
    labelled = labels >= 0
    return masked_mean(F.cross_entropy(logits, labels.clamp(min=0), reduction="none"), labelled)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KD = T^2 mean_b KL(softmax(z_t / T) || softmax(z_s / T)), a scalar, nats; logits [B, C] (eq. 2).

    Less the teacher's entropy it is the cross-entropy with soft targets; T^2 keeps its gradient's size at any T.
    """
    return temperature**2 * forward_kl(student / temperature, teacher.detach() / temperature).mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """BCE = mean over labelled rows and over labels of -y log s(z) - (1 - y) log s(-z), a scalar; s is the sigmoid.

    logits [B, C], labels [B, C], 1 for each label that a row has and 0 for the others, NaN in a row whose labels are
    not known. 0 if those of no row of the batch are.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num().to(logits.dtype), reduction="none")
    return masked_mean(losses, ~labels.isnan())


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KD = T^2 mean over rows and labels of KL(Bernoulli(s(z_t / T)) || Bernoulli(s(z_s / T))), a scalar, nats;
    logits [B, C], of which each label is a question of its own.

    Summed over the labels it is the divergence of distributions over sets of labels; the mean over them goes with that
    of `binary_cross_entropy`. A Bernoulli with logit z is the softmax of (z, 0).
    """
    own, theirs = (torch.stack([z / temperature, torch.zeros_like(z)], dim=-1) for z in (student, teacher.detach()))
    return temperature**2 * forward_kl(own, theirs).mean()


def squared_error(outputs: Tensor, numbers: Tensor) -> Tensor:
    """MSE = mean over labelled rows of (z - y)^2, a scalar; outputs [B, 1], numbers y [B], NaN where there is none.

    0 if no row of the batch has a number.
    """
    squares = (outputs[:, 0] - numbers.nan_to_num()).square()  # in float32, also of a bf16 output
    return masked_mean(squares, ~numbers.isnan())


def token_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    normalise: bool = True,
    reduction: DistanceReduction = "mean",
) -> Tensor:
    """Squared distance of hidden states over selected tokens and head slices, a scalar (eqs 6, 7 and 10).

        sum_k sum_{b,h,p} counts_k[b,h,p] || n(s_k[b,p,h]) - n(t_k[b,p,h]) ||^2   ( / (sum of counts x d) for the mean )

    s[b,p,h] is dims [h d, (h+1) d) of the layer's output and n divides it by its L2 norm (the identity unless
    `normalise`; PKD's best runs on MNLI, QQP and RTE went without). Each node costs at most 4, or 4/d in the mean.
    Args: student, teacher, layers of [B, L, D] with the same D; counts, a selection [B, H, L] for each, where H = 1
    compares whole vectors. Raises ValueError if H does not divide D, or the widths differ.
    """
    check_choice("reduction", reduction, DistanceReduction)
    total: Tensor | float = 0.0
    elements: Tensor | float = 0.0
    for s, t, count in zip(student, teacher, counts, strict=True):
        heads, width = count.shape[1], t.shape[-1]
        if s.shape[-1] != width or width % heads:
            raise ValueError(
                f"hidden states of width {s.shape[-1]} (student) and {width} (teacher) in {heads} head slices: widths "
                "must agree (project the student's) and be a multiple of the heads"
            )
        # The teacher's states carry no gradient; each head's slice is normalised on its own.
        s, t = s.unflatten(-1, (heads, -1)), t.detach().unflatten(-1, (heads, -1))  # [B, L, H, d]
        if normalise:
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        squares = (s - t).square().sum(-1).transpose(1, 2)
        total = total + (squares * count).sum()
        elements = elements + count.sum() * (width // heads)
    if reduction == "sum":
        return torch.as_tensor(total)
    return total / torch.as_tensor(elements).clamp(min=1)
