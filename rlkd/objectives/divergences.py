"""Token-level divergences between a teacher p and a student pi, for distillation on given prefixes.

Every function takes logits [N, V] over the same valid ids and returns [N], nats; gradients flow to the student only.
Sources: word-level KD (Kim & Rush 2016), GKD (Agarwal et al. 2024, arXiv 2306.13649), f-distill (Wen et al. 2023,
arXiv 2307.15190), skew KL (Ko et al. 2024, arXiv 2402.03898).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(p || pi) = sum_a p (log p - log pi)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_pi)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(pi || p) = sum_a pi (log pi - log p)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_p)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(w a + (1 - w) b) for 0 < w < 1."""
    log_weights = torch.tensor([weight_a, 1 - weight_a], dtype=log_a.dtype, device=log_a.device).log()
    return torch.logaddexp(log_a + log_weights[0], log_b + log_weights[1])


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """[N]: beta KL(p || m) + (1 - beta) KL(pi || m), m = beta p + (1 - beta) pi, 0 < beta < 1 (GKD eq. 3)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = _log_mixture(log_p, log_pi, beta)
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_pi.exp() * (log_pi - log_m)).sum(-1)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: 1/2 sum_a |p - pi|."""
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """[N]: KL(p || alpha p + (1 - alpha) pi), 0 < alpha < 1 (DistiLLM eq. 4)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_pi, alpha))).sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.5),
    "total_variation": total_variation,
    "skew_forward_kl": partial(skew_forward_kl, alpha=0.1),
}
