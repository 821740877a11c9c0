import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import ConfigError
from rlkd.objectives.rewards import (
    average_templates,
    expected_advantage,
    gauge_shift,
    induced_advantage,
    induced_reward,
    teacher_value,
    token_scores,
)
from trees import END, build_tree, hand_advantages, hand_value, random_policy, random_q, signal_of

VALUES = ["max", "lse", "softmax"]
GAUGES = ["log_prob", "centered_logit", "raw_logit"]
few = settings(max_examples=15, deadline=None)


def random_scores(seed, rows=4, width=6, vocab=5):
    """Scores of random logits [B, R, V] under a right-padded mask; the numbers at padding are garbage on purpose."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, width, vocab, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocab, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    flat = token_scores(logits.flatten(0, 1), ids.flatten())
    return signal_of(x.view(rows, width) for x in flat), logits, ids, mask


def test_token_scores_against_plain_python():
    logits = [[1.5, -2.0, 0.25, 4.0], [0.0, 0.0, 0.0, 0.0], [700.0, -700.0, 3.0, 2.0]]
    ids = [3, 1, 2]
    got = token_scores(torch.tensor(logits, dtype=torch.float64), torch.tensor(ids))
    for i, row in enumerate(logits):
        lse = hand_value(row, "lse")
        probabilities = [math.exp(x - lse) for x in row]
        entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
        want = [row[ids[i]], max(row), lse, sum(row) / 4, entropy]
        np.testing.assert_allclose([float(x[i]) for x in got], want, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
def test_token_scores_in_float32_stay_close_to_float64(scale):
    """From nearly uniform to nearly deterministic, far from zero, over a vocabulary of T5's size."""
    logits = scale * torch.randn(4, 32_100, generator=torch.Generator().manual_seed(0)) - 50
    ids = torch.tensor([0, 1, 2, 32_099])
    for got, want in zip(token_scores(logits, ids), token_scores(logits.double(), ids), strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-6)


def test_token_scores_are_float32_from_half_precision():
    assert all(x.dtype == torch.float32 for x in token_scores(torch.randn(2, 5).bfloat16(), torch.tensor([0, 4])))


# -- METHOD check 1: the reward is recovered from the optimal Q-function -------------------------------------------


@pytest.mark.parametrize("value", ["max", "lse"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_known_rewards_are_recovered_up_to_potential_shaping(value, gamma):
    """Backward induction on known rewards gives Q*; from logits Q* + c(s), r + c(s) - gamma c(s') comes back."""
    actions, depth = 3, 4
    tree = build_tree(actions, depth)
    rng = np.random.default_rng(0)
    rewards, shift = rng.normal(size=(len(tree.prefixes), actions)), rng.normal(size=len(tree.prefixes))
    number = {p: i for i, p in enumerate(tree.prefixes)}

    def child(state, action):
        """The next state; None when the answer is over (at full depth it always is, here)."""
        return None if action == END else number.get((*tree.prefixes[state], action))

    q = np.zeros_like(rewards)
    for s in reversed(range(len(tree.prefixes))):
        for a in range(actions):
            following = child(s, a)
            q[s, a] = rewards[s, a] + (0 if following is None else gamma * hand_value(list(q[following]), value))

    scores = tree.scores(torch.from_numpy(q + shift[:, None]))
    recovered = induced_reward(scores, tree.mask, value=value, gauge="raw_logit", gamma=gamma)
    for y, answer in enumerate(tree.answers):
        for t, a in enumerate(answer):
            s = number[answer[:t]]
            following = child(s, a)
            want = rewards[s, a] + shift[s] - (0 if following is None else gamma * shift[following])
            assert abs(float(recovered[y, t]) - want) < 1e-12


# -- METHOD check 2: telescoping -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    value=st.sampled_from(VALUES),
    gauge=st.sampled_from(GAUGES),
    gamma=st.sampled_from([1.0, 0.8]),
)
@few
def test_discounted_return_telescopes_to_value_plus_advantages(seed, value, gauge, gamma):
    """sum_k gamma^(k-t) r_k = V(s_t) + sum_k gamma^(k-t) A_V(s_k, a_k), whatever the padding; cut or ended alike."""
    scores, _, _, mask = random_scores(seed)
    reward = induced_reward(scores, mask, value=value, gauge=gauge, gamma=gamma)
    baseline, advantage = teacher_value(scores, value, gauge), induced_advantage(scores, value)
    assert (reward[~mask] == 0).all()
    for b, row in enumerate(mask):
        length = int(row.sum())
        for t in range(length):
            left = sum(gamma ** (k - t) * float(reward[b, k]) for k in range(t, length))
            right = float(baseline[b, t]) + sum(gamma ** (k - t) * float(advantage[b, k]) for k in range(t, length))
            assert left == pytest.approx(right, abs=1e-10)


def test_garbage_at_padding_never_reaches_the_reward():
    scores, _, _, mask = random_scores(3)
    names = ("chosen", "max", "logsumexp", "mean", "entropy")
    spoiled = signal_of(torch.where(mask, getattr(scores, name), 1e6) for name in names)
    torch.testing.assert_close(induced_reward(spoiled, mask), induced_reward(scores, mask))


# -- METHOD check 3: the gauge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_advantage_is_the_same_from_logits_shifted_logits_and_log_probs(value):
    _, logits, ids, _ = random_scores(5)
    shift = torch.randn(logits.shape[:-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = np.array(
        [
            [q[a] - hand_value(q, value) for q, a in zip(*row, strict=True)]
            for row in zip(logits.tolist(), ids.tolist(), strict=True)
        ]
    )
    for version in (logits, logits + 10 * shift[..., None], logits.log_softmax(-1)):
        flat = token_scores(version.flatten(0, 1), ids.flatten())
        scores = signal_of(x.view(ids.shape) for x in flat)
        np.testing.assert_allclose(induced_advantage(scores, value).numpy(), reference, atol=1e-12)


@pytest.mark.parametrize("gauge", ["log_prob", "centered_logit"])
def test_fixed_gauges_do_not_see_a_shift_of_the_logits(gauge):
    _, logits, ids, mask = random_scores(6)
    one, other = (
        signal_of(x.view(ids.shape) for x in token_scores(v.flatten(0, 1), ids.flatten())) for v in (logits, logits + 7)
    )
    torch.testing.assert_close(induced_reward(one, mask, gauge=gauge), induced_reward(other, mask, gauge=gauge))


def test_gauges_are_log_softmax_centred_and_raw_logits():
    scores, logits, ids, _ = random_scores(7)
    chosen = ids[..., None]
    want = {
        "log_prob": logits.log_softmax(-1).gather(-1, chosen),
        "centered_logit": (logits - logits.mean(-1, keepdim=True)).gather(-1, chosen),
        "raw_logit": logits.gather(-1, chosen),
    }
    for gauge, expected in want.items():
        torch.testing.assert_close(scores.chosen - gauge_shift(scores, gauge), expected.squeeze(-1))


def test_an_unknown_gauge_is_refused():
    scores, *_ = random_scores(0)
    with pytest.raises(ConfigError, match="allowed are 'log_prob'"):
        gauge_shift(scores, "none")


# -- METHOD check 5: what the return means -------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_return_is_sequence_log_probability_plus_an_entropy_per_state(value):
    """sum_t A_V = log p(y|x) + sum_t {H_inf | 0 | H_1}(p(.|s_t)) for max | lse | softmax."""
    tree = build_tree(3, 4)
    q = random_q(tree, 3, seed=0)
    returns = (induced_advantage(tree.scores(q), value) * tree.mask).sum(1)
    log_p = (q - q.logsumexp(-1, keepdim=True)).numpy()
    p = np.exp(log_p)
    per_state = {"max": -log_p.max(1), "lse": np.zeros(len(p)), "softmax": -(p * log_p).sum(1)}[value]
    number = {s: i for i, s in enumerate(tree.prefixes)}
    for y, answer in enumerate(tree.answers):
        states = [number[answer[:t]] for t in range(len(answer))]
        want = sum(log_p[s, a] + per_state[s] for s, a in zip(states, answer, strict=True))
        assert float(returns[y]) == pytest.approx(want, abs=1e-12)


def test_lse_objective_plus_policy_entropy_is_minus_the_reverse_kl():
    tree = build_tree(3, 5)
    q, policy = random_q(tree, 3, seed=1), random_policy(tree, 3, seed=1)
    pi = policy.probabilities().detach().numpy()
    log_p = tree.along(q.log_softmax(-1)).sum(1).numpy()
    assert pi.sum() == pytest.approx(1, abs=1e-12)
    objective = (pi * (induced_advantage(tree.scores(q), "lse") * tree.mask).sum(1).numpy()).sum()
    entropy = -(pi * np.log(pi)).sum()
    reverse_kl = (pi * (np.log(pi) - log_p)).sum()
    assert objective + entropy == pytest.approx(-reverse_kl, abs=1e-12)


# -- METHOD check 6: what the return is maximised by ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_best_return_is_greedy_for_max_and_the_mode_for_lse(seed):
    actions, depth = 4, 4
    tree = build_tree(actions, depth)
    q = random_q(tree, actions, seed)
    number, log_p = {p: i for i, p in enumerate(tree.prefixes)}, q.log_softmax(-1).tolist()

    greedy: tuple[int, ...] = ()
    while len(greedy) < depth and END not in greedy:
        row = log_p[number[greedy]]
        greedy = (*greedy, row.index(max(row)))

    def mode(prefix):
        """Best log-probability from here on, and the answer that has it, by dynamic programming."""
        if len(prefix) == depth or prefix[-1:] == (END,):
            return 0.0, prefix
        follow = [(log_p[number[prefix]][a], mode((*prefix, a))) for a in range(actions)]
        return max((gain + rest, answer) for gain, (rest, answer) in follow)

    scores = tree.scores(q)
    best = {v: tree.answers[int((induced_advantage(scores, v) * tree.mask).sum(1).argmax())] for v in ("max", "lse")}
    assert best["max"] == greedy
    assert best["lse"] == mode(())[1]


def test_greedy_and_mode_are_not_the_same_thing_on_these_trees():
    """The control of the test above: on at least one of its trees the two answers differ."""
    tree = build_tree(4, 4)
    winners = []
    for seed in range(5):
        scores = tree.scores(random_q(tree, 4, seed))
        winners.append([int((induced_advantage(scores, v) * tree.mask).sum(1).argmax()) for v in ("max", "lse")])
    assert any(greedy != mode for greedy, mode in winners)


# -- exact expectations and templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_expected_advantage_is_the_sum_over_all_actions(value):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher_value = torch.tensor([hand_value(q, value) for q in teacher.tolist()], dtype=torch.float64)
    got = expected_advantage(student, teacher, teacher_value)
    for i in range(3):
        weights = [math.exp(x) for x in student[i].tolist()]
        want = sum(
            w / sum(weights) * (q - float(teacher_value[i])) for w, q in zip(weights, teacher[i].tolist(), strict=True)
        )
        assert float(got[i]) == pytest.approx(want, abs=1e-12)


def test_average_templates_averages_every_advantage():
    one, other = random_scores(1)[0], random_scores(2)[0]
    both = average_templates([one, other])
    for value in VALUES:
        mean = (induced_advantage(one, value) + induced_advantage(other, value)) / 2
        torch.testing.assert_close(induced_advantage(both, value), mean)
    for gauge in GAUGES:
        mean = (teacher_value(one, "max", gauge) + teacher_value(other, "max", gauge)) / 2
        torch.testing.assert_close(teacher_value(both, "max", gauge), mean)
    assert both.distribution is None


def test_hand_advantages_agree_with_the_tree_helper():
    """The oracle used by the other files, against the module: two independent computations of the same table."""
    tree = build_tree(3, 3)
    q = random_q(tree, 3, seed=9)
    for value in VALUES:
        got = torch.where(tree.mask, induced_advantage(tree.scores(q), value), 0.0)
        np.testing.assert_allclose(got.numpy(), hand_advantages(tree, q, value), atol=1e-12)
