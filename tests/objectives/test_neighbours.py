"""Each neighbour against NumPy, row by row and token by token, and the property it is chosen for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.objectives.neighbours import (
    activation_boundaries,
    gradient_distance,
    gram_loss,
    input_gradient,
    logit_mse,
    minilm_relation,
    noisy_logits,
    tinybert_attention,
    tinybert_hidden,
)

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
LENGTHS = [5, 3]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def real_tokens(hidden):
    return [row[:n].numpy() for row, n in zip(hidden, LENGTHS, strict=True)]


@given(seeds)
@few
def test_logit_mse(seed):
    student, teacher = draw(seed, 2, 4, 3)
    assert float(logit_mse(student, teacher)) == pytest.approx(((student - teacher).numpy() ** 2).mean())
    assert float(logit_mse(teacher, teacher)) == 0


def test_noise_has_the_asked_moments_on_the_asked_share_of_rows():
    teacher = draw(0, 1, 3).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    ratio = noisy_logits(teacher, 0.4, 0.5, generator) / teacher - 1
    changed = (ratio.abs() > 1e-12).any(1)
    assert changed.double().mean().item() == pytest.approx(0.4, abs=0.02)
    assert ((ratio.abs() > 1e-12).all(1) == changed).all()
    assert ratio[changed].mean().item() == pytest.approx(0, abs=0.02)
    assert ratio[changed].std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(noisy_logits(teacher, 0.0, 0.5), teacher)


@given(seeds)
@few
def test_tinybert_hidden(seed):
    student, teacher, projection = draw(seed, 2, 5, 3), draw(seed + 1, 2, 5, 4), draw(seed + 2, 3, 4)
    errors = [
        (s @ projection.numpy() - t) ** 2 for s, t in zip(real_tokens(student), real_tokens(teacher), strict=True)
    ]
    expected = np.concatenate(errors).mean()
    assert float(tinybert_hidden(student, teacher, MASK, projection)) == pytest.approx(expected)
    assert float(tinybert_hidden(teacher, teacher, MASK)) == 0


@given(seeds)
@few
def test_tinybert_attention_looks_at_real_pairs_only(seed):
    student, teacher = draw(seed, 2, 2, 3, 5, 5)
    errors = [
        ((s[:, :n, :n] - t[:, :n, :n]).numpy() ** 2).ravel() for s, t, n in zip(student, teacher, LENGTHS, strict=True)
    ]
    student[1, :, :, 3:] = -torch.inf
    assert float(tinybert_attention(student, teacher, MASK)) == pytest.approx(np.concatenate(errors).mean())
    assert float(tinybert_attention(student, teacher, torch.zeros_like(MASK)).nan_to_num()) == 0


def test_pairs_that_a_model_may_not_attend_to_are_left_out():
    student, teacher = draw(0, 2, 1, 2, 3, 3)
    expected = (student - teacher).square()[..., 1:].mean()
    student[..., 0] = -torch.inf
    teacher[..., 0] = -torch.inf
    student.requires_grad_()
    loss = tinybert_attention(student, teacher, torch.ones(1, 3, dtype=torch.bool))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert student.grad.isfinite().all()
    broken = student.detach().clone()
    broken[0, 0, 1, 2] = torch.nan  # a fault is not a mask
    assert tinybert_attention(broken, teacher, torch.ones(1, 3, dtype=torch.bool)).isnan()


@given(seeds)
@few
def test_activation_boundaries(seed):
    """Heo et al., eq. 3, one neuron at a time."""
    student, teacher = draw(seed, 2, 2, 5, 3)
    costs = []
    for s, t in zip(real_tokens(student), real_tokens(teacher), strict=True):
        costs += [max(0, 1 - a) ** 2 if b > 0 else max(0, 1 + a) ** 2 for a, b in zip(s.flat, t.flat, strict=True)]
    assert float(activation_boundaries(student, teacher, MASK)) == pytest.approx(np.mean(costs))
    assert float(activation_boundaries(teacher.sign() * 1.5, teacher / 100, MASK)) == 0


@given(seeds)
@few
def test_gram_is_the_discrepancy_of_the_neurons(seed):
    """MMD^2 with (x . y)^2 over the two sets of neurons, from its definition."""
    student, teacher = draw(seed, 2, 5, 3), draw(seed + 1, 2, 5, 4)
    total = 0.0
    for s, t in zip(real_tokens(student), real_tokens(teacher), strict=True):
        s, t = s / np.linalg.norm(s, axis=0), t / np.linalg.norm(t, axis=0)
        total += ((t.T @ t) ** 2).mean() + ((s.T @ s) ** 2).mean() - 2 * ((s.T @ t) ** 2).mean()
    assert float(gram_loss(student, teacher, MASK)) == pytest.approx(total / len(LENGTHS))


def test_gram_does_not_know_the_order_or_the_sign_of_neurons():
    student, teacher = draw(0, 2, 5, 4), draw(1, 2, 5, 4)
    moved = -3 * student[..., [2, 0, 3, 1]]
    torch.testing.assert_close(gram_loss(moved, teacher, MASK), gram_loss(student, teacher, MASK))
    assert float(gram_loss(-teacher, teacher, MASK)) == pytest.approx(0, abs=1e-20)


@given(seed=seeds, heads=st.sampled_from([1, 2]))
@few
def test_minilm_relation(seed, heads):
    student, teacher = draw(seed, 2, 5, 4), draw(seed + 1, 2, 5, 6)
    terms = []
    for s, t in zip(real_tokens(student), real_tokens(teacher), strict=True):
        for h in range(heads):
            own = [x[:, h * x.shape[1] // heads : (h + 1) * x.shape[1] // heads] for x in (s, t)]
            r_s, r_t = (softmax(x @ x.T / np.sqrt(x.shape[1])) for x in own)
            terms += list((r_t * np.log(r_t / r_s)).sum(-1))
    assert float(minilm_relation(student, teacher, MASK, heads)) == pytest.approx(np.mean(terms))
    rotation = torch.linalg.qr(draw(seed, 6, 6))[0]
    assert float(minilm_relation(teacher @ rotation, teacher, MASK, 1)) == pytest.approx(0, abs=1e-12)


def test_input_gradients_of_linear_models_are_their_weights():
    inputs = [draw(0, 2, 3, 4).requires_grad_() for _ in range(2)]
    student, teacher = draw(1, 2, 12, 5)
    student.requires_grad_()
    logits = [x.flatten(1) @ w for x, w in zip(inputs, (student, teacher), strict=True)]
    labels = logits[1].argmax(-1)
    theirs = input_gradient(logits[1], labels, inputs[1])
    loss = gradient_distance(input_gradient(logits[0], labels, inputs[0], differentiable=True), theirs)
    unit = [(w / w.norm(dim=0)).detach() for w in (student, teacher)]
    expected = torch.stack([(unit[0] - unit[1])[:, c].square().sum() for c in labels]).mean()
    torch.testing.assert_close(loss.detach().double(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noisy_logits(torch.ones(2, 2), 1.5, 0.1), r"probability = 1.5"),
        (lambda: noisy_logits(torch.ones(2, 2), 0.5, -1), r"deviation = -1"),
        (lambda: tinybert_hidden(torch.ones(2, 5, 3), torch.ones(2, 5, 4), MASK), "give a projection"),
        (lambda: tinybert_attention(torch.ones(2, 2, 5, 5), torch.ones(2, 4, 5, 5), MASK), "minilm_relation"),
        (lambda: minilm_relation(torch.ones(2, 5, 4), torch.ones(2, 5, 6), MASK, 4), "relation_heads = 4"),
        (lambda: gradient_distance(torch.ones(2, 5, 3), torch.ones(2, 5, 4)), "equal embeddings' widths"),
        (lambda: activation_boundaries(torch.ones(2, 5, 3), torch.ones(2, 5, 4), MASK), "project the student's"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "loss", [tinybert_hidden, gram_loss, activation_boundaries, lambda s, t, m: minilm_relation(s, t, m, 2)]
)
def test_padding_changes_nothing_and_the_teacher_gets_no_gradient(loss):
    student, teacher = draw(0, 2, 2, 5, 4)
    plain = loss(student, teacher, MASK)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 2), value=3.0).requires_grad_() for x in (student, teacher)]
    mask = torch.nn.functional.pad(MASK, (0, 2))
    value = loss(*wide, mask)
    torch.testing.assert_close(value.detach(), plain)
    value.backward()
    assert wide[0].grad[mask].abs().sum() > 0
    assert not wide[0].grad[~mask].any()
    assert wide[1].grad is None
