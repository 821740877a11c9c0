"""The table of docs/method.md from published methods to settings: one row, one formula, written here from the paper.

A row's settings are read from the document and make an objective; its loss is taken on every answer of a small tree, in
float64. The formulas know a policy and a teacher as tables of log-probabilities and nothing of rlkd.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from published_arms import read_table

import rlkd
from rlkd.records import Answers, Example, Minibatch, TeacherSignal
from rlkd.trainers.objective import Evidence, StudentTokens
from trees import Tree, build_tree, random_policy, random_q

ACTIONS = 3


TABLE = read_table()


@dataclass(frozen=True)
class World:
    """A tree, the teacher's logits [S, A], a policy, and both as log-probabilities."""

    tree: Tree
    q: torch.Tensor
    policy: object

    @property
    def log_p(self):
        return self.q.log_softmax(-1)

    @property
    def log_pi(self):
        return self.policy.logits.log_softmax(-1)

    def steps(self, y: int):
        """The (state, action) of each token of answer y."""
        n = int(self.tree.mask[y].sum())
        return list(zip(self.tree.state[y, :n].tolist(), self.tree.ids[y, :n].tolist(), strict=True))

    def drawn(self, settings: dict):
        """log mu [S, A], without gradient: what rollouts are drawn from (MiniLLM eq. 4)."""
        share = settings.get("teacher_mix", 0.0)
        return (share * self.log_p.exp() + (1 - share) * self.log_pi.exp()).log().detach()

    def chance(self, table):
        """Probability of every answer under a table of log-probabilities [S, A]."""
        return torch.stack([sum(table[s, a] for s, a in self.steps(y)) for y in range(len(self.tree.answers))]).exp()


def world(depth: int = 3, seed: int = 0, *, same: bool = False) -> World:
    tree = build_tree(ACTIONS, depth)
    policy = random_policy(tree, ACTIONS, seed)
    return World(tree, policy.logits.detach() if same else random_q(tree, ACTIONS, seed), policy)


# What rlkd makes of the settings


class Table:
    """The teacher's distributions, by state."""

    def __init__(self, q, state):
        self.q, self.token_args = q, (state,)

    def logits(self, state):
        return self.q[state]


def losses(w: World, trainer: str, settings: dict, tuples: torch.Tensor):
    """The objective's loss of every answer, summed over its tokens, for groups of rollouts of one prompt [G, K]."""
    rows = tuples.flatten()
    kind = getattr(rlkd, trainer)
    names = {"SupervisedTrainer": rlkd.SupervisedArguments, "GKDTrainer": rlkd.GKDArguments}
    names |= {"ReinforceTrainer": rlkd.ReinforceArguments, "PPOTrainer": rlkd.PPOArguments}
    args = names[trainer](output_dir="unused", use_cpu=True, save_strategy="no", max_new_tokens=9, **settings)
    objective = kind.objective_type(args)
    state, ids, mask = w.tree.state[rows], w.tree.ids[rows], w.tree.mask[rows]
    own = torch.where(mask, w.policy.logps()[rows], 0.0)
    mu = w.tree.along(w.drawn(settings))[rows]
    labels = trainer in ("SupervisedTrainer", "GKDTrainer")
    answers = Answers(
        [Example("x", "x", ("x",))] * len(rows), ids, mask, ids, mask,
        None if labels else mu, None if labels else w.tree.finished[rows], None if labels else own.detach(),
    )  # fmt: skip
    scores, names = w.tree.scores(w.q), ("chosen", "max", "logsumexp", "mean", "entropy")
    signal = TeacherSignal(**{name: getattr(scores, name)[rows] for name in names}, distribution=Table(w.q, state))

    def student(annotations=None):
        function, token_args = objective.token_function(signal, annotations)
        flat = [argument.flatten(0, 1) for argument in token_args]
        numbers = function(w.policy.logits[state].flatten(0, 1), ids.flatten(), *flat)
        return [x.view(ids.shape) * mask for x in numbers]

    _, entropy, *extra = (x.detach() for x in student())
    annotations = objective.annotate(answers, Evidence(signal=signal, entropy=entropy, extra=tuple(extra)))
    logps, entropy, *extra = student(annotations)
    tokens = StudentTokens(logps=logps, entropy=entropy, values=torch.zeros_like(logps), extra=tuple(extra))
    loss, _ = objective.token_loss(tokens, Minibatch(answers=answers, signal=signal, annotations=annotations))
    return (loss * mask).sum(1).view(tuples.shape)


def expected_gradient(w: World, trainer: str, settings: dict):
    """That of the loss of one answer: labels are drawn from the teacher, rollouts from the policy."""
    k = settings.get("rollouts_per_prompt", 1)
    groups = torch.tensor(list(itertools.product(range(len(w.tree.answers)), repeat=k)))
    loss = losses(w, trainer, settings, groups).mean(1)
    pi, p = w.chance(w.drawn(settings)), w.chance(w.log_p)
    share = {"SupervisedTrainer": 0.0, "GKDTrainer": settings.get("on_policy_fraction", 1.0)}.get(trainer, 1.0)
    drawn = (share * pi + (1 - share) * p)[groups].prod(1) if k == 1 else pi[groups].prod(1)
    total = (drawn * loss).sum()
    if c := settings.get("imitation_coef", 0.0):
        total = total - c * (p * w.policy.logps().sum(1)).sum()
    return w.policy.gradient(total)


# The published formulas, as the loss of an answer whose gradient is the update


def at_prefixes(divergence: Callable):
    """sum_t D(p(.|s_t), pi(.|s_t)) of given answers."""

    def loss(w: World, y: int):
        return sum(divergence(w.log_p[s], w.log_pi[s]) for s, _ in w.steps(y))

    return loss


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def mixture(weight, a, b):
    return (weight * a.exp() + (1 - weight) * b.exp()).log()


def jensen_shannon(log_p, log_pi):
    """GKD eq. 1, beta 1/2."""
    m = mixture(0.5, log_p, log_pi)
    return 0.5 * kl(log_p, m) + 0.5 * kl(log_pi, m)


def skew_reverse(log_p, log_pi):
    """DistiLLM: KL(pi || .1 pi + .9 p)."""
    return kl(log_pi, mixture(0.1, log_pi, log_p))


def alpha_beta(log_p, log_pi):
    """ABKD with .2 and .7."""
    p, pi = log_p.exp(), log_pi.exp()
    return -(p**0.2 * pi**0.7 - 2 / 9 * p**0.9 - 7 / 9 * pi**0.9).sum() / 0.14


def sequence(w: World, y: int):
    """-log pi(y), Kim & Rush 2016."""
    return -sum(w.log_pi[s, a] for s, a in w.steps(y))


def best_token(log_p, log_pi):
    """ImitKD: the cross-entropy to the teacher's argmax."""
    return -log_pi[log_p.argmax()]


def weighted(advantage: Callable):
    """-sum_t advantage_t log pi(a_t|s_t), advantages without gradient: (world, steps, t) -> a number."""

    def loss(w: World, y: int):
        steps = w.steps(y)
        return -sum(float(advantage(w, steps, t)) * w.log_pi[s, a] for t, (s, a) in enumerate(steps))

    return loss


def log_ratio(w, s, a):
    return (w.log_p[s, a] - w.log_pi[s, a]).detach()


def opd(w, steps, t):
    """log p - log pi of the token."""
    return log_ratio(w, *steps[t])


def vopd(w, steps, t):
    """The same less its expectation, minus the reverse KL at the state."""
    s, _ = steps[t]
    return opd(w, steps, t) + kl(w.log_pi[s], w.log_p[s]).detach()


def minillm(w: World, y: int):
    """MiniLLM eqs 5, 6 and 8: the single step exactly, the mean of what follows by the sampled token with its weight,
    pi over the mixture. The paper's single step has that weight, too; given the state its mean is 1.
    """
    steps, drawn = w.steps(y), w.drawn({"teacher_mix": 0.2})
    total = 0.0
    for t, (s, a) in enumerate(steps):
        following = [float(log_ratio(w, *step)) for step in steps[t + 1 :]]
        future = sum(following) / max(len(following), 1)
        weight = float((w.log_pi[s, a] - drawn[s, a]).exp().detach())
        total = total + kl(w.log_pi[s], w.log_p[s]) - weight * future * w.log_pi[s, a]
    return total


def llmr(w, steps, t):
    """sum_{k>=t} r_k, r_k = q(s_k, a_k) - max_a q(s_{k+1}, a), with q = log p and nothing after the last token."""
    total = 0.0
    for k in range(t, len(steps)):
        s, a = steps[k]
        total += w.log_p[s, a] - (w.log_p[steps[k + 1][0]].max() if k + 1 < len(steps) else 0.0)
    return total


def ketchup(w, steps, t, k=4):
    """sum_i q(s_{t+ik}, a) - max_a q(s_{t+(i+1)k}, a): a reward of k steps at once."""
    total = 0.0
    for i in range(t, len(steps), k):
        s, a = steps[i]
        total += w.log_p[s, a] - (w.log_p[steps[i + k][0]].max() if i + k < len(steps) else 0.0)
    return total


def engine(w, steps, t):
    """log p of the rest of the answer."""
    return sum(w.log_p[s, a] for s, a in steps[t:])


# Name -> its loss of an answer, and whether every single answer has its gradient, or (another baseline) the mean only.
PUBLISHED = {
    "SeqKD": (sequence, True),
    "word-level KD": (at_prefixes(kl), True),
    "GKD": (at_prefixes(jensen_shannon), True),
    "ImitKD": (at_prefixes(best_token), True),
    "DistiLLM": (at_prefixes(skew_reverse), True),
    "ABKD": (at_prefixes(alpha_beta), True),
    "on-policy distillation": (weighted(opd), True),
    "on-policy distillation, exact": (at_prefixes(lambda log_p, log_pi: kl(log_pi, log_p)), True),
    "vOPD": (weighted(vopd), True),
    "MiniLLM": (minillm, True),
    "LLMR": (weighted(llmr), True),
    "KETCHUP": (weighted(ketchup), False),
    "ENGINE": (weighted(engine), True),
}
# Their fixed point is the teacher's best answer, not the teacher: where both are equal they go on sharpening.
SHARPENING = {"ImitKD", "LLMR", "KETCHUP", "ENGINE"}


def published_gradient(w: World, name: str):
    formula, _ = PUBLISHED[name]
    trainer, settings = TABLE[name]
    share = {"SupervisedTrainer": 0.0, "GKDTrainer": settings.get("on_policy_fraction", 1.0)}.get(trainer, 1.0)
    pi, p = w.chance(w.drawn(settings)), w.chance(w.log_p)
    per_answer = torch.stack([formula(w, y) for y in range(len(pi))])
    total = ((share * pi + (1 - share) * p) * per_answer).sum()
    imitated = settings.get("imitation_coef", 0.0) * (p * torch.stack([sequence(w, y) for y in range(len(p))])).sum()
    return w.policy.gradient(total + imitated)


def test_every_row_has_a_formula_and_every_formula_a_row():
    assert list(TABLE) == list(PUBLISHED)


def deep_enough(name):
    """K-step rewards need answers of more than K tokens; pairs of rollouts a small tree."""
    return {"KETCHUP": 5}.get(name, 3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_have_the_published_gradient(name):
    w = world(deep_enough(name))
    want = published_gradient(w, name)
    assert float(want.abs().max()) > 1e-2
    torch.testing.assert_close(expected_gradient(w, *TABLE[name]), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, (_, single) in PUBLISHED.items() if single])
def test_so_has_every_single_answer(name):
    """Not only their mean, so that a sampled term is told from an exact one, and one baseline from another."""
    w, (formula, _) = world(), PUBLISHED[name]
    answers = torch.arange(len(w.tree.answers))[:, None]
    for y, loss in enumerate(losses(w, *TABLE[name], answers)[:, 0]):
        got = torch.autograd.grad(loss, w.policy.theta, retain_graph=True)[0]
        torch.testing.assert_close(got, w.policy.gradient(formula(w, y)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in SHARPENING])
def test_a_policy_that_is_the_teacher_learns_nothing(name):
    assert float(expected_gradient(world(same=True), *TABLE[name]).abs().max()) < 1e-14


# The reward log p - log pi


@pytest.mark.parametrize("trainer", ["ReinforceTrainer", "PPOTrainer"])
@pytest.mark.parametrize("one_step", ["exact", "sampled"])
@pytest.mark.parametrize("baseline", ["teacher", "none", "closed_form", "leave_one_out"])
def test_its_full_return_has_the_gradient_of_the_kl_of_whole_answers(trainer, one_step, baseline):
    """Autograd of sum_y pi(y) log(pi(y) / p(y)), enumerated: the entropy of what follows is in the credit."""
    settings = {
        "reward_value": "lse", "entropy_coef": 1.0, "entropy_in": "reward", "lam": 1.0, "kl_coef": 0.0,
        "one_step": one_step, "baseline": baseline, "rollouts_per_prompt": 2 if baseline == "leave_one_out" else 1,
    }  # fmt: skip
    w = world(2 if baseline == "leave_one_out" else 3)
    chance = w.chance(w.log_pi)
    want = w.policy.gradient((chance * (chance.log() - w.chance(w.log_p).log())).sum())
    torch.testing.assert_close(expected_gradient(w, trainer, settings), want, rtol=0, atol=1e-10)
    # The entropy of the visited states alone is another objective.
    other = expected_gradient(w, trainer, {**settings, "entropy_in": "loss"})
    assert float((other - want).abs().max()) > 1e-2


@pytest.mark.parametrize("trainer", ["ReinforceTrainer", "PPOTrainer"])
@pytest.mark.parametrize("one_step", ["exact", "sampled"])
@pytest.mark.parametrize("settings", [{"length_normalised": True}, {"k_step": 2}, {"baseline": "closed_form"}], ids=str)
def test_answers_of_a_mixture_are_made_the_policys_own_by_their_weights(trainer, one_step, settings):
    """Cumulative weights that no cap truncates, for any credit: the gradient is that of rollouts without a teacher."""
    settings = {
        "reward_value": "lse", "entropy_coef": 0.5, "entropy_in": "reward", "lam": 0.9, "kl_coef": 0.0,
        "one_step": one_step, "baseline": "teacher", "rollouts_per_prompt": 1, **settings,
    }  # fmt: skip
    mixed = {**settings, "teacher_mix": 0.3, "importance_weight": "cumulative", "importance_cap": 1e9}
    w = world()
    want = expected_gradient(w, trainer, settings)
    torch.testing.assert_close(expected_gradient(w, trainer, mixed), want, rtol=0, atol=1e-10)
    capped = expected_gradient(w, trainer, {**mixed, "importance_cap": 1.0})
    assert float((capped - want).abs().max()) > 1e-4


@pytest.mark.parametrize("value", ["max", "softmax"])
def test_any_reward_may_have_the_entropy_of_answers_beside_it(value):
    """r - c log pi: the gradient of E[sum A_V] + c H(answers)."""
    settings = {"reward_value": value, "entropy_coef": 0.3, "entropy_in": "reward", "lam": 1.0, "kl_coef": 0.0}
    settings |= {"baseline": "teacher", "rollouts_per_prompt": 1}
    w = world()
    chance, p = w.chance(w.log_pi), w.log_p.exp()
    state_value = w.log_p.max(-1).values if value == "max" else (p * w.log_p).sum(-1)
    advantages = torch.stack(
        [sum(w.log_p[s, a] - state_value[s] for s, a in w.steps(y)) for y in range(len(w.tree.answers))]
    )
    want = w.policy.gradient(-(chance * (advantages - 0.3 * chance.log())).sum())
    torch.testing.assert_close(expected_gradient(w, "ReinforceTrainer", settings), want, rtol=0, atol=1e-10)
