import dataclasses

import numpy as np
import pytest
import torch

from rlkd.errors import DivergenceError, ModelError
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.teacher import PromptCache, Teacher
from rlkd.objectives.rewards import expected_advantage, induced_advantage
from rlkd.tensors import pad_rows
from tiny import EOS, KINDS, PAD, VALID, tiny_model, tiny_teacher, tiny_tokenizer

ONE = ["copy a b c", "reverse d", "answer of 1 2 3 4 is", "m", "copy a b c"]
TWO = ["a b c :", "d", "is 1 2 3 4", "answer of m is", "a b c :"]
ANSWERS = torch.tensor(
    [
        [3, 4, 5, EOS, PAD],
        [6, EOS, PAD, PAD, PAD],
        [10, 11, 12, 13, 14],  # cut, not ended
        [EOS, PAD, PAD, PAD, PAD],
        [PAD, 4, EOS, PAD, PAD],  # a token that is the padding id, and counts
    ]
)
MASK = torch.arange(5)[None] < torch.tensor([4, 2, 5, 1, 3])[:, None]
SINGLE = [(text,) for text in ONE]
PAIRS = list(zip(ONE, TWO, strict=True))
FIELDS = ("chosen", "max", "logsumexp", "mean", "entropy")


@torch.no_grad()
def plain_logits(teacher, text, answer):
    """One row, no batch, no cache: logits [R, V] float64 for every token of `answer` from the model's own forward."""
    ids = teacher.tokenizer(text, add_special_tokens=teacher.append_eos)["input_ids"]
    start = teacher.lm.config.decoder_start_token_id
    out = teacher.lm.model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]]))
    return out.logits[0, :, :VALID].double().numpy()


def statistics(logits, answer):
    """The five fields from logits [R, V], in NumPy."""
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    log_p = logits - lse[:, None]
    chosen = np.array([logits[t, a] for t, a in enumerate(answer)])
    return np.stack([chosen, top, lse, logits.mean(-1), -(np.exp(log_p) * log_p).sum(-1)])


def row_answer(i):
    return ANSWERS[i][MASK[i]].tolist()


def stacked(scores):
    return torch.stack([getattr(scores, f) for f in FIELDS])


def assert_same(one, other, atol=1e-5):
    torch.testing.assert_close(stacked(one), stacked(other), atol=atol, rtol=1e-5)


# -- METHOD check 9: rewards belong to the row ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("append_eos", [True, False])
def test_scores_equal_full_logits_of_the_model_row_by_row(kind, append_eos):
    teacher = tiny_teacher(kind, append_eos=append_eos)
    scores = stacked(teacher.score(SINGLE, ANSWERS, MASK))
    for i, text in enumerate(ONE):
        want = statistics(plain_logits(teacher, text, row_answer(i)), row_answer(i))
        np.testing.assert_allclose(scores[:, i][:, MASK[i]].numpy(), want, atol=1e-5, rtol=1e-5)
    assert not scores[:, ~MASK].any()
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_scores_do_not_depend_on_batching_order_or_cache(kind, batch_tokens):
    reference = tiny_teacher(kind).score(PAIRS, ANSWERS, MASK)
    teacher = tiny_teacher(kind, batch_tokens=batch_tokens)
    cold, warm = (teacher.score(PAIRS, ANSWERS, MASK) for _ in range(2))
    assert_same(cold, reference)
    assert torch.equal(stacked(cold), stacked(warm))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = teacher.score([PAIRS[i] for i in order], ANSWERS[order], MASK[order])
    torch.testing.assert_close(stacked(shuffled), stacked(reference)[:, order], atol=1e-5, rtol=1e-5)
    for i in range(len(ONE)):
        alone = teacher.score([PAIRS[i]], ANSWERS[i : i + 1], MASK[i : i + 1])
        torch.testing.assert_close(stacked(alone)[:, 0], stacked(reference)[:, i], atol=1e-5, rtol=1e-5)


def test_wider_padding_and_other_padding_ids_change_nothing():
    teacher = tiny_teacher()
    reference = teacher.score(SINGLE, ANSWERS, MASK)
    wide = torch.cat([torch.where(MASK, ANSWERS, 7), torch.full((5, 3), 9)], 1)
    wide_mask = torch.cat([MASK, torch.zeros(5, 3).bool()], 1)
    scores = stacked(teacher.score(SINGLE, wide, wide_mask))
    torch.testing.assert_close(scores[..., :5], stacked(reference), atol=1e-5, rtol=1e-5)
    assert not scores[..., 5:].any()


def test_rows_without_any_token_are_zeros():
    scores = stacked(tiny_teacher().score(SINGLE[:2], ANSWERS[:2], torch.zeros_like(MASK[:2])))
    assert not scores.any()


def test_inputs_are_cut_to_the_limit():
    teacher = tiny_teacher(max_input_tokens=3)
    cut = tiny_teacher().score([("copy a",)], ANSWERS[:1], MASK[:1])
    assert_same(teacher.score([("copy a b c",)], ANSWERS[:1], MASK[:1]), cut)


# -- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["average", "pool"])
def test_identical_templates_score_as_one(combination):
    one = tiny_teacher().score(SINGLE, ANSWERS, MASK)
    three = tiny_teacher(combination=combination).score([(t, t, t) for t in ONE], ANSWERS, MASK)
    assert_same(three, one)


def test_average_is_the_mean_of_the_scores_under_each_template():
    teacher = tiny_teacher(combination="average")
    each = [stacked(teacher.score([(pair[k],) for pair in PAIRS], ANSWERS, MASK)) for k in range(2)]
    torch.testing.assert_close(stacked(teacher.score(PAIRS, ANSWERS, MASK)), (each[0] + each[1]) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_pool_is_the_renormalised_mean_log_probability(kind):
    teacher = tiny_teacher(kind, combination="pool")
    scores = teacher.score(PAIRS, ANSWERS, MASK)
    for i, texts in enumerate(PAIRS):
        answer = row_answer(i)
        log_p = np.mean(
            [(z := plain_logits(teacher, t, answer)) - statistics(z, answer)[2][:, None] for t in texts], axis=0
        )
        chosen, top, lse, _, entropy = statistics(log_p, answer)
        want = {"max": chosen - top, "lse": chosen - lse, "softmax": chosen - lse + entropy}
        for value, expected in want.items():
            got = induced_advantage(scores, value)[i][MASK[i]].numpy()
            np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)


def test_the_two_combinations_differ_when_the_templates_do():
    average, pool = (
        induced_advantage(tiny_teacher(combination=c).score(PAIRS, ANSWERS, MASK)) for c in ("average", "pool")
    )
    assert (average - pool).abs().max() > 1e-2


@pytest.mark.parametrize("combination", ["average", "pool"])
def test_hidden_states_give_exact_expectations_under_every_combination(combination):
    """E_pi[A_V] from the returned head inputs equals the expectation of the (combined) advantages, token by token."""
    teacher = tiny_teacher(combination=combination)
    scores = teacher.score(PAIRS, ANSWERS, MASK, distribution=True)
    student = torch.randn(int(MASK.sum()), VALID, generator=torch.Generator().manual_seed(0))
    logits = teacher.lm.head().logits(scores.distribution.states[MASK])
    got = expected_advantage(student, logits, scores.max[MASK])
    pi, rows = student.double().softmax(-1).numpy(), []
    for i, texts in enumerate(PAIRS):
        z = [plain_logits(teacher, t, row_answer(i)) for t in texts]
        z = z if combination == "average" else [np.mean(z, axis=0)]
        rows.append(np.mean([x - x.max(-1, keepdims=True) for x in z], axis=0))
    want = (pi * np.concatenate(rows)).sum(-1)
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5, rtol=1e-5)
    assert teacher.score(PAIRS, ANSWERS, MASK).distribution is None


# -- the cache -----------------------------------------------------------------------------------------------------


def test_every_prompt_is_encoded_once():
    teacher = tiny_teacher()
    teacher.score(SINGLE, ANSWERS, MASK)
    assert (teacher.cache.misses, teacher.cache.hits) == (4, 0)  # five rows, two of them alike
    teacher.score(SINGLE, ANSWERS, MASK)
    assert (teacher.cache.misses, teacher.cache.hits) == (4, 4)


def test_a_cache_that_holds_nothing_or_little_changes_no_score():
    reference = tiny_teacher().score(SINGLE, ANSWERS, MASK)
    for cache_bytes in (0, 5 * 16 * 4):
        teacher = tiny_teacher(cache_bytes=cache_bytes)
        for _ in range(2):
            assert_same(teacher.score(SINGLE, ANSWERS, MASK), reference)
        assert teacher.cache.bytes <= cache_bytes


def test_cache_drops_the_least_recently_used_first_and_stays_within_its_bytes():
    cache = PromptCache(max_bytes=3 * 8)
    for key in (1, 2, 3):
        cache.put((key,), torch.full((2,), float(key)))
    assert cache.get((1,)) is not None
    cache.put((4,), torch.zeros(2))
    kept = [key for key in (1, 2, 3, 4) if cache.get((key,)) is not None]
    assert kept == [1, 3, 4]
    assert cache.bytes == 24
    cache.put((5,), torch.zeros(4))  # frees space for two
    assert [key for key in (1, 3, 4, 5) if cache.get((key,)) is not None] == [4, 5]
    assert cache.bytes == 24
    cache.put((6,), torch.zeros(7))  # would never fit
    assert cache.get((6,)) is None
    assert cache.bytes == 24


def test_cached_states_do_not_keep_the_batch_they_were_cut_from():
    cache, batch = PromptCache(max_bytes=100), torch.zeros(1000, 2)
    cache.put((1,), batch[0])
    assert cache.get((1,)).untyped_storage().nbytes() == 8


# -- failures ------------------------------------------------------------------------------------------------------


def test_not_finite_scores_name_the_rows():
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.lm.model.shared.weight[teacher.tokenizer.convert_tokens_to_ids("m")] = torch.nan
    names = [f"dev-{i}" for i in range(5)]
    with pytest.raises(DivergenceError, match=r"not finite for 1 of 5 answers: dev-3\. Its weights are torch\.float32"):
        teacher.score(SINGLE, ANSWERS, MASK, ids=names)
    with pytest.raises(DivergenceError, match="row 3"):
        teacher.score(SINGLE, ANSWERS, MASK)
    with torch.no_grad():
        teacher.lm.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="5 of 5 answers: dev-0, dev-1, dev-2, dev-3, dev-4"):
        teacher.score(SINGLE, ANSWERS, MASK, ids=names)


def test_a_teacher_is_frozen_in_eval_mode():
    teacher = tiny_teacher()
    assert not teacher.lm.model.training
    assert not any(p.requires_grad for p in teacher.lm.model.parameters())
    scores = teacher.score(SINGLE, ANSWERS, MASK, distribution=True)
    found = [getattr(scores, f.name) for f in dataclasses.fields(scores)]
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert not any(t.requires_grad for t in [*tensors, scores.distribution.states])


# -- Out of memory -------------------------------------------------------------------------------------------------


def limit_rows(teacher, monkeypatch, rows):
    """The teacher runs out of memory on batches of more than `rows` rows."""
    lm, tried = type(teacher.lm), []

    def limited(forward):
        def call(self, states, *args):
            tried.append(len(states))
            if len(states) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, states, *args)

        return call

    for name in ("encode", "hidden"):
        monkeypatch.setattr(lm, name, limited(getattr(lm, name)))
    return tried


@pytest.mark.parametrize("rows", [1, 2])
def test_a_teacher_out_of_memory_scores_the_same_in_smaller_batches(monkeypatch, caplog, rows):
    reference = tiny_teacher().score(PAIRS, ANSWERS, MASK, distribution=True)
    teacher = tiny_teacher()
    teacher.batch_tokens = 64
    tried = limit_rows(teacher, monkeypatch, rows)
    scores = teacher.score(PAIRS, ANSWERS, MASK, distribution=True)
    assert max(tried) > rows
    assert_same(scores, reference)
    torch.testing.assert_close(scores.distribution.states, reference.distribution.states, atol=1e-5, rtol=1e-5)
    assert 1 <= teacher.batch_tokens < 64
    assert f"out of memory in the teacher: retrying with {teacher.batch_tokens} tokens per batch" in caplog.text
    # What fitted is kept: the next batch runs at once.
    tried.clear()
    teacher.score(PAIRS, ANSWERS, MASK)
    assert max(tried) <= rows


def test_a_teacher_without_room_for_one_row_says_so(monkeypatch):
    teacher = tiny_teacher()
    teacher.batch_tokens = 64
    limit_rows(teacher, monkeypatch, 0)
    with pytest.raises(ModelError, match="not even one row at a time"):
        teacher.score(PAIRS, ANSWERS, MASK)


def test_other_errors_of_the_teacher_are_not_taken_for_a_lack_of_memory(monkeypatch):
    teacher = tiny_teacher()
    monkeypatch.setattr(type(teacher.lm), "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.score(PAIRS, ANSWERS, MASK)
    assert teacher.batch_tokens == 4096


def test_a_teacher_given_in_training_mode_scores_without_dropout():
    ids, mask = pad_rows([[3, 4, EOS], [5, EOS]], 0)
    inputs = [("copy : 1",), ("copy : 2",)]
    scores = []
    for dropout in (0.0, 0.5):
        teacher = Teacher(EncoderDecoder(tiny_model("t5", dropout=dropout).train(), VALID), tiny_tokenizer())
        scores.append(teacher.score(inputs, ids, mask).chosen)
    torch.testing.assert_close(*scores, rtol=0, atol=0)
