import dataclasses

import pytest
import torch

from rlkd.models.heads import Head, HeadOverStates
from rlkd.records import Answers, Batched, Example, Minibatch, TeacherSignal, select_rows
from rlkd.trainers.policy_gradient import Credit

B, R, V = 4, 3, 5


def grid(offset=0.0):
    return torch.arange(B * R, dtype=torch.float32).view(B, R) + offset


def minibatch(states=None):
    examples = [Example(f"row {i}", f"s{i}", (f"t{i}",)) for i in range(B)]
    ids, mask = grid().long(), torch.ones(B, R).bool()
    rollouts = Answers(examples, ids, mask, ids + 1, mask, grid(0.5), torch.arange(B) % 2 == 0)
    distribution = None if states is None else HeadOverStates(states, Head(torch.randn(V, 2), None, 1.0, V))
    names = ("chosen", "max", "logsumexp", "mean", "entropy")
    signal = TeacherSignal(**{name: grid(i) for i, name in enumerate(names)}, distribution=distribution)
    grids = {f.name: grid(10 + i) for i, f in enumerate(dataclasses.fields(Credit)) if "Tensor" in str(f.type)}
    credit = Credit(**grids, scale=0.5, kl_coef=0.1)
    return Minibatch(answers=rollouts, signal=signal, annotations=credit, denominator=7.0)


def test_select_rows_takes_the_same_rows_of_everything_nested_or_not():
    batch = minibatch(states=torch.randn(B, R, 2))
    picked = select_rows(batch, torch.tensor([2, 0]))
    assert picked.answers.ids == ["row 2", "row 0"]

    def pairs(before, after):
        for f in dataclasses.fields(before):
            one, other = getattr(before, f.name), getattr(after, f.name)
            if isinstance(one, Batched):
                yield from pairs(one, other)
            elif isinstance(one, torch.Tensor):
                yield one, other

    tensors = list(pairs(batch, picked))
    assert len(tensors) == 6 + 6 + 7  # of answers, signal and credit
    for before, after in tensors:
        assert torch.equal(after, torch.stack([before[2], before[0]]))
    credit = picked.annotations
    assert (credit.scale, credit.kl_coef, picked.denominator) == (0.5, 0.1, 7.0)
    assert len(batch.answers.examples) == B


def test_select_rows_leaves_the_head_of_a_distribution_whole():
    batch = minibatch(states=torch.randn(B, R, 2))
    picked = select_rows(batch, torch.tensor([3]))
    assert picked.signal.distribution.head is batch.signal.distribution.head
    logits = batch.signal.distribution.logits(batch.signal.distribution.states)
    torch.testing.assert_close(picked.signal.distribution.logits(*picked.signal.distribution.token_args), logits[[3]])


def test_select_rows_keeps_absent_tensors_absent_and_allows_no_rows():
    assert select_rows(minibatch(), torch.tensor([1])).signal.distribution is None
    none = select_rows(minibatch(), torch.tensor([], dtype=torch.long))
    assert none.answers.examples == []
    assert none.annotations.advantages.shape == (0, R)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        minibatch().denominator = 1.0
