"""The hand-worked trees exactly, the vectorised tree against plain Python, padding and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import ConfigError
from rlkd.objectives.attention_tree import (
    all_tokens,
    attention_tree,
    cls_token,
    random_tokens,
    rows_of_map,
    rows_of_query_key,
)
from rlkd.objectives.encoder import token_distance

few = settings(max_examples=40, deadline=None)

A1 = [
    [0.40, 0.05, 0.15, 0.30, 0.10],
    [0.10, 0.20, 0.35, 0.05, 0.30],
    [0.30, 0.05, 0.10, 0.35, 0.20],
    [0.20, 0.45, 0.04, 0.06, 0.25],
    [0.08, 0.06, 0.04, 0.02, 0.80],
]
A2 = [
    [0.15, 0.05, 0.45, 0.25, 0.10],
    [0.05, 0.10, 0.50, 0.04, 0.31],
    [0.20, 0.24, 0.16, 0.22, 0.18],
    [0.10, 0.15, 0.20, 0.25, 0.30],
    [0.02, 0.03, 0.05, 0.10, 0.80],
]
B1 = [
    [0.05, 0.10, 0.15, 0.20, 0.50],
    [0.50, 0.20, 0.15, 0.10, 0.05],
    [0.05, 0.50, 0.15, 0.20, 0.10],
    [0.10, 0.05, 0.50, 0.15, 0.20],
    [0.20, 0.10, 0.05, 0.50, 0.15],
]
B2 = [
    [0.02, 0.08, 0.10, 0.30, 0.50],
    [0.30, 0.10, 0.40, 0.15, 0.05],
    [0.45, 0.35, 0.10, 0.06, 0.04],
    [0.03, 0.07, 0.20, 0.25, 0.45],
    [0.11, 0.12, 0.13, 0.31, 0.33],
]
A3, B3 = [[.10,.40,.05,.30,.15]] + 4 * [[.2] * 5], [[.60,.05,.10,.05,.20]] + 4 * [[.2] * 5]  # fmt: skip
# fmt: off
# variant, whether token 4 is padding -> for each head the levels td(3), td(2), td(1) with multiplicity
WORKED = {
    ("algorithm1", False): ([[1, 3], [2, 4, 4, 3], [3, 0, 4, 0, 4, 0, 1, 4]],
                            [[0, 4], [4, 3, 4, 3], [3, 0, 2, 4, 3, 0, 2, 4]]),
    ("abstract", False): ([[0], [2, 3], [3, 0, 1, 4]], [[0], [4, 3], [3, 0, 2, 4]]),
    ("flow", False): ([[0], [1, 3], [2, 4, 4, 3]], [[0], [0, 4], [4, 3, 4, 3]]),
    ("algorithm1", True): ([[1, 3], [2, 1, 3, 2], [3, 0, 2, 1, 1, 0, 3, 0]],
                           [[0, 2], [3, 2, 0, 1], [2, 3, 1, 3, 3, 2, 0, 1]]),
}
# fmt: on


def worked_rows():
    return [rows_of_map(torch.tensor([pair])) for pair in ((A1, B1), (A2, B2), (A3, B3))]


def worked_tree(variant="algorithm1", padded=False, **options):
    valid = torch.tensor([[True, True, True, True, not padded]])
    return attention_tree(worked_rows(), valid, 2, 2, variant=variant, **options)


def counted(nodes, length=5):
    return torch.tensor([float(nodes.count(p)) for p in range(length)])


@pytest.mark.parametrize(("variant", "padded"), WORKED)
@pytest.mark.parametrize("with_multiplicity", [True, False])
def test_the_worked_example(variant, padded, with_multiplicity):
    tree = worked_tree(variant, padded, with_multiplicity=with_multiplicity)
    for head, levels in enumerate(WORKED[variant, padded]):
        for level, nodes in zip(reversed(tree), levels, strict=True):
            expected = counted(nodes)
            assert level[0, head].tolist() == (expected if with_multiplicity else expected.clamp(max=1)).tolist()


@pytest.mark.parametrize(("with_multiplicity", "total"), [(False, 34.0), (True, 56.0)])
def test_the_worked_sums(with_multiplicity, total):
    tree = worked_tree(with_multiplicity=with_multiplicity)
    student = 3 * [torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 5, 4)]
    teacher = 3 * [torch.tensor([0.0, 3.0, 0.0, 3.0]).expand(1, 5, 4)]
    assert float(token_distance(student, teacher, tree, reduction="sum")) == pytest.approx(total)
    assert float(token_distance(student, teacher, tree)) == pytest.approx(1.0)
    assert float(sum(level.sum() for level in tree)) == total / 2


def tree_in_words(maps, choosable, m, variant, exclude_self):
    """One head of one row, straight from the definition: lists of nodes with multiplicity, layer 1 first."""

    def top(k, p):
        allowed = [t for t in range(len(choosable)) if choosable[t] and not (exclude_self and t == p)]
        return sorted(allowed, key=lambda t: -maps[k - 1][p][t])[:m]

    K = len(maps)
    td = {K: top(K, 0) if variant == "algorithm1" else [0]}
    for k in range(K - 1, 0, -1):
        td[k] = [child for p in td[k + 1] for child in top(k + 1 if variant == "flow" else k, p)]
    return [td[k] for k in range(1, K + 1)]


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 9),
    layers=st.integers(1, 4),
    variant=st.sampled_from(["algorithm1", "abstract", "flow"]),
    exclude_self=st.booleans(),
    specials=st.booleans(),
)
@few
def test_vectorised_is_the_definition(seed, m, layers, variant, exclude_self, specials):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length = 3, 2, 7
    maps = torch.rand(layers, batch, heads, length, length, generator=generator, dtype=torch.float64).softmax(-1)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    choosable = torch.arange(length) < lengths[:, None]
    if specials:
        choosable[:, 0] = False
    for with_multiplicity in (True, False):
        tree = attention_tree(
            [rows_of_map(a) for a in maps], choosable, heads, m,
            variant=variant, with_multiplicity=with_multiplicity, exclude_self=exclude_self,
        )  # fmt: skip
        for b in range(batch):
            for h in range(heads):
                own = tree_in_words(maps[:, b, h].tolist(), choosable[b].tolist(), m, variant, exclude_self)
                for level, nodes in zip(tree, own, strict=True):
                    expected = counted(nodes, length)
                    expected = expected if with_multiplicity else expected.clamp(max=1)
                    assert level[b, h].tolist() == expected.tolist()


@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_rows_of_queries_and_keys_are_rows_of_the_map(mask):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 6, 4)
    bias = {"none": None, "boolean": torch.rand(2, 1, 6, 6) > 0.3, "added": torch.randn(1, 3, 6, 6)}[mask]
    scores = query @ key.transpose(2, 3) * 0.5
    if mask == "boolean":
        scores = scores.masked_fill(~bias, -torch.inf)
    if mask == "added":
        scores = scores + bias
    nodes = torch.randint(0, 6, (2, 3, 5))
    whole, own = rows_of_map(scores)(nodes), rows_of_query_key(query, key, [] if bias is None else [bias], 0.5)(nodes)
    torch.testing.assert_close(own, whole, atol=1e-6, rtol=1e-6)
    assert own[1, 2, 3].tolist() == pytest.approx(scores[1, 2, nodes[1, 2, 3]].tolist(), abs=1e-5)


def random_case(length=6, heads=2, layers=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand(batch, heads, length, length, generator=generator) for _ in range(layers)]
    valid = torch.arange(length) < torch.tensor([[length], [length - 2]])
    hidden = torch.randn(2, layers, batch, length, 8, generator=generator)
    return maps, valid, hidden


def test_the_gradient_reaches_the_chosen_slices_and_nothing_else():
    maps, valid, (student, teacher) = random_case()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    tree = attention_tree([rows_of_map(a) for a in maps], valid, 2, 1)
    token_distance(list(student), list(teacher), tree).backward()
    touched = student.grad.unflatten(-1, (2, 4)).abs().sum(-1).transpose(2, 3) > 0
    assert torch.equal(touched, torch.stack(tree) > 0)
    assert not torch.equal(touched, torch.ones_like(touched))
    assert teacher.grad is None


@pytest.mark.parametrize("variant", ["algorithm1", "abstract", "flow"])
def test_padding_changes_nothing(variant):
    maps, valid, (student, teacher) = random_case()
    wide = [torch.nn.functional.pad(a, (0, 3, 0, 3), value=9.0) for a in maps]  # padding attracts most attention
    trees = [
        attention_tree([rows_of_map(a) for a in given], mask, 2, 2, variant=variant)
        for given, mask in ((maps, valid), (wide, torch.nn.functional.pad(valid, (0, 3))))
    ]
    for narrow, broad in zip(*trees, strict=True):
        assert torch.equal(torch.nn.functional.pad(narrow, (0, 3)), broad)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=5.0) for x in (student, teacher)]
    one = token_distance(list(student), list(teacher), trees[0])
    other = token_distance(list(padded[0]), list(padded[1]), trees[1])
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_a_wide_enough_tree_is_every_token():
    maps, valid, (student, teacher) = random_case()
    tree = attention_tree([rows_of_map(a) for a in maps], valid, 2, 6)
    everything = [all_tokens(valid, 2)] * 3
    assert all(torch.equal(level, full) for level, full in zip(tree, everything, strict=True))
    assert token_distance(list(student), list(teacher), tree) == token_distance(
        list(student), list(teacher), everything
    )


def test_deep_trees_stay_finite():
    maps = [torch.rand(1, 2, 8, 8) for _ in range(40)]
    tree = attention_tree([rows_of_map(a) for a in maps], torch.ones(1, 8, dtype=torch.bool), 2, 8)
    assert all((level == 1).all() for level in tree)


@given(seed=st.integers(0, 10_000))
@few
def test_random_tokens_are_as_many_and_never_padding(seed):
    maps, valid, _ = random_case(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for level in attention_tree([rows_of_map(a) for a in maps], valid, 2, 2, with_multiplicity=True):
        drawn = random_tokens(level, valid, generator)
        assert torch.equal(drawn.sort(2).values, level.sort(2).values)
        assert not (drawn > 0)[~valid[:, None].expand_as(drawn)].any()


def test_random_tokens_reach_every_token_and_differ_between_heads_and_draws():
    valid = torch.ones(1, 6, dtype=torch.bool)
    level = torch.zeros(1, 2, 6)
    level[..., 0] = 1
    torch.manual_seed(0)
    draws = torch.stack([random_tokens(level, valid) for _ in range(200)])
    assert (draws.mean(0) > 0.08).all()
    assert (draws[:, 0, 0] != draws[:, 0, 1]).any()


def test_the_cls_selection():
    assert cls_token(torch.ones(2, 4, dtype=torch.bool)).tolist() == [[[1, 0, 0, 0]]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m = 0"),
        ({"variant": "depth"}, "variant = 'depth': allowed are 'algorithm1'"),
        ({"rows": []}, "1 layer"),
    ],
)
def test_wrong_settings_are_named(options, message):
    given = {"rows": worked_rows(), "m": 2, "heads": 2, **options}
    with pytest.raises((ValueError, ConfigError), match=message):
        attention_tree(given.pop("rows"), torch.ones(1, 5, dtype=torch.bool), **given)
