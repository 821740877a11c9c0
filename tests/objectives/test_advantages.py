import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.objectives.advantages import (
    BASELINES,
    CreditInputs,
    discounted_sum,
    explained_variance,
    importance_weights,
    leave_one_out,
    length_normalised_sum,
    per_decision,
    price_of_stopping,
    regret_per_sequence,
    value_gain,
)
from rlkd.objectives.rewards import induced_advantage, induced_reward, teacher_value
from trees import build_tree, random_q

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def batch(seed, rows=4, width=6):
    """Two random grids [B, R] in float64, with garbage at padding, and a right-padded mask."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return x, y, torch.arange(width)[None] < lengths[:, None]


@given(seeds, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([1, 2, 3]))
@few
def test_discounted_sum_is_the_sum_over_every_stride_th_later_token(seed, decay, stride):
    x, _, mask = batch(seed)
    got = discounted_sum(x, mask, decay, stride)
    for b, t in np.ndindex(*x.shape):
        later = range(t, int(mask[b].sum()), stride)
        want = sum(decay ** (k - t) * float(x[b, k]) for k in later)
        assert float(got[b, t]) == pytest.approx(want, abs=1e-12)


def test_stride_one_is_the_full_return_and_a_stride_beyond_the_row_the_immediate_term():
    x, _, mask = batch(0)
    full = (x * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(discounted_sum(x, mask, 1.0, stride=1), full)
    for stride in (x.shape[1], x.shape[1] + 5):
        torch.testing.assert_close(discounted_sum(x, mask, 1.0, stride=stride), x * mask)


@given(seeds, st.sampled_from([0.5, 1.0]))
@few
def test_a_length_normalised_sum_is_the_reward_and_the_mean_of_what_follows(seed, decay):
    x, _, mask = batch(seed)
    got = length_normalised_sum(x, mask, decay)
    for b, t in np.ndindex(*x.shape):
        n = int(mask[b].sum())
        later = [decay ** (k - t) * float(x[b, k]) for k in range(t + 1, n)]
        want = float(x[b, t]) + sum(later) / max(len(later), 1) if t < n else 0.0
        assert float(got[b, t]) == pytest.approx(want, abs=1e-12)


def test_discounted_sum_leaves_its_input_alone():
    x, _, mask = batch(1)
    before = x.clone()
    discounted_sum(x, mask, 0.9)
    assert torch.equal(x, before)


def test_stride_below_one_is_refused():
    x, _, mask = batch(0)
    with pytest.raises(ValueError, match="stride = 0: must be at least 1"):
        discounted_sum(x, mask, 1.0, stride=0)


@pytest.mark.parametrize("value", ["max", "lse", "softmax"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.95), (1.0, 0.5)])
def test_gae_with_the_teachers_value_as_critic_is_a_discounted_sum_of_advantages(value, gamma, lam):
    """The textbook GAE on the reward itself, cut answers bootstrapped, against the A-form, on a whole tree."""
    tree = build_tree(3, 4)
    q = random_q(tree, 3, seed=0)
    scores = tree.scores(q)
    reward = induced_reward(scores, tree.mask, value=value, gamma=gamma).tolist()
    v = teacher_value(scores, value).tolist()
    got = discounted_sum(induced_advantage(scores, value), tree.mask, gamma * lam)
    for y, answer in enumerate(tree.answers):
        carried = 0.0
        for t in reversed(range(len(answer))):
            # At the last token r + gamma V(s') = q: V(terminal) = 0, or the bootstrap cancels in a cut answer.
            following = v[y][t + 1] if t + 1 < len(answer) else 0.0
            carried = reward[y][t] + gamma * following - v[y][t] + gamma * lam * carried
            assert float(got[y, t]) == pytest.approx(carried, abs=1e-12)


def test_leave_one_out_is_the_mean_of_the_other_rollouts_of_the_same_prompt():
    returns, _, mask = batch(3, rows=6)
    got = leave_one_out(returns, mask, k=3)
    for b, t in np.ndindex(*returns.shape):
        others = [i for i in range(b // 3 * 3, b // 3 * 3 + 3) if i != b]
        want = sum(float(returns[i, t]) if mask[i, t] else 0.0 for i in others) / 2 if mask[b, t] else 0.0
        assert float(got[b, t]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_leave_one_out_refuses_rows_that_do_not_group(k):
    returns, _, mask = batch(0, rows=6)
    with pytest.raises(ValueError, match=f"got k = {k}, rows = 6"):
        leave_one_out(returns, mask, k)


@given(seeds, st.sampled_from([0.5, 1.0]), st.sampled_from([1, 2]))
@few
def test_per_decision_weights_each_reward_at_its_step_and_the_baseline_at_this_one(seed, decay, stride):
    rewards, baseline, mask = batch(seed)
    weights = batch(seed + 1)[0].exp()
    advantages = discounted_sum(rewards, mask, decay, stride) - baseline * mask
    got = per_decision(advantages, rewards * mask, weights * mask, mask, decay, stride)
    for b, t in np.ndindex(*rewards.shape):
        w, later = weights[b].tolist(), range(t, int(mask[b].sum()), stride)
        want = sum(decay ** (k - t) * w[k] * float(rewards[b, k]) for k in later)
        want -= w[t] * float(baseline[b, t]) if mask[b, t] else 0.0
        assert float(got[b, t]) == pytest.approx(want, abs=1e-10)
    in_step = per_decision(advantages, rewards * mask, mask.double(), mask, decay, stride)
    torch.testing.assert_close(in_step, advantages)


def test_importance_weights_are_products_of_ratios_and_carry_no_gradient():
    logps, behaviour, mask = batch(4)
    log_ratio = (logps - behaviour).numpy()
    logps.requires_grad_()
    for cap in (1.5, math.inf):
        token = importance_weights(logps, behaviour, mask, "token", cap)
        cumulative = importance_weights(logps, behaviour, mask, "cumulative", cap)
        assert not any(w.requires_grad for w in (token, cumulative))
        for b, t in np.ndindex(*logps.shape):
            ratios = [math.exp(log_ratio[b, j]) for j in range(t + 1)]
            assert float(token[b, t]) == pytest.approx(min(ratios[t], cap) if mask[b, t] else 0.0)
            assert float(cumulative[b, t]) == pytest.approx(min(math.prod(ratios), cap) if mask[b, t] else 0.0)
    torch.testing.assert_close(importance_weights(logps, behaviour, mask, "none", 1.0), mask.double())


def test_importance_weights_are_one_in_step_and_refuse_unknown_kinds():
    logps, _, mask = batch(5)
    for kind in ("none", "token", "cumulative"):
        torch.testing.assert_close(importance_weights(logps, logps, mask, kind, 2.0), mask.double())
    with pytest.raises(ValueError, match="importance_weight = 'sequence'"):
        importance_weights(logps, logps, mask, "sequence", 2.0)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns, noise, mask = batch(6)
    spoiled = torch.where(mask, returns, 1e6)
    assert float(explained_variance(returns, spoiled, mask)) == pytest.approx(1)
    assert float(explained_variance(torch.full_like(returns, 3.0), spoiled, mask)) == pytest.approx(0)
    want = 1 - np.var((returns - noise)[mask].numpy()) / np.var(returns[mask].numpy())
    assert float(explained_variance(noise, spoiled, mask)) == pytest.approx(want)
    assert float(explained_variance(noise, torch.ones_like(returns), mask)) == 0
    assert abs(float(value_gain(0.01 * noise, 1e-4 * returns, mask))) < 0.1
    # Rounding of equal returns is not a variance to explain.
    for size in (1.0, 1e4):
        almost = size * (1 + 1e-7 * torch.rand_like(returns))
        assert float(explained_variance(returns, almost, mask)) == 0


def test_the_gain_of_a_critic_sees_the_constant_error_that_its_explained_variance_cannot_see():
    returns, noise, mask = batch(6)
    spoiled = torch.where(mask, returns, 1e6)
    fit = [float(explained_variance(noise + shift, spoiled, mask)) for shift in (0.0, -40.0)]
    assert fit[0] == pytest.approx(fit[1])
    for values in (noise, noise - 40.0, returns, torch.zeros_like(returns)):
        error = np.square((returns - values)[mask].numpy()).mean()
        want = 1 - (error + 0.01) / (np.square(returns[mask].numpy()).mean() + 0.01)
        assert float(value_gain(values, spoiled, mask)) == pytest.approx(want, abs=1e-12)
    assert float(value_gain(returns - 40.0, spoiled, mask)) < -100


def test_regret_and_price_of_stopping_count_valid_tokens_only():
    gap, _, mask = batch(7)
    gap = gap.abs()
    want = [sum(row[:n]) for row, n in zip(gap.tolist(), mask.sum(1).tolist(), strict=True)]
    np.testing.assert_allclose(regret_per_sequence(-gap, mask).numpy(), want)
    assert float(price_of_stopping(gap, mask)) == pytest.approx(sum(want) / int(mask.sum()))


def inputs(seed=9, **more):
    """Rewards and a mask [6, R] of two rollouts per prompt, with everything that a baseline may read."""
    reward, noise, mask = batch(seed, rows=6)
    read = {"expected": noise, "values": noise - 1, "state_value": noise + 2}
    return CreditInputs(reward=reward * mask, mask=mask, decay=0.7, rollouts_per_prompt=2, **{**read, **more})


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_baseline_reads_what_it_says_and_nothing_else(name, exact):
    baseline = BASELINES[name]
    immediate = inputs().reward if exact else None
    unread = {k: None for k in ("expected", "values", "state_value") if k not in baseline.inputs(exact=exact)}
    got = baseline.credit(inputs(immediate=immediate, **unread))
    assert torch.equal(got[0], baseline.credit(inputs(immediate=immediate))[0])
    for read in baseline.inputs(exact=exact):
        changed = baseline.credit(inputs(immediate=immediate, **unread, **{read: torch.full_like(got[0], 3.0)}))
        assert not torch.equal(got[0], changed[0])
    assert (got[1] is not None) == baseline.critic == ("values" in baseline.reads)


def test_every_baseline_takes_its_own_number_from_the_same_credit():
    """Against plain loops: S_t less what the docstrings say."""
    x = inputs()
    to_go = discounted_sum(x.reward, x.mask, x.decay)
    other = to_go.view(3, 2, -1).flip(1).reshape(to_go.shape)
    want = {
        "none": to_go + x.state_value,
        "teacher": to_go,
        "closed_form": to_go - x.expected,
        "leave_one_out": to_go - other * x.mask,
        "critic": to_go - x.values,
    }
    assert want.keys() == BASELINES.keys()
    for name, baseline in BASELINES.items():
        torch.testing.assert_close(baseline.credit(x)[0] * x.mask, want[name] * x.mask)
        # Beside the exact one-step term S_t is the future alone; for `closed_form`, the teacher baseline.
        future = baseline.credit(replace(x, immediate=x.reward))[0]
        other_future = ((to_go - x.reward).view(3, 2, -1).flip(1)).reshape(to_go.shape)
        exact = {**want, "closed_form": to_go, "leave_one_out": to_go - other_future * x.mask}[name] - x.reward
        torch.testing.assert_close(future * x.mask, exact * x.mask)


def test_beside_the_exact_term_the_closed_form_is_the_teacher_baseline_and_reads_nothing():
    x = inputs()
    x = replace(x, immediate=x.reward, expected=None)
    assert BASELINES["closed_form"].inputs(exact=True) == frozenset()
    assert torch.equal(BASELINES["closed_form"].credit(x)[0], BASELINES["teacher"].credit(x)[0])


def test_a_critic_learns_what_it_is_compared_with():
    x = inputs()
    for immediate in (None, x.reward):
        x = replace(x, immediate=immediate)
        credit, targets = BASELINES["critic"].credit(replace(x, values=torch.zeros_like(x.reward)))
        assert torch.equal(credit, BASELINES["teacher"].credit(x)[0])
        assert torch.equal(targets, credit)
