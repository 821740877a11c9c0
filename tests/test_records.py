import dataclasses

import pytest
import torch

from rlkd.records import Example, Minibatch, Rollouts, TeacherScores, select_rows

B, R = 4, 3


def grid(offset=0.0):
    return torch.arange(B * R, dtype=torch.float32).view(B, R) + offset


def minibatch(hidden=None):
    examples = [Example(f"row {i}", f"s{i}", (f"t{i}",)) for i in range(B)]
    ids, mask = grid().long(), torch.ones(B, R).bool()
    rollouts = Rollouts(examples, ids, mask, ids + 1, mask, grid(0.5), torch.arange(B) % 2 == 0)
    scores = TeacherScores(*(grid(i) for i in range(5)), hidden=hidden)
    grids = {
        f.name: grid(10 + i)
        for i, f in enumerate(dataclasses.fields(Minibatch))
        if f.default is dataclasses.MISSING and f.name not in ("rollouts", "scores")
    }
    return Minibatch(rollouts, scores, **grids, reward_scale=0.5, kl_coef=0.1, denominator=7.0)


def test_select_rows_takes_the_same_rows_of_everything_nested_or_not():
    batch = minibatch(hidden=torch.randn(B, R, 2))
    picked = select_rows(batch, torch.tensor([2, 0]))
    assert [e.id for e in picked.rollouts.examples] == ["row 2", "row 0"]

    def pairs(before, after):
        for f in dataclasses.fields(before):
            one, other = getattr(before, f.name), getattr(after, f.name)
            if dataclasses.is_dataclass(one):
                yield from pairs(one, other)
            elif isinstance(one, torch.Tensor):
                yield one, other

    tensors = list(pairs(batch, picked))
    assert len(tensors) == 6 + 6 + 6
    for before, after in tensors:
        assert torch.equal(after, torch.stack([before[2], before[0]]))
    assert (picked.reward_scale, picked.kl_coef, picked.denominator) == (0.5, 0.1, 7.0)
    assert len(batch.rollouts.examples) == B


def test_select_rows_keeps_absent_tensors_absent_and_allows_no_rows():
    assert select_rows(minibatch(), torch.tensor([1])).scores.hidden is None
    none = select_rows(minibatch(), torch.tensor([], dtype=torch.long))
    assert none.rollouts.examples == []
    assert none.advantages.shape == (0, R)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        minibatch().denominator = 1.0
