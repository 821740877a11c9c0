"""Token-level divergences between a teacher p and a student pi, for distillation on given prefixes.

Every function takes logits [N, V] over the same valid ids and returns [N], nats; gradients flow to the student only.
A token that cannot follow may have the logit -inf: its probability is 0, and 0 log 0 = 0.
Sources: word-level KD (Kim & Rush 2016), GKD (Agarwal et al. 2024, arXiv 2306.13649), f-distill (Wen et al. 2023,
arXiv 2307.15190), skew KL (DistiLLM, Ko et al. 2024, arXiv 2402.03898), alpha-beta divergence (ABKD, Wang et al. 2025,
arXiv 2505.04560), ImitKD (Lin et al. 2020, arXiv 2009.07253).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .closed_form import PolicyTerm, closed_form, policy_terms


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence and the parameters it takes, by name, with their defaults.

    function  (student logits [n, V], teacher logits [n, V], **parameters) -> [n]
    merges    whether tokens may be merged into one event (`merged_events`): an f-divergence, which merging never
              raises (data processing inequality)
    """

    function: Callable[..., Tensor]
    parameters: tuple[tuple[str, float], ...] = ()
    merges: bool = False

    def __call__(
        self, student: Tensor, teacher: Tensor, *, temperature: float = 1.0, **parameters: float | None
    ) -> Tensor:
        """T^2 D(p_T, pi_T), [n], with both softmaxes at temperature T (Hinton et al. 2015, arXiv 1503.02531, sec. 2.1).

        A parameter that is None has its default. Args: student, teacher [n, V].
        """
        given = {name: value for name, value in parameters.items() if value is not None}
        parameters = {**dict(self.parameters), **given}
        if temperature == 1:
            return self.function(student, teacher, **parameters)
        return temperature**2 * self.function(student / temperature, teacher / temperature, **parameters)


# log 0, finite so that 0 log 0 is 0 and not NaN; exp of it is 0 in float32 and float64.
LOG_ZERO = -1e4


def log_probs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """log pi and log p of logits [N, V], at least `LOG_ZERO`; only log pi has a gradient."""
    return student.log_softmax(-1).clamp(min=LOG_ZERO), teacher.detach().log_softmax(-1).clamp(min=LOG_ZERO)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(p || pi) = sum_a p (log p - log pi)."""
    return closed_form(_forward_kl, _forward_kl_gradient, student, teacher)[0]


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    log_pi, log_p = log_probs(student, teacher)
    return ((log_p - log_pi).mul_(log_p.exp_()).sum(-1),)


def _forward_kl_gradient(grads: tuple[Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """pi - p."""
    return student.softmax(-1).sub_(teacher.softmax(-1)).mul_(grads[0][:, None])


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: KL(pi || p) = sum_a pi (log pi - log p)."""
    return closed_form(_reverse_kl, _reverse_kl_gradient, student, teacher)[0]


def _reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    log_pi, log_p = log_probs(student, teacher)
    return ((log_pi - log_p).mul_(log_pi.exp_()).sum(-1),)


def _reverse_kl_gradient(grads: tuple[Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """pi (log pi - log p - KL(pi || p))."""
    log_pi, log_p = log_probs(student, teacher)
    apart = log_pi - log_p
    pi = log_pi.exp_()
    mean = (pi * apart).sum(-1, keepdim=True)
    return pi.mul_(apart.sub_(mean).mul_(grads[0][:, None]))


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(w a + (1 - w) b) for 0 < w < 1."""
    log_weights = torch.tensor([weight_a, 1 - weight_a], dtype=log_a.dtype, device=log_a.device).log()
    return torch.logaddexp(log_a + log_weights[0], log_b + log_weights[1])


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[N]: beta KL(p || m) + (1 - beta) KL(pi || m), m = beta p + (1 - beta) pi, 0 < beta < 1 (GKD eq. 3)."""
    log_pi, log_p = log_probs(student, teacher)
    log_m = _log_mixture(log_p, log_pi, beta)
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_pi.exp() * (log_pi - log_m)).sum(-1)


def _apart(log_pi: Tensor, teacher: Tensor) -> Tensor:
    """pi - p, [N, V]; exactly 0 where both logits are the same."""
    return log_pi.exp().sub_(teacher.log_softmax(-1).exp_())


# [N]: 1/2 sum_a |p - pi|, of logits of student and teacher.
total_variation = PolicyTerm(
    value=lambda log_pi, pi, teacher: 0.5 * _apart(log_pi, teacher).abs_().sum(-1),
    add_slope=lambda total, weight, log_pi, teacher: total.addcmul_(_apart(log_pi, teacher).sign_(), weight, value=0.5),
)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """[N]: KL(p || alpha p + (1 - alpha) pi), 0 < alpha < 1 (DistiLLM eq. 4)."""
    log_pi, log_p = log_probs(student, teacher)
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_pi, alpha))).sum(-1)


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """[N]: KL(pi || alpha pi + (1 - alpha) p), 0 < alpha < 1 (DistiLLM, sec. 3.1)."""
    log_pi, log_p = log_probs(student, teacher)
    return (log_pi.exp() * (log_pi - _log_mixture(log_pi, log_p, alpha))).sum(-1)


def alpha_beta(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """[N]: -1/(ab) sum_a [p^a pi^b - a/(a+b) p^(a+b) - b/(a+b) pi^(a+b)] (ABKD), a = alpha, b = beta.

    a, b >= 0 and not both 0. By continuity sum_a [p^a log(p/pi) - (p^a - pi^a)/a] / a for b = 0, which is KL(p || pi)
    at a = 1, and the same with p and pi exchanged for a = 0, which is KL(pi || p) at b = 1.
    """
    log_pi, log_p = log_probs(student, teacher)
    if beta == 0:
        return _alpha_beta_limit(log_p, log_pi, alpha)
    if alpha == 0:
        return _alpha_beta_limit(log_pi, log_p, beta)
    a, b, both = alpha, beta, alpha + beta
    cross = (a * log_p + b * log_pi).exp()
    own = a / both * (both * log_p).exp() + b / both * (both * log_pi).exp()
    return (own - cross).sum(-1) / (a * b)


def _alpha_beta_limit(log_a: Tensor, log_b: Tensor, power: float) -> Tensor:
    """[N]: sum [A^c log(A/B) - (A^c - B^c)/c] / c for log A, log B [N, V] and c = power."""
    a, b = (power * log_a).exp(), (power * log_b).exp()
    return (a * (log_a - log_b) - (a - b) / power).sum(-1) / power


def best_token(student: Tensor, teacher: Tensor) -> Tensor:
    """[N]: -log pi(argmax_a p), cross-entropy to the teacher's most probable token (ImitKD). Not 0 for pi = p."""
    return -policy_terms(student, teacher.argmax(-1))[0]


def merged_events(student: Tensor, ids: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher as distributions over K + 1 events, logits [N, K + 1] each: K tokens, and all others as one.

    Args: student, logits [N, V]; ids [N, K] and logps [N, K], the K most probable tokens of the teacher and their
    log-probabilities, whose rest is the last event's. With K = V there is no rest: the events are the tokens.
    """
    known = student.gather(-1, ids)
    if ids.shape[-1] == student.shape[-1]:
        return known, logps
    rest = student.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    # Stored in float32, the probabilities may sum to a little more than 1.
    mass = (1 - logps.double().exp().sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([known, rest], -1), torch.cat([logps, mass.log().to(logps.dtype)], -1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, merges=True),
    "reverse_kl": Divergence(reverse_kl, merges=True),
    "jensen_shannon": Divergence(jensen_shannon, (("beta", 0.5),), merges=True),
    "total_variation": Divergence(total_variation, merges=True),
    "skew_forward_kl": Divergence(skew_forward_kl, (("alpha", 0.1),), merges=True),
    "skew_reverse_kl": Divergence(skew_reverse_kl, (("alpha", 0.1),), merges=True),
    # Of the authors' scripts for GPT-2 students (github.com/ghwang-s/abkd, scripts/gpt2/ab: a = 0.2, a + b = 0.9).
    "alpha_beta": Divergence(alpha_beta, (("alpha", 0.2), ("beta", 0.7))),
    "best_token": Divergence(best_token),
}
