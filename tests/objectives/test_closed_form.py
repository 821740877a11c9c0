"""Gradients in closed form against autograd of the definitions, in float64 and over several blocks of rows."""

import pytest
import torch
from torch.autograd import gradcheck

from rlkd.objectives import closed_form
from rlkd.objectives.closed_form import policy_terms
from rlkd.objectives.divergences import best_token, forward_kl, reverse_kl, total_variation
from rlkd.objectives.policy import entropy, expected_log_reference, token_logps, token_statistics
from rlkd.objectives.rewards import expected_advantage

N, V = 7, 5


@pytest.fixture(autouse=True)
def three_blocks(monkeypatch):
    """3 + 3 + 1 rows."""
    monkeypatch.setattr(closed_form, "CACHED_ELEMENTS", 3 * V)


def inputs(*shape):
    """Student and teacher logits [*shape, V], ids and teacher values [*shape]."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, *shape, V, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, shape, generator=generator)
    return student.requires_grad_(), teacher, ids, torch.randn(shape, generator=generator, dtype=torch.float64)


def definition(name, student, teacher, ids, value):
    """Each function from probabilities."""
    pi, p = student.exp() / student.exp().sum(-1, keepdim=True), teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    return {
        "log-probability": lambda: pi.log().gather(-1, ids[..., None]).squeeze(-1),
        "entropy": lambda: -(pi * pi.log()).sum(-1),
        "both": lambda: pi.log().gather(-1, ids[..., None]).squeeze(-1) - 3 * (pi * pi.log()).sum(-1),
        "log-probability alone": lambda: pi.log().gather(-1, ids[..., None]).squeeze(-1),
        "expected": lambda: (pi * teacher).sum(-1) - value,
        "expected log reference": lambda: (pi * p.log()).sum(-1),
        "terms": lambda: (
            pi.log().gather(-1, ids[..., None]).squeeze(-1)
            + 2 * (pi * teacher).sum(-1)
            - 2 * value
            - 5 * (pi * (pi / p).log()).sum(-1)
        ),
        "total_variation": lambda: (p - pi).abs().sum(-1) / 2,
        "best_token": lambda: -pi.log().gather(-1, p.argmax(-1)[..., None]).squeeze(-1),
        "forward_kl": lambda: (p * (p / pi).log()).sum(-1),
        "reverse_kl": lambda: (pi * (pi / p).log()).sum(-1),
    }[name]()


def terms(student, teacher, ids, value):
    """Log-probability, reward and KL of one policy gradient, in one pass: log pi + 2 E[A] - 5 KL(pi || p)."""
    calls = (expected_advantage, (teacher, value)), (entropy, ()), (expected_log_reference, (teacher,))
    logps, reward, of_entropy, log_reference = policy_terms(student, ids, *calls)
    return logps + 2 * reward + 5 * (of_entropy + log_reference)


CLOSED = {
    "log-probability alone": lambda student, teacher, ids, value: token_logps(student, ids)[0],
    "expected log reference": lambda student, teacher, ids, value: expected_log_reference(student, teacher),
    "terms": terms,
    "log-probability": lambda student, teacher, ids, value: token_statistics(student, ids)[0],
    "entropy": lambda student, teacher, ids, value: token_statistics(student, ids)[1],
    "both": lambda student, teacher, ids, value: sum(
        w * x for w, x in zip((1, 3), token_statistics(student, ids), strict=True)
    ),
    "expected": lambda student, teacher, ids, value: expected_advantage(student, teacher, value),
    "total_variation": lambda student, teacher, ids, value: total_variation(student, teacher),
    "best_token": lambda student, teacher, ids, value: best_token(student, teacher),
    "forward_kl": lambda student, teacher, ids, value: forward_kl(student, teacher),
    "reverse_kl": lambda student, teacher, ids, value: reverse_kl(student, teacher),
}


@pytest.mark.parametrize("shape", [(N,), (2, N), (0,)])
@pytest.mark.parametrize("name", CLOSED)
def test_values_and_gradients_are_those_of_the_definition(name, shape):
    arguments = inputs(*shape)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)[: shape[-1]].expand(shape)
    got, want = CLOSED[name](*arguments), definition(name, *arguments)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    slopes = [torch.autograd.grad((weights * x).sum(), arguments[0])[0] for x in (got, want)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CLOSED)
def test_gradients_pass_gradcheck(name):
    student, *others = inputs(N)
    assert gradcheck(lambda logits: CLOSED[name](logits, *others), (student,))


def test_the_inputs_are_left_as_they_were():
    """The gradients are computed in place, in tensors of their own."""
    arguments = inputs(N)
    before = [x.detach().clone() for x in arguments]
    for function in CLOSED.values():
        function(*arguments).sum().backward()
    for x, kept in zip(arguments, before, strict=True):
        assert torch.equal(x.detach(), kept)
