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


# The loss beside the logits

ROWS = [2, 0, 4, 1]  # tokens of each row, N together


def row_loss(weights):
    """A loss of rows that is not a sum over their tokens, and reads values: sum over rows of (sum_t w logp)^2 + ..."""

    def loss(rows, outputs, values):
        logps, entropy, best = outputs
        start = sum(ROWS[: rows.start])
        own = weights[start : start + len(logps)]
        total = (values * entropy + 0.5 * values.square()).sum()
        for part in (own * logps).split(ROWS[rows]):
            total = total + part.sum().square()
        return total, (rows, best)

    return loss


def with_best(logits, ids):
    return *statistics(logits, ids), logits.argmax(-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_has_the_value_and_gradients_of_full_logits(chunk, bias, monkeypatch):
    monkeypatch.setattr(Head, "_chunk_tokens", chunk)
    hidden, weight, offset, ids = tensors(bias=bias)
    values = torch.linspace(-1, 2, N, dtype=torch.float64).requires_grad_()
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64)
    leaves = [x for x in (hidden, weight, offset, values) if x is not None]
    head = Head(weight, offset, 0.5, VALID)
    total, others = head.loss(with_best, row_loss(weights), hidden, ids, row_tokens=ROWS, values=values)
    logits = 0.5 * hidden @ weight.T + (0 if offset is None else offset)
    every = slice(0, len(ROWS))
    want, _ = row_loss(weights)(every, with_best(logits[:, :VALID], ids), values)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
    # What follows in the graph counts: the trainer scales the loss.
    got = torch.autograd.grad(2.5 * total, leaves)
    for one, other in zip(got, torch.autograd.grad(2.5 * want, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # All rows, in order and whole; each output as `map` has it.
    assert [i for rows, _ in others for i in range(*rows.indices(99))] == list(range(len(ROWS)))
    assert torch.equal(torch.cat([best for _, best in others]), logits[:, :VALID].argmax(-1))
    largest = max(sum(ROWS[rows]) for rows, _ in others)
    assert largest <= max(chunk, max(ROWS))


def test_loss_without_gradients_and_of_frozen_weights():
    hidden, weight, bias, ids = tensors()
    values, weights = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)

    def total(weight, bias):
        head = Head(weight, bias, 1.0, VALID)
        return head.loss(with_best, row_loss(weights), hidden, ids, row_tokens=ROWS, values=values)[0]

    with torch.no_grad():
        assert not total(weight, bias).requires_grad
    frozen = torch.autograd.grad(total(weight.detach(), bias.detach()), hidden)[0]
    torch.testing.assert_close(frozen, torch.autograd.grad(total(weight, bias), hidden)[0])


def test_loss_gives_forbidden_tokens_no_gradient(monkeypatch):
    """As `map` does: the first token of every row is banned, and one more is forced."""
    monkeypatch.setattr(Head, "_chunk_tokens", 3)
    hidden, weight, bias, ids = tensors()
    ids = ids.clamp(min=1)
    limits = torch.full((N, 2), -1)
    limits[:, 1] = 0
    limits[4, 0] = ids[4]
    head, w = Head(weight, bias, 1.0, VALID), torch.linspace(1, 2, N, dtype=torch.float64)

    def loss(rows, outputs, values):
        start = sum(ROWS[: rows.start])
        return (w[start : start + len(outputs[0])] * (outputs[0] + outputs[1])).sum(), None

    values = torch.zeros(N, dtype=torch.float64)
    total, _ = head.loss(statistics, loss, hidden, ids, row_tokens=ROWS, values=values, limits=limits)
    chosen, entropy = head.map(statistics, hidden, ids, limits=limits)
    leaves = (hidden, weight, bias)
    got, want = torch.autograd.grad(total, leaves), torch.autograd.grad((w * (chosen + entropy)).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert got[2][0] == 0
    assert not got[0][4].any()  # one token may follow: nothing to learn


def test_loss_of_no_tokens_at_all():
    hidden, weight, bias, ids = tensors(n=0)
    values = torch.zeros(0, dtype=torch.float64)

    def loss(rows, outputs, values):
        return outputs[0].sum(), outputs[0]

    total, (part,) = Head(weight, bias, 1.0, VALID).loss(
        statistics, loss, hidden, ids, row_tokens=[0, 0], values=values
    )
    total.backward()
    assert part.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_loss_of_half_precision_states(weights):
    hidden, weight, bias, ids = tensors()
    hidden, bias = hidden.detach().bfloat16().requires_grad_(), bias.detach().to(weights).requires_grad_()
    weight = weight.detach().to(weights).requires_grad_()

    def loss(rows, outputs, values):
        assert outputs[0].dtype == torch.float32
        return outputs[0].sum(), None

    head = Head(weight, bias, 0.5, VALID)
    total, _ = head.loss(statistics, loss, hidden, ids, row_tokens=ROWS, values=torch.zeros(N))
    total.backward()
    chosen, _ = head.map(statistics, hidden, ids)
    want = torch.autograd.grad(chosen.sum(), (hidden, weight, bias))
    for leaf, other in zip((hidden, weight, bias), want, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad, other)
