import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.tensors import (
    length_mask,
    masked_mean,
    masked_moments,
    moments_to_mean_std,
    pad_rows,
    pad_stack,
    unpack,
)

few = settings(max_examples=15, deadline=None)


def batch(seed, rows=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[0, 0] = mask[-1, -1] = True
    x = 3 * torch.randn(rows, width, generator=generator) + 10
    return torch.where(mask, x, 1e4), mask


def test_masked_mean_ignores_padding_and_is_zero_of_nothing():
    x, mask = batch(0)
    assert float(masked_mean(x, mask)) == pytest.approx(x[mask].numpy().mean(), rel=1e-6)
    assert float(masked_mean(x, torch.zeros_like(mask))) == 0


@given(st.integers(0, 10_000), st.integers(1, 4))
@few
def test_moments_of_the_parts_add_up_to_those_of_the_whole(seed, cut):
    x, mask = batch(seed)
    moments = masked_moments(x[:cut], mask[:cut]) + masked_moments(x[cut:], mask[cut:])
    mean, std = moments_to_mean_std(moments)
    assert mean == pytest.approx(x[mask].double().numpy().mean())
    assert std == pytest.approx(np.std(x[mask].double().numpy()))


def test_a_deviation_is_not_bounded_below():
    assert moments_to_mean_std(masked_moments(torch.full((2, 3), 2.0), torch.ones(2, 3).bool())) == (2.0, 0.0)


def test_token_ids_are_padded_on_the_right_and_masked_by_length():
    ids, mask = pad_rows([[1, 9], [3], [4, 5, 6]], value=9)
    assert ids.tolist() == [[1, 9, 9], [3, 9, 9], [4, 5, 6]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True] * 3]


@pytest.mark.parametrize("rest", [(), (4,), (2, 3)])
def test_unpacking_undoes_packing_and_hands_gradients_back(rest):
    _, mask = batch(3)
    packed = torch.randn(int(mask.sum()), *rest, dtype=torch.float64, requires_grad=True)
    grid = unpack(packed, mask)
    assert grid.shape == (*mask.shape, *rest)
    assert torch.equal(grid[mask], packed)
    assert not grid[~mask].any()
    weights = torch.randn_like(grid)
    (grid * weights).sum().backward()
    assert torch.equal(packed.grad, weights[mask])


def test_pad_stack_and_length_mask():
    padded = pad_stack([torch.tensor([1, 2, 3]), torch.tensor([4])], value=9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad_stack([torch.ones(2, 4), torch.ones(1, 4)]).shape == (2, 2, 4)
    assert length_mask([3, 1]).tolist() == [[True, True, True], [True, False, False]]
    assert length_mask(torch.tensor([0, 2]), width=4).tolist() == [[False] * 4, [True, True, False, False]]
