"""Token-level divergences between a teacher p and a student pi, for distillation on given prefixes.

Every function takes logits [N, V] over the same valid ids and returns [N], nats; gradients flow to the student only.
Sources: word-level KD (Kim & Rush 2016), GKD (Agarwal et al. 2024, arXiv 2306.13649), f-distill (Wen et al. 2023,
arXiv 2307.15190), skew KL (Ko et al. 2024, arXiv 2402.03898).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .closed_form import closed_form


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence and the parameters it takes, by name, with their defaults.

    function  (student logits [n, V], teacher logits [n, V], **parameters) -> [n]
    """

    function: Callable[..., Tensor]
    parameters: tuple[tuple[str, float], ...] = ()

    def __call__(
        self, student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **parameters: float | None
    ) -> Tensor:
        """T^2 D(p_T, pi_T), [n], with both softmaxes at temperature T (Hinton et al. 2015, arXiv 1503.02531, sec. 2.1).

        A parameter that is None has its default. Args: student, teacher [n, V].
        """
        given = {name: value for name, value in parameters.items() if value is not None}
        values = self.function(student / temperature, teacher / temperature, **{**dict(self.parameters), **given})
        return temperature**2 * values


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(p || pi) = sum_a p (log p - log pi)."""
    return closed_form(_forward_kl, _forward_kl_gradient, student, teacher)[0]


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return ((log_p - log_pi).mul_(log_p.exp_()).sum(-1),)


def _forward_kl_gradient(grads: tuple[Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """pi - p."""
    return student.softmax(-1).sub_(teacher.softmax(-1)).mul_(grads[0][:, None])


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(pi || p) = sum_a pi (log pi - log p)."""
    return closed_form(_reverse_kl, _reverse_kl_gradient, student, teacher)[0]


def _reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return ((log_pi - log_p).mul_(log_pi.exp_()).sum(-1),)


def _reverse_kl_gradient(grads: tuple[Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """pi (log pi - log p - KL(pi || p))."""
    log_pi = student.log_softmax(-1)
    apart = log_pi - teacher.log_softmax(-1)
    pi = log_pi.exp_()
    mean = (pi * apart).sum(-1, keepdim=True)
    return pi.mul_(apart.sub_(mean).mul_(grads[0][:, None]))


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(w a + (1 - w) b) for 0 < w < 1."""
    log_weights = torch.tensor([weight_a, 1 - weight_a], dtype=log_a.dtype, device=log_a.device).log()
    return torch.logaddexp(log_a + log_weights[0], log_b + log_weights[1])


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[N]: beta KL(p || m) + (1 - beta) KL(pi || m), m = beta p + (1 - beta) pi, 0 < beta < 1 (GKD eq. 3)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = _log_mixture(log_p, log_pi, beta)
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_pi.exp() * (log_pi - log_m)).sum(-1)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: 1/2 sum_a |p - pi|."""
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """[N]: KL(p || alpha p + (1 - alpha) pi), 0 < alpha < 1 (DistiLLM eq. 4)."""
    log_p, log_pi = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_pi, alpha))).sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl),
    "reverse_kl": Divergence(reverse_kl),
    "jensen_shannon": Divergence(jensen_shannon, (("beta", 0.5),)),
    "total_variation": Divergence(total_variation),
    "skew_forward_kl": Divergence(skew_forward_kl, (("alpha", 0.1),)),
}
