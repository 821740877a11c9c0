"""Each term of the one loss against NumPy, and what the presets turn on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import ConfigError
from rlkd.objectives.attention_tree import all_tokens, cls_token
from rlkd.objectives.encoder import cross_entropy, soft_cross_entropy, token_distance, weighted_terms
from rlkd.trainers.encoders.terms import PRESETS

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)

TERMS = ("ce", "kd", "pt", "td_student", "td_teacher", "td_random", "all")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(seed=seeds, temperature=st.sampled_from([1.0, 5.0, 20.0]))
@few
def test_soft_cross_entropy_against_numpy(seed, temperature):
    student, teacher = draw(seed, 2, 4, 3)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    assert float(soft_cross_entropy(student, teacher, temperature)) == pytest.approx(expected)
    assert float(soft_cross_entropy(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_cross_entropy_skips_rows_without_a_label():
    logits = draw(0, 3, 4).requires_grad_()
    log_p = np.log(softmax(logits.detach().numpy()))
    assert cross_entropy(logits, torch.tensor([2, -100, 0])).item() == pytest.approx(-(log_p[0, 2] + log_p[2, 0]) / 2)
    nothing = cross_entropy(logits, torch.full((3,), -100))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()


@given(seed=seeds, normalise=st.booleans(), heads=st.sampled_from([1, 2, 4]))
@few
def test_token_distance_against_numpy(seed, normalise, heads):
    layers, batch, length, width = 2, 3, 4, 8
    student, teacher = draw(seed, 2, layers, batch, length, width)
    counts = torch.randint(0, 3, (layers, batch, heads, length), generator=torch.Generator().manual_seed(seed)).double()
    total = 0.0
    for k, b, h, p in np.ndindex(*counts.shape):
        own = slice(h * width // heads, (h + 1) * width // heads)
        s, t = student[k, b, p, own].numpy(), teacher[k, b, p, own].numpy()
        if normalise:
            s, t = s / np.linalg.norm(s), t / np.linalg.norm(t)
        total += float(counts[k, b, h, p]) * ((s - t) ** 2).sum()
    for reduction, denominator in (("sum", 1.0), ("mean", max(float(counts.sum()) * width / heads, 1))):
        value = token_distance(list(student), list(teacher), list(counts), normalise=normalise, reduction=reduction)
        assert float(value) == pytest.approx(total / denominator)
    same = token_distance(list(teacher), list(teacher), list(counts), normalise=normalise)
    assert float(same) == 0


def test_patience_is_the_mean_squared_error_of_cls():
    """Eq. 7, and PKD as its authors ran it (not normalised), as torch.nn.functional.mse_loss has it."""
    student, teacher = draw(0, 2, 3, 2, 5, 8)
    select = [cls_token(torch.ones(2, 5))] * 3
    plain = torch.nn.functional.mse_loss(student[:, :, 0], teacher[:, :, 0])
    assert float(token_distance(list(student), list(teacher), select, normalise=False)) == pytest.approx(float(plain))
    unit = [x[:, :, 0] / x[:, :, 0].norm(dim=-1, keepdim=True) for x in (student, teacher)]
    assert float(token_distance(list(student), list(teacher), select)) == pytest.approx(
        float(torch.nn.functional.mse_loss(*unit))
    )


def test_normalised_slices_do_not_know_their_length():
    student, teacher = draw(1, 2, 1, 2, 3, 8)
    select = [all_tokens(torch.ones(2, 3, dtype=torch.bool), 2)]
    one = token_distance(list(student), list(teacher), select)
    assert float(token_distance(list(7 * student), list(teacher / 3), select)) == pytest.approx(float(one))
    assert 0 < float(one) <= 4 / 4  # at most 4 a node, d = 4


@pytest.mark.parametrize(("width", "heads"), [((8, 6), 2), ((8, 8), 3)])
def test_slices_that_do_not_fit_are_refused(width, heads):
    with pytest.raises(ValueError, match="multiple of the heads"):
        token_distance([torch.ones(1, 2, width[0])], [torch.ones(1, 2, width[1])], [torch.ones(1, heads, 2)])


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match="reduction = 'median': allowed are 'mean', 'sum'"):
        token_distance([torch.ones(1, 2, 4)], [torch.ones(1, 2, 4)], [torch.ones(1, 2, 2)], reduction="median")


TABLE_1 = """
preset        ce  kd  pt  td_student td_teacher td_random all
ft            x   .   .   .          .          .         .
kd            x   x   .   .          .          .         .
pkd           x   x   x   .          .          .         .
tkd           x   x   x   x          .          .         .
teacher-tkd   x   x   x   .          x          .         .
t-s-tkd       x   x   x   x          x          .         .
rand          x   x   x   .          .          x         .
all           x   x   x   .          .          .         x
all-tkd       x   x   x   x          .          .         x
all-t-tkd     x   x   x   .          x          .         x
all-t-s-tkd   x   x   x   x          x          .         x
"""


def test_presets_are_table_1_of_the_paper():
    header, *rows = [line.split() for line in TABLE_1.strip().splitlines()]
    assert tuple(header[1:]) == TERMS
    table = {name: tuple(t for t, on in zip(TERMS, marks, strict=True) if on == "x") for name, *marks in rows}
    assert dict(list(PRESETS.items())[: len(table)]) == table


def test_weighted_terms():
    terms = {"ce": torch.tensor(2.0), "pt": torch.tensor(3.0)}
    assert weighted_terms(terms, {"ce": 0.5, "pt": 10.0, "kd": 7.0}) == {"ce": 1.0, "pt": 30.0}
