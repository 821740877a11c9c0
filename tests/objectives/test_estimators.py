"""Gradient estimators against exact enumeration: bias (METHOD checks 3, 4, 8) and variance.

An estimator is built from the package's own functions on every answer of a tree; its expectation is the sum over
answers weighted by their probability; the truth is autograd of sum_y pi(y) R(y) with R summed by loops.
"""

import itertools

import pytest
import torch

from rlkd.objectives.advantages import (
    BASELINES,
    CreditInputs,
    discounted_sum,
    importance_weights,
    leave_one_out,
    length_normalised_sum,
    per_decision,
)
from rlkd.objectives.policy import reinforce_loss
from rlkd.objectives.rewards import expected_advantage, induced_advantage, induced_reward, teacher_value
from trees import build_tree, hand_advantages, hand_value, random_policy, random_q

ACTIONS = 3
VALUES = ["max", "lse", "softmax"]
GAUGES = ["log_prob", "centered_logit", "raw_logit"]


class Problem:
    """A tree, a teacher q and a policy; `full` is the reward-to-go in A-form."""

    def __init__(self, seed=0, depth=3, value="max"):
        self.value = value
        self.tree = build_tree(ACTIONS, depth)
        self.q = random_q(self.tree, ACTIONS, seed)
        self.policy = random_policy(self.tree, ACTIONS, seed)
        self.scores, self.mask = self.tree.scores(self.q), self.tree.mask
        self.immediate = induced_advantage(self.scores, value) * self.mask
        self.full = discounted_sum(self.immediate, self.mask, decay=1.0)
        self.pi = self.policy.probabilities().detach()

    def true_gradient(self):
        returns = torch.from_numpy(hand_advantages(self.tree, self.q, self.value).sum(1))
        return self.policy.gradient((self.policy.probabilities() * returns).sum())

    def mean_gradient(self, advantages, weights=None, probabilities=None):
        """E_y of the ascent direction of `reinforce_loss` with these per-token advantages [Y, T]."""
        weights = self.mask.double() if weights is None else weights
        loss = reinforce_loss(self.policy.logps(), advantages, weights) * self.mask
        return -self.policy.gradient(((self.pi if probabilities is None else probabilities) * loss.sum(1)).sum())

    def teacher_values(self):
        """V(s) of every state [S]."""
        return torch.tensor([hand_value(q, self.value) for q in self.q.tolist()], dtype=torch.float64)

    def expected_immediate(self):
        """E_{a ~ pi}[A_V(s, a)] of every state [S], differentiable."""
        return expected_advantage(self.policy.logits, self.q, self.teacher_values())

    def future(self):
        """E_pi[sum of A_V from state s on] for every state [S], by backward induction."""
        number = {p: i for i, p in enumerate(self.tree.prefixes)}
        pi, expected = self.policy.logits.softmax(-1).tolist(), self.expected_immediate().tolist()
        out = [0.0] * len(pi)
        for s in reversed(range(len(pi))):
            children = [number.get((*self.tree.prefixes[s], a)) for a in range(1, ACTIONS)]
            out[s] = expected[s] + sum(pi[s][a] * out[c] for a, c in enumerate(children, 1) if c is not None)
        return torch.tensor(out, dtype=torch.float64)


def close(one, other, tolerance=1e-10):
    return float((one - other).abs().max()) < tolerance


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("gauge", GAUGES)
def test_reinforce_without_baseline_is_unbiased_in_every_gauge(value, gauge):
    problem = Problem(value=value)
    reward = induced_reward(problem.scores, problem.mask, value=value, gauge=gauge)
    returns = discounted_sum(reward, problem.mask, decay=1.0)
    assert close(problem.mean_gradient(returns), problem.true_gradient())


@pytest.mark.parametrize("gauge", GAUGES)
def test_teacher_value_as_baseline_is_unbiased_and_gives_the_advantage_form(gauge):
    problem = Problem(seed=1)
    returns = discounted_sum(induced_reward(problem.scores, problem.mask, gauge=gauge), problem.mask, decay=1.0)
    centred = (returns - teacher_value(problem.scores, "max", gauge)) * problem.mask
    torch.testing.assert_close(centred, problem.full)
    assert close(problem.mean_gradient(centred), problem.true_gradient())


@pytest.mark.parametrize("value", VALUES)
def test_closed_form_baseline_is_unbiased(value):
    problem = Problem(seed=2, value=value)
    baseline = problem.tree.along(problem.expected_immediate().detach())
    assert close(problem.mean_gradient(problem.full - baseline), problem.true_gradient())


@pytest.mark.parametrize("k", [2, 3])
def test_leave_one_out_over_k_rollouts_is_unbiased(k):
    """Every k-tuple of answers of one prompt, each weighted by its probability: all of them are rows of one batch."""
    problem = Problem(seed=3, depth=3 if k == 2 else 2)
    tuples = torch.tensor(list(itertools.product(range(len(problem.pi)), repeat=k)))
    rows = tuples.flatten()
    baseline = leave_one_out(problem.full[rows], problem.mask[rows], k)
    advantages = ((problem.full[rows] - baseline) * problem.mask[rows]).view(len(tuples), k, -1)
    weight = problem.pi[tuples].prod(1)
    per_row = torch.zeros_like(problem.full).index_add(0, rows, (weight[:, None, None] * advantages).flatten(0, 1) / k)
    gradient = problem.policy.gradient((per_row * problem.policy.logps()).sum())
    assert close(gradient, problem.true_gradient())


@pytest.mark.parametrize("value", VALUES)
def test_exact_one_step_term_plus_sampled_future_is_unbiased(value):
    """E[sum_t grad E_pi[A_V(s_t, .)] + sum_{k>t} A_k grad log pi(a_t)]: the immediate term needs no sampled action."""
    problem = Problem(seed=4, value=value)
    exact = problem.tree.along(problem.expected_immediate()).sum(1)
    exact_gradient = problem.policy.gradient((problem.pi * exact).sum())
    sampled = problem.mean_gradient(problem.full - problem.immediate)
    assert close(exact_gradient + sampled, problem.true_gradient())


def test_immediate_credit_alone_is_biased():
    problem = Problem(seed=4)
    assert not close(problem.mean_gradient(problem.immediate), problem.true_gradient(), 1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_ignores_the_gauge_of_the_teacher(seed):
    """q + c(s) leaves the expected gradient as it is even where c enters the reward as a potential."""
    problem = Problem(seed=seed)
    shift = torch.randn(len(problem.q), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shifted = problem.tree.scores(problem.q + 3 * shift)
    gradients = []
    for scores in (problem.scores, shifted):
        reward = induced_reward(scores, problem.mask, gauge="raw_logit")
        gradients.append(problem.mean_gradient(discounted_sum(reward, problem.mask, decay=1.0)))
    assert close(*gradients)


@pytest.mark.parametrize("clip", ["reward", "return"])
def test_clipping_breaks_the_invariance(clip):
    """The negative control: with r or G clipped, the gauge decides what is learned."""
    problem = Problem()
    gradients = []
    for gauge in GAUGES:
        reward = induced_reward(problem.scores, problem.mask, gauge=gauge)
        if clip == "reward":
            reward = reward.clamp(-1, 1)
        returns = discounted_sum(reward, problem.mask, decay=1.0)
        gradients.append(problem.mean_gradient(returns.clamp(-1, 1) if clip == "return" else returns))
    for one, other in itertools.combinations(gradients, 2):
        assert not close(one, other, 1e-2)


def test_a_discount_in_the_return_that_the_reward_lacks_breaks_the_invariance():
    problem = Problem()
    mixed = [
        discounted_sum(induced_reward(problem.scores, problem.mask, gauge=g, gamma=1.0), problem.mask, decay=0.8)
        for g in GAUGES
    ]
    assert not close(problem.mean_gradient(mixed[0]), problem.mean_gradient(mixed[2]), 1e-2)


# -- the critic beside the exact one-step term -----------------------------------------------------------------------


def with_critic(problem, critic, decay):
    """The gradient [Y, D, A] of each answer: exact one-step term, and the credit of the future less `critic` [S]."""
    tree, mask = problem.tree, problem.mask
    inputs = CreditInputs(
        reward=problem.immediate, mask=mask, decay=decay, immediate=problem.immediate, values=tree.along(critic)
    )
    credit, targets = BASELINES["critic"].credit(inputs)
    log_pi = problem.policy.logits.log_softmax(-1)
    exact = tree.along(problem.expected_immediate()).sum(1)
    sampled = (credit * mask * tree.along(log_pi)).sum(1)
    rows = [torch.autograd.grad(row, problem.policy.theta, retain_graph=True)[0] for row in exact + sampled]
    return torch.stack(rows), targets


def future_of(problem, decay):
    """E_pi[sum_{k>t} decay^(k-t) A_k] of every state [S], by backward induction over loops."""
    number = {p: i for i, p in enumerate(problem.tree.prefixes)}
    pi, expected = problem.policy.logits.softmax(-1).tolist(), problem.expected_immediate().tolist()
    future = [0.0] * len(pi)
    for s in reversed(range(len(pi))):
        for a in range(1, ACTIONS):
            child = number.get((*problem.tree.prefixes[s], a))
            if child is not None:
                future[s] += pi[s][a] * decay * (expected[child] + future[child])
    return torch.tensor(future, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 1.0])
def test_a_critic_of_the_future_is_unbiased_and_the_perfect_one_has_the_least_variance(decay):
    """For any critic the mean gradient is that of the immediate term and of the discounted future; none (C = 0), the
    mean future, and a critic that also predicts the immediate term vary more than the perfect one.
    """
    total: dict[str, float] = {}
    for seed in range(4):
        problem = Problem(seed=seed, depth=3)
        pi, perfect = problem.pi[:, None, None], future_of(problem, decay)
        future = discounted_sum(problem.immediate, problem.mask, decay) - problem.immediate
        weight = problem.pi[:, None] * problem.mask
        critics = {
            "perfect": perfect,
            "none": torch.zeros_like(perfect),
            "mean": torch.full_like(perfect, float((weight * future).sum() / weight.sum())),
            "whole": perfect + problem.expected_immediate().detach(),
        }
        means = {}
        for name, critic in critics.items():
            gradients, targets = with_critic(problem, critic, decay)
            assert close(targets, future)
            means[name] = (pi * gradients).sum(0)
            total[name] = total.get(name, 0.0) + float((pi * (gradients - means[name]).square()).sum())
        for mean in means.values():
            assert close(mean, means["none"])
        if decay == 1.0:
            assert close(means["perfect"], problem.true_gradient())
    rest = [total[name] for name in ("none", "mean") if decay > 0] + [total["whole"]]
    assert total["perfect"] < 0.99 * min(rest)


# -- length-normalised credit ----------------------------------------------------------------------------------------


def normalised_credit(problem, decay):
    """MiniLLM's credit of every token of every answer [Y, T]: its reward and the mean of the discounted ones after."""
    out = torch.zeros_like(problem.full)
    for y, row in enumerate(hand_advantages(problem.tree, problem.q, problem.value)):
        n = len(problem.tree.answers[y])
        for t in range(n):
            after = [decay ** (k - t) * row[k] for k in range(t + 1, n)]
            out[y, t] = row[t] + (sum(after) / (n - 1 - t) if after else 0.0)
    return out


def normalised(problem, rows=slice(None), **more):
    reward, mask = problem.immediate[rows], problem.mask[rows]
    return CreditInputs(reward=reward, mask=mask, length_normalised=True, **more)


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("exact", [False, True])
def test_length_normalised_credit_has_the_gradient_of_its_formula_with_every_baseline(decay, exact):
    problem = Problem(seed=6, depth=3)
    want = problem.mean_gradient(normalised_credit(problem, decay))
    assert not close(want, problem.mean_gradient(discounted_sum(problem.immediate, problem.mask, decay)), 1e-2)
    term = problem.pi @ problem.tree.along(problem.expected_immediate()).sum(1)
    one_step = problem.policy.gradient(term) if exact else 0.0
    read = {"expected": problem.expected_immediate().detach(), "values": torch.linspace(-3, 2, len(problem.q)).double()}
    for name in ("teacher", "closed_form", "critic"):
        reads = {field: problem.tree.along(values) for field, values in read.items()}
        immediate = problem.immediate if exact else None
        credit, _ = BASELINES[name].credit(normalised(problem, decay=decay, immediate=immediate, **reads))
        assert close(problem.mean_gradient(credit) + one_step, want)


def test_length_normalised_credit_is_compared_with_that_of_the_other_rollouts():
    problem = Problem(seed=6, depth=2)
    want = problem.mean_gradient(normalised_credit(problem, 1.0))
    tuples = torch.tensor(list(itertools.product(range(len(problem.pi)), repeat=2)))
    rows = tuples.flatten()
    credit, _ = BASELINES["leave_one_out"].credit(normalised(problem, rows, decay=1.0, rollouts_per_prompt=2))
    alone = normalised_credit(problem, 1.0)[rows]
    other = (alone.view(-1, 2, alone.shape[1]).flip(1)).reshape(alone.shape)
    torch.testing.assert_close(credit * problem.mask[rows], (alone - other) * problem.mask[rows])
    weight = problem.pi[tuples].prod(1)[:, None, None] / 2
    share = weight * (credit * problem.mask[rows]).view(len(tuples), 2, -1)
    per_row = torch.zeros_like(problem.full).index_add(0, rows, share.flatten(0, 1))
    assert close(problem.policy.gradient((per_row * problem.policy.logps()).sum()), want)


# -- off-policy ----------------------------------------------------------------------------------------------------


class Stale:
    """A problem with answers sampled from an older policy mu."""

    def __init__(self, seed=5, depth=3):
        self.problem = Problem(seed=seed, depth=depth)
        behaviour = random_policy(self.problem.tree, ACTIONS, seed + 50)
        self.mu = behaviour.probabilities().detach()
        self.logps, self.behaviour_logps = self.problem.policy.logps().detach(), behaviour.logps().detach()

    def weights(self, kind, cap=float("inf")):
        return importance_weights(self.logps, self.behaviour_logps, self.problem.mask, kind, cap)

    def inside(self, kind, baseline=0.0):
        """Each reward carries the weight of the decisions up to it: sum_{k>=t} w_k A_k - w_t b_t."""
        problem = self.problem
        advantages = (problem.full - baseline) * problem.mask
        credit = per_decision(advantages, problem.immediate, self.weights(kind), problem.mask, decay=1.0)
        return problem.mean_gradient(credit, probabilities=self.mu)

    def outside(self, kind):
        """The weight of step t multiplies the whole reward-to-go: w_t sum_{k>=t} A_k."""
        return self.problem.mean_gradient(self.problem.full, self.weights(kind), probabilities=self.mu)


def test_per_decision_cumulative_weights_are_unbiased_under_a_stale_policy():
    stale = Stale()
    assert close(stale.inside("cumulative"), stale.problem.true_gradient())


@pytest.mark.parametrize("kind", ["none", "token"])
def test_token_weights_are_biased_under_a_stale_policy(kind):
    stale = Stale()
    assert not close(stale.inside(kind), stale.problem.true_gradient(), 1e-2)
    assert not close(stale.outside(kind), stale.problem.true_gradient(), 1e-2)


def test_cumulative_weights_outside_the_return_are_biased():
    """The released code's `cumprod`: the future was sampled from mu, so these weights fail on the whole sum."""
    stale = Stale()
    assert not close(stale.outside("cumulative"), stale.problem.true_gradient(), 1e-2)


def test_a_baseline_keeps_the_per_decision_estimator_unbiased():
    stale = Stale()
    baseline = stale.problem.tree.along(stale.problem.expected_immediate().detach())
    assert close(stale.inside("cumulative", baseline), stale.problem.true_gradient())


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_length_normalised_future_needs_the_weight_of_the_whole_answer(decay):
    """Its divisor is the length, which the last token decides: weighted reward by reward it is biased."""
    stale = Stale(depth=4)
    problem, weights = stale.problem, stale.weights("cumulative")
    credit = normalised_credit(problem, decay)
    want = problem.mean_gradient(credit)
    baseline = problem.tree.along(problem.expected_immediate().detach())
    args = (problem.immediate, weights, problem.mask, decay)
    right = per_decision((credit - baseline) * problem.mask, *args, length_normalised=True)
    assert close(problem.mean_gradient(right, probabilities=stale.mu), want)
    wrong = length_normalised_sum(weights * problem.immediate, problem.mask, decay) - weights * baseline
    assert not close(problem.mean_gradient(wrong, probabilities=stale.mu), want, 1e-3)


def test_a_baseline_without_the_weight_of_its_step_is_biased():
    """The control of the test above: sum_{k>=t} w_k A_k - b_t."""
    stale = Stale()
    problem = stale.problem
    baseline = problem.tree.along(problem.expected_immediate().detach())
    returns = discounted_sum(stale.weights("cumulative") * problem.immediate, problem.mask, decay=1.0)
    gradient = problem.mean_gradient(returns - baseline, probabilities=stale.mu)
    assert not close(gradient, problem.true_gradient(), 1e-2)


def test_exact_one_step_term_weighted_by_the_tokens_before_it_is_unbiased_under_a_stale_policy():
    """A state is reached by its prefix alone: its exact term carries w_{t-1}, and the sampled future w_k for k > t."""
    stale = Stale()
    problem, weights = stale.problem, stale.weights("cumulative")
    before = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1) * problem.mask
    exact = (before * problem.tree.along(problem.expected_immediate())).sum(1)
    exact_gradient = problem.policy.gradient((stale.mu * exact).sum())
    assert close(exact_gradient + stale.inside("cumulative", baseline=problem.immediate), problem.true_gradient())


# -- variance ------------------------------------------------------------------------------------------------------


def trace_variances(problem):
    """Exact trace of the covariance of the one-answer gradient of each estimator."""
    tree, mask = problem.tree, problem.mask
    pi = problem.policy.logits.softmax(-1).detach()
    x = problem.policy.features
    # score[s, a] = gradient of log pi(a|s) in theta, flattened: [S, A, D * A]
    score = torch.einsum("sd,sab->sadb", x, torch.eye(ACTIONS, dtype=torch.float64)[None] - pi[:, None, :]).flatten(2)
    along = score[tree.state, tree.ids]
    exact = (pi[..., None] * (problem.q - problem.teacher_values()[:, None])[..., None] * score).sum(1)[tree.state]
    v_pi = problem.future()
    baselines = {
        "none": torch.zeros_like(problem.full),
        "closed form": tree.along(problem.expected_immediate().detach()),
        "prompt mean": (problem.pi[:, None] * problem.full).sum(0).expand_as(problem.full),
        "exact V": tree.along(v_pi),
    }
    gradients = {
        name: ((problem.full - b)[..., None] * along * mask[..., None]).sum(1) for name, b in baselines.items()
    }
    # The future after a_t less its expectation before a_t is drawn, E_{s'}[V(s')] = V(s) - E[A(s, .)].
    perfect = tree.along(v_pi - problem.expected_immediate().detach())
    future = (problem.full - problem.immediate - perfect) * mask
    gradients["single step"] = (exact * mask[..., None] + future[..., None] * along).sum(1)
    truth = problem.true_gradient().flatten()
    out = {}
    for name, g in gradients.items():
        mean = (problem.pi[:, None] * g).sum(0)
        assert close(mean, truth)
        out[name] = float((problem.pi[:, None] * (g - mean).square()).sum())
    return out


def test_variances_are_ordered_as_the_method_says():
    """Summed over eight random problems, for single ones can differ; no baseline is the worst on each of them."""
    total: dict[str, float] = {}
    for seed in range(8):
        variances = trace_variances(Problem(seed=seed, depth=5))
        assert max(variances, key=variances.get) == "none"
        total = {name: total.get(name, 0.0) + v for name, v in variances.items()}
    names = ["none", "closed form", "prompt mean", "exact V", "single step"]
    assert sorted(total, key=total.get, reverse=True) == names
