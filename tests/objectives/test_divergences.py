import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.objectives.divergences import (
    DIVERGENCES,
    alpha_beta,
    best_token,
    forward_kl,
    jensen_shannon,
    merged_events,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

# Cross-entropies, not divergences: they sharpen a student that equals the teacher.
CROSS_ENTROPIES = {"best_token"}

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def pair(seed, rows=3, vocab=6):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(-1)


def ab_by_hand(p, pi, a, b):
    """ABKD's definition for a, b > 0."""
    terms = p**a * pi**b - a / (a + b) * p ** (a + b) - b / (a + b) * pi ** (a + b)
    return -terms.sum(-1) / (a * b)


def by_hand(name, student, teacher):
    """Each divergence from its definition on probabilities, in NumPy."""
    pi, p = softmax(np.asarray(student)), softmax(np.asarray(teacher))
    half = 0.5 * p + 0.5 * pi
    return {
        "forward_kl": lambda: kl(p, pi),
        "reverse_kl": lambda: kl(pi, p),
        "jensen_shannon": lambda: 0.5 * kl(p, half) + 0.5 * kl(pi, half),
        "total_variation": lambda: 0.5 * np.abs(p - pi).sum(-1),
        "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * pi),
        "skew_reverse_kl": lambda: kl(pi, 0.1 * pi + 0.9 * p),
        "alpha_beta": lambda: ab_by_hand(p, pi, 0.2, 0.7),
        "best_token": lambda: -np.log(pi[np.arange(len(p)), p.argmax(-1)]),
    }[name]()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seeds)
@few
def test_values_against_numpy(name, seed):
    student, teacher = pair(seed)
    np.testing.assert_allclose(DIVERGENCES[name](student, teacher).numpy(), by_hand(name, student, teacher), atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_student_gradient_against_finite_differences_of_the_numpy_formula(name):
    student, teacher = pair(0)
    student.requires_grad_()
    DIVERGENCES[name](student, teacher).sum().backward()
    base, step = student.detach().numpy(), 1e-6
    for i in np.ndindex(*base.shape):
        up, down = base.copy(), base.copy()
        up[i] += step
        down[i] -= step
        slope = (by_hand(name, up, teacher).sum() - by_hand(name, down, teacher).sum()) / (2 * step)
        assert float(student.grad[i]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in CROSS_ENTROPIES])
@given(seeds)
@few
def test_divergences_are_zero_only_for_equal_distributions(name, seed):
    student, teacher = pair(seed)
    divergence = DIVERGENCES[name]
    assert (divergence(student, teacher) > 1e-6).all()
    # The same distribution in another gauge.
    torch.testing.assert_close(divergence(teacher + 3.0, teacher), torch.zeros(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in CROSS_ENTROPIES])
def test_a_student_that_equals_the_teacher_has_no_gradient(name):
    _, teacher = pair(4)
    student = teacher.clone().requires_grad_()
    DIVERGENCES[name](student, teacher).sum().backward()
    assert float(student.grad.abs().max()) < 1e-15


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_has_no_gradient(name):
    student, teacher = (logits.clone().requires_grad_() for logits in pair(5))
    DIVERGENCES[name](student, teacher).sum().backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_cannot_follow_are_as_if_they_were_not_there(name):
    """Logits of -inf in both: values and gradients are those of the smaller vocabulary."""
    small = [logits.clone().requires_grad_() for logits in pair(6, vocab=4)]
    apart = torch.full((3, 2), -torch.inf, dtype=torch.float64)
    large = [torch.cat([logits.detach(), apart], 1).requires_grad_() for logits in small]
    for logits in (small, large):
        DIVERGENCES[name](*logits).sum().backward()
    torch.testing.assert_close(DIVERGENCES[name](*large), DIVERGENCES[name](*small))
    torch.testing.assert_close(large[0].grad[:, :4], small[0].grad)
    assert (large[0].grad[:, 4:] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("forbids", ["student", "teacher"])
def test_a_token_that_only_one_may_give_leaves_all_finite(name, forbids):
    student, teacher = (logits.float() for logits in pair(7))
    (student if forbids == "student" else teacher)[:, 0] = -torch.inf
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@given(seeds)
@few
def test_symmetries_and_bounds(seed):
    student, teacher = pair(seed)
    torch.testing.assert_close(jensen_shannon(student, teacher, 0.5), jensen_shannon(teacher, student, 0.5))
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student))
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    assert ((total_variation(student, teacher) >= 0) & (total_variation(student, teacher) <= 1)).all()
    assert (jensen_shannon(student, teacher, 0.5) <= np.log(2)).all()


def test_disjoint_supports_stay_finite():
    """Far-apart logits: total variation 1, Jensen-Shannon log 2, no inf or nan in the bounded ones."""
    student, teacher = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    assert float(total_variation(student, teacher)) == pytest.approx(1)
    assert float(jensen_shannon(student, teacher, 0.5)) == pytest.approx(np.log(2))
    assert float(skew_forward_kl(student, teacher, 0.1)) == pytest.approx(np.log(10), rel=1e-6)
    assert float(reverse_kl(student, teacher)) == pytest.approx(200, rel=1e-6)


@given(seeds)
@few
def test_alpha_beta_between_and_at_its_limits(seed):
    """(1, 0) and (0, 1) are the two KL divergences, approached continuously; exchanging models exchanges exponents."""
    student, teacher = pair(seed)
    torch.testing.assert_close(alpha_beta(student, teacher, 1.0, 0.0), forward_kl(student, teacher))
    torch.testing.assert_close(alpha_beta(student, teacher, 0.0, 1.0), reverse_kl(student, teacher))
    for a, b in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.3)):
        near = alpha_beta(student, teacher, max(a, 1e-6), max(b, 1e-6))
        torch.testing.assert_close(alpha_beta(student, teacher, a, b), near, rtol=1e-4, atol=1e-6)
    for a, b in ((0.3, 0.5), (0.4, 0.0)):
        torch.testing.assert_close(alpha_beta(student, teacher, a, b), alpha_beta(teacher, student, b, a))
    pi, p = softmax(student.numpy()), softmax(teacher.numpy())
    squared_hellinger = 2 * ((np.sqrt(p) - np.sqrt(pi)) ** 2).sum(-1)
    np.testing.assert_allclose(alpha_beta(student, teacher, 0.5, 0.5).numpy(), squared_hellinger, atol=1e-12)


def test_alpha_beta_limits_have_the_limits_gradient():
    student, teacher = pair(8)
    for a, b in ((0.4, 0.0), (0.0, 0.3)):
        grads = []
        for at in ((a, b), (max(a, 1e-6), max(b, 1e-6))):
            own = student.clone().requires_grad_()
            alpha_beta(own, teacher, *at).sum().backward()
            grads.append(own.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_skew_reverse_kl_is_the_skew_forward_kl_of_the_models_exchanged():
    student, teacher = pair(9)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 0.3), skew_forward_kl(teacher, student, 0.3))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 1e-9), reverse_kl(student, teacher))
    assert (skew_reverse_kl(student, teacher, 0.1) <= -np.log(0.1)).all()


def test_best_token_is_the_cross_entropy_of_a_one_hot_teacher():
    student, teacher = pair(10)
    one_hot = 1e3 * torch.nn.functional.one_hot(teacher.argmax(-1), teacher.shape[-1])
    torch.testing.assert_close(best_token(student, teacher), forward_kl(student, one_hot.double()))


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jensen_shannon_weights_the_two_terms_by_beta(beta):
    student, teacher = pair(1)
    pi, p = softmax(student.numpy()), softmax(teacher.numpy())
    m = beta * p + (1 - beta) * pi
    want = beta * kl(p, m) + (1 - beta) * kl(pi, m)
    np.testing.assert_allclose(jensen_shannon(student, teacher, beta).numpy(), want, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "parameter", "default"),
    [("jensen_shannon", "beta", 0.5), ("skew_forward_kl", "alpha", 0.1), ("skew_reverse_kl", "alpha", 0.1)],
)
def test_parameters_are_settings_with_a_default(name, parameter, default):
    student, teacher = pair(2)
    divergence, function = DIVERGENCES[name], DIVERGENCES[name].function
    for value in (0.3, default):
        torch.testing.assert_close(
            divergence(student, teacher, **{parameter: value}), function(student, teacher, value)
        )
    for left_out in ({}, {parameter: None}):
        assert torch.equal(divergence(student, teacher, **left_out), function(student, teacher, default))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_softens_both_sides_and_keeps_the_scale_of_the_gradient(name):
    student, teacher = pair(3)
    want = 4.0 * by_hand(name, student.numpy() / 2, teacher.numpy() / 2)
    np.testing.assert_allclose(DIVERGENCES[name](student, teacher, temperature=2.0).numpy(), want, atol=1e-12)


# The teacher's most probable tokens, and the rest as one event

MERGING = [name for name, divergence in DIVERGENCES.items() if divergence.merges]


def merged_by_hand(logits, ids):
    """Probabilities of the tokens `ids` [N, K], and the sum of all others, as logits."""
    p = softmax(np.asarray(logits))
    known = np.take_along_axis(p, np.asarray(ids), -1)
    return np.log(np.concatenate([known, 1 - known.sum(-1, keepdims=True)], -1))


def recorded(teacher, k):
    logps, ids = teacher.log_softmax(-1).topk(k)
    return ids, logps


@pytest.mark.parametrize("name", MERGING)
@given(seeds, st.integers(1, 5))
@few
def test_the_rest_counts_as_one_event(name, seed, k):
    """Against NumPy; merging never raises an f-divergence, and finer events never lower it."""
    student, teacher = pair(seed)
    ids, logps = recorded(teacher, k)
    got = DIVERGENCES[name](*merged_events(student, ids, logps))
    want = by_hand(name, merged_by_hand(student, ids), merged_by_hand(teacher, ids))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-9)
    finer = [DIVERGENCES[name](*merged_events(student, *recorded(teacher, n))) for n in (k, k + 1, 6)]
    assert (finer[0] <= finer[1] + 1e-9).all()
    assert (finer[1] <= finer[2] + 1e-9).all()
    torch.testing.assert_close(finer[2], DIVERGENCES[name](student, teacher))


@pytest.mark.parametrize("name", MERGING)
def test_the_gradient_through_the_rest_against_finite_differences(name):
    student, teacher = pair(1)
    ids, logps = recorded(teacher, 2)
    student.requires_grad_()
    DIVERGENCES[name](*merged_events(student, ids, logps)).sum().backward()
    base, step, target = student.detach().numpy(), 1e-6, merged_by_hand(teacher, ids)
    for i in np.ndindex(*base.shape):
        up, down = base.copy(), base.copy()
        up[i] += step
        down[i] -= step
        values = [by_hand(name, merged_by_hand(logits, ids), target).sum() for logits in (up, down)]
        assert student.grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("name", MERGING)
def test_a_teacher_whose_recorded_tokens_have_all_the_mass(name):
    """Stored in float32 they sum to 1, give or take the last bit: the rest has no probability, and nothing is NaN."""
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids, logps = torch.tensor([[0, 3], [5, 1]]), torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log()
    value = DIVERGENCES[name](*merged_events(student, ids, logps))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
