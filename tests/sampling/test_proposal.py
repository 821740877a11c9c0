"""What rollouts are drawn from, against full logits of both models: recorded log-probabilities, frequencies, rules."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.policy import Policy
from rlkd.models.teacher import Teacher
from rlkd.records import Example
from rlkd.sampling.proposal import Proposal, truncate
from rlkd.sampling.rollouts import sample_rollouts
from tiny import EOS, tiny_t5, tiny_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "copy", ":"]
VALID, PADDED = len(WORDS), len(WORDS) + 4
TOKENIZER = tiny_tokenizer(WORDS)
EXAMPLES = [Example(f"row {i}", " ".join("abcab"[: 1 + i]), (f"copy : {'abc'[i % 3]}", "b a")) for i in range(4)]


def model_of(seed, width=16):
    """A random model whose answers end at different places."""
    model = tiny_t5(seed=seed, tied=False, vocab=PADDED, width=width)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.weight[VALID:] *= 100.0  # rows that are no tokens
    return model


@pytest.fixture(scope="module")
def policy():
    return Policy(EncoderDecoder(model_of(11), VALID))


@pytest.fixture(scope="module")
def teacher():
    return Teacher(EncoderDecoder(model_of(2, width=24), VALID), TOKENIZER, append_eos=False)


def draw(policy, examples=EXAMPLES, k=3, most=6, seed=(0,), **settings):
    limits = {"max_input_tokens": 16, "max_new_tokens": most}
    return sample_rollouts(
        policy, TOKENIZER, examples, rollouts_per_prompt=k, seed=seed, proposal=Proposal(**settings), **limits
    )


def full_logits(model, text, answer, *, append_eos=True):
    """[T, V] of every position of an answer, one unpadded row."""
    prompt = TOKENIZER(text, add_special_tokens=append_eos)["input_ids"]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]]))
    return out.logits[0, :, :VALID].double()


def expected(policy, teacher, example, answer, settings):
    """mu [T, V], the policy's own distribution [T, V] and the probability cut [T], by NumPy from the formula."""
    f = full_logits(policy.student, example.student_input, answer).numpy()
    own = np.exp(f - f.max(-1, keepdims=True))
    own /= own.sum(-1, keepdims=True)
    heat = np.exp((f - f.max(-1, keepdims=True)) / settings.get("temperature", 1.0))
    heat /= heat.sum(-1, keepdims=True)
    cut = np.zeros(len(f))
    for t, row in enumerate(heat):
        kept, reached = [], 0.0
        for token in sorted(range(VALID), key=lambda a: -row[a]):
            if reached < settings.get("top_p", 1.0):
                kept.append(token)
                reached += row[token]
        cut[t] = 1 - reached
        heat[t] = [row[a] / reached if a in kept else 0.0 for a in range(VALID)]
    texts = example.teacher_inputs
    logs = [full_logits(teacher.lm.model, text, answer, append_eos=False).log_softmax(-1).numpy() for text in texts]
    p = np.exp(np.mean(logs, 0))
    p /= p.sum(-1, keepdims=True)
    alpha = settings.get("teacher_mix", 0.0)
    return (1 - alpha) * heat + alpha * p, own, cut


SETTINGS = [
    {"temperature": 0.5},
    {"top_p": 0.6},
    {"teacher_mix": 0.4},
    {"temperature": 2.0, "top_p": 0.8, "teacher_mix": 0.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_recorded_is_what_was_drawn_from(policy, teacher, settings):
    answers = draw(policy, k=8, **settings, teacher=teacher)
    lengths = answers.answer_mask.sum(1).tolist()
    assert len(set(lengths)) > 2  # rows were dropped on the way
    for i, example in enumerate(answers.examples):
        answer = answers.answer_ids[i, : lengths[i]].tolist()
        mu, own, cut = expected(policy, teacher, example, answer, settings)
        chosen = (range(len(answer)), answer)
        assert max(answer) < VALID
        for got, want in ((answers.behaviour_logps, mu), (answers.policy_logps, own)):
            np.testing.assert_allclose(got[i, : lengths[i]], np.log(want[chosen]), atol=2e-5)
            assert not got[i, lengths[i] :].any()
        if "top_p" in settings:
            np.testing.assert_allclose(answers.cut_mass[i, : lengths[i]], cut, atol=2e-6)
    if "top_p" in settings:
        assert float(answers.cut_mass.max()) > 0.05
    else:
        assert answers.cut_mass is None


def test_plain_answers_are_their_own_record(policy, teacher):
    plain = draw(policy, teacher=teacher)
    assert plain.policy_logps is None
    assert plain.own_logps is plain.behaviour_logps


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pairs_of_first_tokens_follow_the_formula(policy, teacher, settings):
    """Chi-square of 6,000 beginnings of two tokens; another proposal fails the same test."""
    n, example = 6000, EXAMPLES[1]
    answers = draw(policy, [example], k=n, most=2, **settings, teacher=teacher)
    first = expected(policy, teacher, example, [0], settings)[0][0]
    table = np.zeros((VALID, VALID))
    for a in range(VALID):
        if a == EOS:
            table[a, 0] = first[a]
        else:
            table[a] = first[a] * expected(policy, teacher, example, [a, 0], settings)[0][1]
    ids = answers.answer_ids.numpy()
    counts = np.bincount(ids[:, 0] * VALID + np.where(ids[:, 0] == EOS, 0, ids[:, 1]), minlength=VALID**2)

    def chi_square(probabilities):
        common = probabilities * n > 5
        rest = max(probabilities[~common].sum() * n, 1.0)
        excess = (counts[common] - probabilities[common] * n) ** 2 / (probabilities[common] * n)
        return excess.sum() + (counts[~common].sum() - rest) ** 2 / rest, int(common.sum())

    statistic, cells = chi_square(table.ravel())
    assert statistic < cells + 4 * (2 * cells) ** 0.5
    assert not counts[table.ravel() == 0].any()  # what top_p leaves out
    other = np.outer(*expected(policy, teacher, example, [0, 0], {})[0]).ravel()
    assert chi_square(other)[0] > 10 * statistic


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
def test_a_row_does_not_depend_on_its_batch(policy, teacher, settings):
    together = draw(policy, **settings, teacher=teacher)
    for i, example in enumerate(EXAMPLES):
        alone, rows = draw(policy, [example], **settings, teacher=teacher), slice(3 * i, 3 * i + 3)
        width = alone.answer_ids.shape[1]
        assert torch.equal(together.answer_ids[rows, :width], alone.answer_ids)
        for name in ("behaviour_logps", "policy_logps"):
            torch.testing.assert_close(getattr(together, name)[rows, :width], getattr(alone, name), rtol=0, atol=1e-5)
    backwards = draw(policy, EXAMPLES[::-1], **settings, teacher=teacher)
    order = [3 * (3 - i) + j for i in range(4) for j in range(3)]
    assert torch.equal(together.answer_ids, backwards.answer_ids[order])


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_the_rules_of_both_models_hold(whose):
    """What one of them must not write has no probability in its share; what the student must not, in none at all."""
    models = {"student": model_of(11), "teacher": model_of(2)}
    plain = Teacher(EncoderDecoder(models["teacher"], VALID), TOKENIZER)
    free = draw(Policy(EncoderDecoder(models["student"], VALID)), k=200, most=4, teacher_mix=0.5, teacher=plain)
    assert {3, 4} <= set(free.answer_ids[free.answer_mask].tolist())
    config = models[whose].generation_config
    config.suppress_tokens, config.forced_bos_token_id, config.no_repeat_ngram_size = [3], 4, 1
    answers = draw(Policy(EncoderDecoder(models["student"], VALID)), k=200, most=4, teacher_mix=0.5, teacher=plain)
    ids, mask = answers.answer_ids, answers.answer_mask
    if whose == "student":
        assert ids[:, 0].eq(4).all()
        assert answers.behaviour_logps[:, 0].abs().max() < 1e-6
        assert 3 not in ids[mask]
        assert all(len(set(row[m].tolist())) == int(m.sum()) for row, m in zip(ids, mask, strict=True))
        return
    # What the teacher may not write comes from the student alone: half its probability, and there the weight is 2.
    ratio = (answers.policy_logps - answers.behaviour_logps).exp()
    assert set(ids[:, 0].tolist()) > {4}
    torch.testing.assert_close(ratio[:, 0][ids[:, 0] != 4], torch.full_like(ratio[:, 0][ids[:, 0] != 4], 2.0))
    repeated = torch.stack([ids[:, t] == ids[:, 0] for t in range(4)], 1) & mask
    repeated[:, 0] = False
    for banned in (mask & ids.eq(3), repeated):
        assert banned.any()
        torch.testing.assert_close(ratio[banned], torch.full_like(ratio[banned], 2.0))


def test_a_prompt_is_encoded_once_for_all_its_answers_and_in_the_teachers_own_precision(policy):
    teacher = Teacher(EncoderDecoder(model_of(2), VALID), TOKENIZER)
    with torch.autocast("cpu", torch.bfloat16):
        draw(policy, [replace(e, teacher_inputs=("copy : a",)) for e in EXAMPLES], teacher_mix=0.2, teacher=teacher)
    assert (teacher.cache.misses, teacher.cache.hits) == (1, 0)
    (kept,) = teacher.prompt_states(["copy : a"])
    (fresh,) = Teacher(teacher.lm, TOKENIZER).prompt_states(["copy : a"])
    assert torch.equal(kept, fresh)


def test_truncation_keeps_the_token_that_crosses_the_limit():
    p = torch.tensor([[0.1, 0.5, 0.4], [0.4, 0.3, 0.3], [0.2, 0.1, 0.7]], dtype=torch.float64)
    kept, cut = truncate(p.log(), 0.6)
    want = [[0, 5 / 9, 4 / 9], [4 / 7, 3 / 7, 0], [0, 0, 1]]
    torch.testing.assert_close(kept.exp(), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(cut, torch.tensor([0.1, 0.3, 0.3], dtype=torch.float64))
    assert truncate(p.log(), 1.0)[0].equal(p.log())
    assert truncate(p.log(), 1e-9)[0].exp().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
