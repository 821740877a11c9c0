"""Small decision trees, enumerated: the exact oracle of every claim about rewards and gradients. All in float64.

State = prefix of the answer; action 0 ends the answer, the others grow it; answers are cut at `depth` tokens.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlkd.objectives.rewards import token_scores
from rlkd.records import TeacherSignal

END = 0


def signal_of(scores) -> TeacherSignal:
    """The signal of what `token_scores` gives, in its order, each [B, R]."""
    return TeacherSignal(**dict(zip(("chosen", "max", "logsumexp", "mean", "entropy"), scores, strict=True)))


@dataclass(frozen=True)
class Tree:
    """Every answer as a row: state and ids [Y, T] (0 at padding), mask [Y, T], finished [Y]; prefixes [S]."""

    prefixes: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]
    state: Tensor
    ids: Tensor
    mask: Tensor
    finished: Tensor

    def along(self, table: Tensor) -> Tensor:
        """A table per state [S] or per state and action [S, A], read along every answer: [Y, T], 0 at padding."""
        values = table[self.state] if table.dim() == 1 else table[self.state, self.ids]
        return torch.where(self.mask, values, torch.zeros_like(values))

    def scores(self, q: Tensor) -> TeacherSignal:
        """The signal of a teacher with logits q [S, A] for every answer."""
        width = self.ids.shape[1]
        flat = token_scores(q[self.state].flatten(0, 1), self.ids.flatten())
        return signal_of(torch.where(self.mask, x.view(-1, width), torch.zeros(())) for x in flat)


def build_tree(actions: int, depth: int) -> Tree:
    prefixes = [p for n in range(depth) for p in itertools.product(range(1, actions), repeat=n)]
    answers = [(*p, END) for p in prefixes] + list(itertools.product(range(1, actions), repeat=depth))
    number = {p: i for i, p in enumerate(prefixes)}
    shape = (len(answers), depth)
    state, ids, mask = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape).bool(),
    )
    for row, answer in enumerate(answers):
        for t, action in enumerate(answer):
            state[row, t], ids[row, t], mask[row, t] = number[answer[:t]], action, True
    return Tree(prefixes, answers, state, ids, mask, torch.tensor([a[-1] == END for a in answers]))


def random_q(tree: Tree, actions: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(tree.prefixes), actions, generator=generator, dtype=torch.float64)


def hand_value(q: list[float], value: str) -> float:
    """V(s) from the logits of one state, with nothing but math."""
    top = max(q)
    lse = top + math.log(sum(math.exp(x - top) for x in q))
    if value == "max":
        return top
    return lse if value == "lse" else sum(math.exp(x - lse) * x for x in q)


def hand_advantages(tree: Tree, q: Tensor, value: str) -> np.ndarray:
    """A_V(s_t, a_t) = q - V along every answer, [Y, T], by loops."""
    rows, out = q.tolist(), np.zeros(tree.ids.shape)
    for y, answer in enumerate(tree.answers):
        for t, action in enumerate(answer):
            logits = rows[tree.prefixes.index(answer[:t])]
            out[y, t] = logits[action] - hand_value(logits, value)
    return out


@dataclass(frozen=True)
class SoftmaxPolicy:
    """log pi(.|s) = log_softmax(features[s] theta); the parameters are shared between states."""

    tree: Tree
    features: Tensor
    theta: Tensor

    @property
    def logits(self) -> Tensor:
        return self.features @ self.theta

    def logps(self) -> Tensor:
        """log pi of every token of every answer, [Y, T]."""
        return self.tree.along(self.logits.log_softmax(-1))

    def probabilities(self) -> Tensor:
        """pi(y) of every answer, [Y]."""
        return self.logps().sum(1).exp()

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.theta)[0]


def random_policy(tree: Tree, actions: int, seed: int, features: int = 4) -> SoftmaxPolicy:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(len(tree.prefixes), features, generator=generator, dtype=torch.float64)
    theta = 0.7 * torch.randn(features, actions, generator=generator, dtype=torch.float64)
    return SoftmaxPolicy(tree, x, theta.requires_grad_())
