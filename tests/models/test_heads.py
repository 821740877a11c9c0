import pytest
import torch
from torch.autograd import gradcheck

from rlkd.models.heads import Head

N, D, VALID, PADDED = 7, 4, 5, 8
CHUNKS = [1, 3, 1000]


def tensors(n=N, bias=True):
    """hidden [N, D], weight [V_padded, D], bias [V_padded] or None (leaves, float64) and ids [N]."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, offset = leaf(n, D), leaf(PADDED, D), leaf(PADDED) if bias else None
    return hidden, weight, offset, torch.randint(VALID, (n,), generator=generator)


def statistics(logits, ids, *extra):
    """Two outputs of different kinds, one of them using a further per-token argument."""
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, None]).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return chosen, entropy * extra[0] if extra else entropy


def plain(hidden, weight, bias, scale, ids, *extra):
    """The same with full logits: scale * h W^T + b, cut to the valid vocabulary."""
    logits = scale * hidden @ weight.T
    return statistics((logits if bias is None else logits + bias)[:, :VALID], ids, *extra)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_map_has_the_values_and_gradients_of_full_logits(chunk, bias, scale):
    hidden, weight, offset, ids = tensors(bias=bias)
    extra = torch.linspace(0.5, 2, N, dtype=torch.float64)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    cotangents = torch.linspace(-1, 1, 2 * N, dtype=torch.float64).view(2, N)
    results = []
    for outputs in (
        Head(weight, offset, scale, VALID).map(statistics, hidden, ids, extra, chunk_tokens=chunk),
        plain(hidden, weight, offset, scale, ids, extra),
    ):
        grads = torch.autograd.grad(sum((c * o).sum() for c, o in zip(cotangents, outputs, strict=True)), leaves)
        results.append([*outputs, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_map_passes_gradcheck(chunk):
    hidden, weight, bias, ids = tensors()

    def f(hidden, weight, bias):
        return Head(weight, bias, 0.5, VALID).map(statistics, hidden, ids, chunk_tokens=chunk)

    assert gradcheck(f, (hidden, weight, bias))


def test_padded_vocabulary_enters_no_normaliser_and_gets_no_gradient():
    hidden, weight, bias, ids = tensors()
    outputs = Head(weight, bias, 1.0, VALID).map(statistics, hidden, ids)
    sum(o.sum() for o in outputs).backward()
    assert not weight.grad[VALID:].any()
    assert not bias.grad[VALID:].any()
    assert weight.grad[:VALID].abs().sum(1).all()
    with torch.no_grad():
        weight[VALID:] = 100.0
        changed = Head(weight, bias, 1.0, VALID).map(statistics, hidden, ids)
    for before, after in zip(outputs, changed, strict=True):
        assert torch.equal(before, after)


def test_one_output_may_be_left_out_of_the_loss():
    hidden, weight, bias, ids = tensors()
    chosen, _ = Head(weight, bias, 1.0, VALID).map(statistics, hidden, ids, chunk_tokens=2)
    got = torch.autograd.grad(chosen.sum(), hidden)[0]
    want = torch.autograd.grad(plain(hidden, weight, bias, 1.0, ids)[0].sum(), hidden)[0]
    torch.testing.assert_close(got, want)


def test_an_output_that_needs_no_gradient_is_allowed():
    """A statistic like the argmax may be combined with differentiable ones."""
    hidden, weight, bias, ids = tensors()

    def f(logits, ids):
        return statistics(logits, ids)[0], logits.argmax(-1)

    chosen, best = Head(weight, bias, 1.0, VALID).map(f, hidden, ids, chunk_tokens=2)
    chosen.sum().backward()
    assert torch.equal(best, (hidden @ weight.T + bias)[:, :VALID].argmax(-1))
    assert hidden.grad.abs().sum() > 0


def test_no_tokens_at_all():
    hidden, weight, bias, ids = tensors(n=0)
    outputs = Head(weight, bias, 1.0, VALID).map(statistics, hidden, ids)
    assert [o.shape for o in outputs] == [(0,), (0,)]
    sum(o.sum() for o in outputs).backward()
    assert not weight.grad.any()
    assert hidden.grad.shape == (0, D)


def test_frozen_weights_get_no_gradient_and_hidden_states_do():
    hidden, weight, bias, ids = tensors()
    head = Head(weight.detach(), bias.detach(), 1.0, VALID)
    got = torch.autograd.grad(head.map(statistics, hidden, ids)[0].sum(), hidden)[0]
    want = torch.autograd.grad(plain(hidden, weight, bias, 1.0, ids)[0].sum(), hidden)[0]
    torch.testing.assert_close(got, want)


def test_tied_weights_add_both_gradients():
    """The head's weight is also the embedding: its gradient is the sum over both uses."""
    _, weight, _, ids = tensors()
    tokens = torch.tensor([0, 3, 6, 1, 1, 2, 4])
    got = torch.autograd.grad(Head(weight, None, 0.5, VALID).map(statistics, weight[tokens], ids)[0].sum(), weight)[0]
    want = torch.autograd.grad(plain(weight[tokens], weight, None, 0.5, ids)[0].sum(), weight)[0]
    torch.testing.assert_close(got, want)


def test_autocast_does_not_round_logits():
    """The backward pass computes them again, outside autocast."""
    head = Head(torch.randn(9, D), torch.randn(9), 0.5, VALID)
    hidden, ids = 10 * torch.randn(N, D), torch.arange(N) % VALID
    want = head.map(statistics, hidden, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, head.map(statistics, hidden, ids), want))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_states_give_float32_logits_and_gradients_in_the_parameters_own_types(weights):
    hidden, weight, bias, ids = tensors()
    hidden, bias = hidden.detach().bfloat16().requires_grad_(), bias.detach().to(weights).requires_grad_()
    weight = weight.detach().to(weights).requires_grad_()
    head = Head(weight, bias, 0.5, VALID)
    assert head.logits(hidden).dtype == torch.float32
    chosen, _ = head.map(statistics, hidden, ids, chunk_tokens=3)
    chosen.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, weights, weights)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = torch.autograd.grad(plain(*leaves, 0.5, ids)[0].sum(), leaves)
    for got, exact in zip((hidden.grad, weight.grad, bias.grad), want, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=0.05, rtol=0.05)
