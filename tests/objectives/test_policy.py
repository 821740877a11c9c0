import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import ConfigError
from rlkd.objectives.advantages import discounted_sum
from rlkd.objectives.policy import (
    adapt_kl_coef,
    expected_log_reference,
    kl_k1,
    kl_k2,
    kl_k3,
    ppo_loss,
    reduce_tokens,
    reduction_count,
    reinforce_loss,
    token_statistics,
    token_weights,
    value_loss,
)
from rlkd.objectives.rewards import induced_advantage
from trees import build_tree, random_policy, random_q

REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum"]
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


def grid(seed):
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_statistics_against_plain_python():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logps, entropy = token_statistics(logits, torch.tensor([4, 0, 2]))
    for i, (row, a) in enumerate(zip(logits.tolist(), [4, 0, 2], strict=True)):
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        assert float(logps[i]) == pytest.approx(math.log(p[a]))
        assert float(entropy[i]) == pytest.approx(-sum(x * math.log(x) for x in p))


def test_token_entropies_add_up_to_the_entropy_of_answers():
    """Chain rule on an enumerated policy: E[sum_t H(pi(.|s_t))] = H(pi)."""
    tree = build_tree(3, 4)
    policy = random_policy(tree, 3, seed=0)
    _, entropy = token_statistics(policy.logits.detach(), torch.zeros(len(tree.prefixes), dtype=torch.long))
    pi = policy.probabilities().detach()
    assert float((pi * tree.along(entropy).sum(1)).sum()) == pytest.approx(float(-(pi * pi.log()).sum()), abs=1e-12)


# -- REINFORCE and PPO ---------------------------------------------------------------------------------------------


def test_reinforce_gradient_is_minus_weight_times_advantage():
    logps, advantages, weights = (grid(i).requires_grad_() for i in range(3))
    reinforce_loss(logps, advantages, weights).sum().backward()
    torch.testing.assert_close(logps.grad, -(weights * advantages).detach())
    assert advantages.grad is None
    assert weights.grad is None


def test_ppo_without_clipping_has_the_gradient_of_reinforce_at_the_first_update():
    """METHOD check 10, through a policy with shared parameters: ratio = 1 and an infinite clip range."""
    tree = build_tree(3, 4)
    policy = random_policy(tree, 3, seed=0)
    scores = tree.scores(random_q(tree, 3, seed=0))
    advantages = discounted_sum(induced_advantage(scores), tree.mask, 1.0)
    logps = policy.logps()
    losses = [
        ppo_loss(logps, logps.detach(), advantages, clip_range=math.inf),
        reinforce_loss(logps, advantages, torch.ones_like(advantages)),
    ]
    gradients = [
        torch.autograd.grad(reduce_tokens(x, tree.mask, "token_mean"), policy.theta, retain_graph=True)[0]
        for x in losses
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_ppo_gradient_at_ratio_one_does_not_feel_a_finite_clip():
    logps, advantages = grid(0).requires_grad_(), grid(1)
    ppo_loss(logps, logps.detach(), advantages, clip_range=0.2).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.5, 2.0, True), (0.5, 2.0, False), (1.5, -2.0, False), (0.5, -2.0, True), (1.1, 2.0, False), (0.9, -2.0, False)],
)
def test_ppo_gradient_vanishes_exactly_where_the_clip_binds(ratio, advantage, clipped):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = ppo_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), clip_range=0.2)
    loss.sum().backward()
    bound = 1.2 if ratio > 1 else 0.8
    assert float(loss.detach()) == pytest.approx(-advantage * (bound if clipped else ratio))
    assert float(logps.grad) == pytest.approx(0.0 if clipped else -advantage * ratio)


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.1, 2.9, 3.1, 50.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.5])
def test_dual_clip_bounds_the_loss_of_negative_advantages_alone(ratio, advantage):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    values = (logps, torch.zeros(1, 1), torch.tensor([[advantage]]))
    loss = ppo_loss(*values, clip_range=0.2, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    free = ppo_loss(*values, clip_range=0.2)
    if advantage > 0 or ratio < 3:
        torch.testing.assert_close(loss, free)
        torch.testing.assert_close(gradient, torch.autograd.grad(free.sum(), logps)[0])
    else:
        assert float(loss.detach()) == pytest.approx(6.0)
        assert float(free.detach()) > 6
        assert float(gradient) == 0


def test_value_loss_takes_the_worse_of_the_free_and_the_clipped_error():
    values, old, returns = (x.requires_grad_(i == 0) for i, x in enumerate(grid(s) for s in range(3)))
    loss = value_loss(values, old, returns, clip_range=0.3)
    loss.sum().backward()
    for i in np.ndindex(*MASK.shape):
        v, o, r = float(values[i].detach()), float(old[i]), float(returns[i])
        c = min(max(v, o - 0.3), o + 0.3)
        assert float(loss[i].detach()) == pytest.approx(max((v - r) ** 2, (c - r) ** 2) / 2)
        free = (v - r) ** 2 >= (c - r) ** 2
        assert float(values.grad[i]) == pytest.approx(v - r if free else 0.0)
    torch.testing.assert_close(value_loss(values, old, returns, math.inf), (values - returns).square() / 2)


# -- KL to the initial student -------------------------------------------------------------------------------------


def test_both_kl_estimates_have_the_enumerated_kl_as_expectation():
    """sum over answers of pi(y) sum_t k(s_t, a_t) = KL(pi || pi_0), and k3 is never negative."""
    tree = build_tree(3, 4)
    policy, reference = random_policy(tree, 3, seed=0), random_policy(tree, 3, seed=1)
    pi, pi_0 = policy.probabilities().detach().numpy(), reference.probabilities().detach().numpy()
    kl = (pi * np.log(pi / pi_0)).sum()
    logps, reference_logps = policy.logps().detach(), reference.logps().detach()
    for estimate in (kl_k1, kl_k3):
        per_answer = (estimate(logps, reference_logps) * tree.mask).sum(1).numpy()
        assert (pi * per_answer).sum() == pytest.approx(kl, abs=1e-12)
    assert (kl_k3(logps, reference_logps) >= 0).all()
    assert (kl_k1(logps, reference_logps) < 0).any()
    assert not kl_k3(logps, logps).any()


def gradients_of_the_kl():
    """The gradient of sum_y pi(y) sum_t KL_t(theta) with pi(y), which decides the states, held fixed: of each direction
    of the KL by autograd over the actions, and of each estimate from sampled actions.
    """
    tree = build_tree(3, 4)
    policy, reference = random_policy(tree, 3, seed=0), random_policy(tree, 3, seed=1)
    pi, log_0 = policy.probabilities().detach(), reference.logits.detach().log_softmax(-1)
    logps, log_pi = policy.logps(), policy.logits.log_softmax(-1)
    _, entropy = token_statistics(policy.logits, torch.zeros(len(tree.prefixes), dtype=torch.long))
    estimates = {name: estimate(logps, tree.along(log_0)) for name, estimate in ESTIMATES.items()}
    divergences = {
        "KL(pi || pi_0)": tree.along((log_pi.exp() * (log_pi - log_0)).sum(-1)),
        "KL(pi_0 || pi)": tree.along((log_0.exp() * (log_0 - log_pi)).sum(-1)),
        "exact": tree.along(-entropy - expected_log_reference(policy.logits, reference.logits.detach())),
    }
    torch.testing.assert_close(divergences["exact"], divergences["KL(pi || pi_0)"])
    return {
        name: torch.autograd.grad((pi[:, None] * x * tree.mask).sum(), policy.theta, retain_graph=True)[0]
        for name, x in {**estimates, **divergences}.items()
    }


ESTIMATES = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def test_the_exact_term_and_k2_have_the_gradient_of_the_kl_and_k1_and_k3_have_not():
    found = gradients_of_the_kl()
    right, wrong = found["KL(pi || pi_0)"], found["KL(pi_0 || pi)"]
    assert float((right - wrong).abs().max()) > 0.1
    for name in ("exact", "k2"):
        torch.testing.assert_close(found[name], right, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k3"], wrong, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k1"], torch.zeros_like(right), rtol=0, atol=1e-12)


@given(st.floats(0, 100), st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_adaptive_coefficient_moves_towards_the_target_by_two_percent_at_most(kl, target):
    new = adapt_kl_coef(0.5, kl, target)
    assert 0.5 * 0.98 - 1e-12 <= new <= 0.5 * 1.02 + 1e-12
    assert (new > 0.5) == (kl > target) or new == pytest.approx(0.5)
    if 0.8 <= kl / target <= 1.2:
        assert new == pytest.approx(0.5 * (1 + 0.1 * (kl / target - 1)))


# -- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_by_loops_and_padding_never_counts(reduction):
    loss = torch.where(MASK, grid(0), torch.nan)
    rows = [row[:n] for row, n in zip(loss.tolist(), MASK.sum(1).tolist(), strict=True) if n]
    want = {
        "token_mean": sum(sum(r) for r in rows) / sum(len(r) for r in rows),
        "sequence_mean": sum(sum(r) / len(r) for r in rows) / len(rows),
        "sequence_sum": sum(sum(r) for r in rows) / len(rows),
    }[reduction]
    assert float(reduce_tokens(loss, MASK, reduction)) == pytest.approx(want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_halves_with_the_global_denominator_add_up_to_the_whole(reduction):
    loss = grid(1)
    denominator = sum(reduction_count(MASK[half], reduction) for half in (slice(0, 1), slice(1, 4)))
    halves = [reduce_tokens(loss[half], MASK[half], reduction, denominator) for half in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(halves), reduce_tokens(loss, MASK, reduction))


def test_sequence_mean_weights_rows_equally_and_token_mean_tokens():
    torch.testing.assert_close(token_weights(MASK, "sequence_mean").sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(token_weights(MASK, "token_mean"), MASK.float())


def test_padding_gets_no_gradient():
    loss = grid(2).requires_grad_()
    reduce_tokens(loss, MASK, "sequence_mean").backward()
    assert not loss.grad[~MASK].any()
    assert (loss.grad[MASK] > 0).all()


def test_nothing_valid_gives_zero_and_unknown_reductions_are_refused():
    nothing = torch.zeros_like(MASK)
    assert all(float(reduce_tokens(grid(0), nothing, r)) == 0 for r in REDUCTIONS)
    with pytest.raises(ConfigError, match="reduction = 'mean'"):
        token_weights(MASK, "mean")
