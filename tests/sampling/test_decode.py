import warnings

import numpy as np
import pytest
import torch

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.sampling.decode import decode, greedy, row_seed, sampler
from rlkd.tensors import pad_rows
from tiny import EOS, KINDS, PAD, VALID, tiny_bart, tiny_model, tiny_t5

PROMPTS = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] + [EOS] for i in range(12)]
CPU = torch.device("cpu")


def ending(kind):
    """A model whose greedy and sampled answers end at many different lengths."""
    if kind == "bart":
        return EncoderDecoder(tiny_bart(vocab=VALID, eos_bias=2.0, seed=2), VALID)
    model = tiny_t5(tied=False, vocab=VALID, seed=7, width=32)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3.0
    return EncoderDecoder(model, VALID)


def states_of(lm, prompts=PROMPTS):
    with torch.no_grad():
        return lm.prompt_states(prompts)


def answers_of(decoded):
    return [ids[mask].tolist() for ids, mask in zip(decoded.ids, decoded.mask, strict=True)]


def counted_steps(lm, monkeypatch):
    """Rows that each decoding step ran, recorded as it runs."""
    rows, start = [], EncoderDecoder.start

    def recording(self, states):
        state = start(self, states)
        step = state.step

        def counted(tokens):
            hidden = step(tokens)
            rows.append(len(hidden))
            return hidden

        state.step = counted
        return state

    monkeypatch.setattr(EncoderDecoder, "start", recording)
    return rows


# -- what is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_recorded_log_probs_are_those_of_teacher_forcing(kind, temperature):
    lm = EncoderDecoder(tiny_model(kind), VALID)
    seeds = range(len(PROMPTS))
    out = decode(
        lm,
        states_of(lm),
        sampler(list(seeds), 8, CPU),
        max_new_tokens=8,
        temperature=temperature,
    )
    for prompt, answer, logps, mask in zip(PROMPTS, answers_of(out), out.logps, out.mask, strict=True):
        decoder_input = torch.tensor([[lm.start_id, *answer[:-1]]])
        logits = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[0, :, :VALID]
        want = (logits / temperature).log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(logps[mask], want, atol=1e-5, rtol=1e-5)
    assert not out.logps[~out.mask].any()
    assert (out.ids[~out.mask] == PAD).all()


@pytest.mark.parametrize("kind", ["t5-untied", "bart"])
def test_end_of_sequence_ends_a_row_and_finished_says_so(kind):
    lm = ending(kind)
    out = decode(lm, states_of(lm), greedy, max_new_tokens=6)
    assert out.finished.any()
    assert not out.finished.all()
    for answer, finished in zip(answers_of(out), out.finished.tolist(), strict=True):
        assert EOS not in answer[:-1]
        assert finished == (answer[-1] == EOS)
        assert finished or len(answer) == 6


def test_end_of_sequence_as_the_last_allowed_token_is_finished():
    lm = ending("bart")
    lm.model.final_logits_bias[0, EOS] = 100.0
    out = decode(lm, states_of(lm), greedy, max_new_tokens=1)
    assert answers_of(out) == [[EOS]] * len(PROMPTS)
    assert out.finished.all()


# -- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5-untied", "bart"])
def test_greedy_equals_hf_generate_token_for_token_while_rows_end(kind, monkeypatch):
    lm = ending(kind)
    steps = counted_steps(lm, monkeypatch)
    out = decode(lm, states_of(lm), greedy, max_new_tokens=12)
    # The test means something only if rows ended at different times and were dropped on the way.
    assert len({len(a) for a in answers_of(out)}) >= 3
    assert len(set(steps)) >= 3
    ids, mask = pad_rows(PROMPTS, PAD)
    generated = lm.model.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=False, num_beams=1, max_new_tokens=12
    )
    for answer, row in zip(answers_of(out), generated[:, 1:].tolist(), strict=True):
        assert row[: len(answer)] == answer
        assert set(row[len(answer) :]) <= {PAD}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_uses_nothing_that_transformers_deprecates(kind):
    """Names changed in transformers 5.24; whichever version runs, users see no warning of it."""
    lm = ending(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(lm, states_of(lm), greedy, max_new_tokens=3)


# -- a row alone is the row in a batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5-untied", "bart"])
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_a_rows_answer_does_not_depend_on_its_batch(kind, mode, monkeypatch):
    lm = ending(kind)
    states = states_of(lm)

    def run(rows):
        choose = greedy if mode == "greedy" else sampler([row_seed(0, i) for i in rows], 12, CPU)
        return decode(lm, [states[i] for i in rows], choose, max_new_tokens=12)

    steps = counted_steps(lm, monkeypatch)
    together = run(range(len(PROMPTS)))
    assert len(set(steps)) >= 3
    reverse = run(range(len(PROMPTS) - 1, -1, -1))
    assert answers_of(reverse) == answers_of(together)[::-1]
    for i, answer in enumerate(answers_of(together)):
        alone = run([i])
        assert answers_of(alone) == [answer]
        assert alone.finished[0] == together.finished[i]
        torch.testing.assert_close(alone.logps[0], together.logps[i][together.mask[i]], atol=1e-5, rtol=1e-5)


# -- sampling ------------------------------------------------------------------------------------------------------


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_sampled_frequencies_match_the_distribution():
    """Chi-square with 7 degrees of freedom: 24.3 is exceeded once in a thousand times; the seeds are fixed."""
    n, p = 20_000, np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01])
    log_probs = torch.tensor(np.log(p)).float().expand(n, -1)
    choose = sampler(list(range(n)), 2, CPU)
    first, second = (choose(log_probs, torch.arange(n), t).numpy() for t in range(2))
    for tokens in (first, second):
        assert chi_square(np.bincount(tokens, minlength=8), p) < 24.3
    # Consecutive draws of a row are independent: 63 degrees of freedom.
    pairs = np.bincount(first * 8 + second, minlength=64)
    assert chi_square(pairs, np.outer(p, p).ravel()) < 103.4


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@torch.no_grad()
def test_the_models_first_token_is_sampled_at_the_given_temperature(temperature):
    lm, n = EncoderDecoder(tiny_t5(seed=1), VALID), 4000
    (state,) = states_of(lm, [[5, 6, EOS]])
    out = decode(lm, [state] * n, sampler(list(range(n)), 1, CPU), max_new_tokens=1, temperature=temperature)
    start = torch.tensor([[lm.start_id]])
    logits = lm.model(input_ids=torch.tensor([[5, 6, EOS]]), decoder_input_ids=start).logits[0, 0, :VALID]
    p = (logits / temperature).softmax(-1).double().numpy()
    counts = np.bincount(out.ids[:, 0].numpy(), minlength=VALID)
    # Tokens too rare for the approximation are counted together; the bound is the 0.999 quantile at 31 degrees.
    common = p * n >= 5
    grouped = [np.append(x[common], x[~common].sum()) for x in (counts, p)]
    if grouped[1][-1] * n < 5:
        grouped = [np.append(x[:-2], x[-2:].sum()) for x in grouped]
    assert chi_square(*grouped) < 61.1
    other = (logits / (temperature * 1.5)).softmax(-1).double().numpy()
    assert chi_square(counts[common], other[common] / other[common].sum()) > 61.1


def test_tokens_beyond_the_valid_vocabulary_are_never_chosen():
    lm = EncoderDecoder(tiny_bart(), VALID)
    lm.model.final_logits_bias[0, VALID:] = 50.0
    for choose in (greedy, sampler(list(range(len(PROMPTS))), 8, CPU)):
        out = decode(lm, states_of(lm), choose, max_new_tokens=8)
        assert (out.ids < VALID).all()
        assert (out.logps[out.mask] > -20).all()  # normalised without them


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniforms_choose_only_tokens_that_have_probability(uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), uniform, dtype=torch.float64))
    choose = sampler([0], 1, CPU)
    log_probs = torch.tensor([[-torch.inf, np.log(0.4), np.log(0.6), -torch.inf]])
    assert int(choose(log_probs, torch.tensor([0]), 0)) == (1 if uniform == 0 else 2)


def test_a_larger_limit_does_not_change_how_an_answer_begins():
    lm = ending("bart")
    short, long = (
        answers_of(decode(lm, states_of(lm), sampler(list(range(12)), n, CPU), max_new_tokens=n)) for n in (5, 40)
    )
    assert [a[:5] for a in long] == short


def test_row_seeds_are_stable_and_distinct():
    assert row_seed(1, "dev-7", 0) == row_seed(1, "dev-7", 0) < 2**63
    assert row_seed() == 0xE3B0C44298FC1C14 >> 1  # the empty SHA-256: the same on every machine
    assert len({row_seed(s, i, k) for s in range(3) for i in ("1", "11") for k in range(3)}) == 18
    assert row_seed(1, 23) != row_seed(12, 3)


@torch.no_grad()
def test_sampling_reaches_the_whole_of_a_large_vocabulary():
    """Tokens beyond the 50 most probable ones, where transformers' own sampling stops, come as often as they should."""
    model = tiny_t5(tied=False, vocab=300, seed=4)
    model.lm_head.weight.mul_(0.05)
    lm = EncoderDecoder(model, 300)
    out = decode(lm, states_of(lm, [[3, EOS]] * 2000), sampler(list(range(2000)), 1, CPU), max_new_tokens=1)
    p = model(input_ids=torch.tensor([[3, EOS]]), decoder_input_ids=torch.tensor([[PAD]])).logits[0, 0].softmax(-1)
    beyond = p.argsort(descending=True)[50:]
    mass, share = float(p[beyond].sum()), float(torch.isin(out.ids, beyond).float().mean())
    assert 0.6 < mass < 0.9
    assert abs(share - mass) < 4 * (mass * (1 - mass) / 2000) ** 0.5
    torch.testing.assert_close(out.logps[:, 0], p.log()[out.ids[:, 0]], atol=1e-5, rtol=1e-5)
