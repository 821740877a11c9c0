"""Batches by token budget: order, size, and what happens when memory runs out."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.sampling.engines.protocol import Answer, Decoding
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.schedule import Budget, answer_all
from tiny import EOS, VALID, tiny_t5

GREEDY = Decoding("greedy", 4)
# The messages of PyTorch on a GPU and on a CPU, and of CTranslate2 on a GPU.
MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "CUDA failed with error out of memory",
]


class StubEngine:
    """Answers a prompt with its own first token and its seed; holds at most `memory` padded tokens."""

    name = "stub"

    def __init__(self, memory=10**9, message=MESSAGES[0], error=RuntimeError):
        self.memory, self.message, self.error = memory, message, error
        self.batches, self.failures = [], 0

    def identity(self):
        return {}

    def answer(self, prompts, seeds, decoding):
        new = decoding.labels_per_input * decoding.max_new_tokens
        if len(prompts) * (max(map(len, prompts)) + new) > self.memory:
            self.failures += 1
            raise self.error(self.message)
        self.batches.append([len(prompt) for prompt in prompts])
        return [[Answer([p[0], seed], [0.0, 0.0], True) for seed in row] for p, row in zip(prompts, seeds, strict=True)]


def work(lengths, n=1):
    prompts = [[100 + i] * length for i, length in enumerate(lengths)]
    return prompts, [[1000 * i + j for j in range(n)] for i in range(len(lengths))]


def expected(prompts, seeds):
    return [[[prompt[0], seed] for seed in row] for prompt, row in zip(prompts, seeds, strict=True)]


def ids(answers):
    return [[answer.ids for answer in row] for row in answers]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 200), st.integers(1, 3))
def test_every_prompt_once_in_order_within_the_budget(lengths, tokens, n):
    prompts, seeds = work(lengths, n)
    engine = StubEngine()
    decoding = Decoding("sample", 4, labels_per_input=n)
    answers = answer_all(engine, prompts, seeds, decoding, Budget(tokens))
    assert ids(answers) == expected(prompts, seeds)
    assert sorted(length for batch in engine.batches for length in batch) == sorted(map(len, prompts))
    for batch in engine.batches:
        assert len(batch) == 1 or len(batch) * (max(batch) + 4 * n) <= tokens
    # Batches are as large as they may be: the next row would not have fitted.
    for batch, following in zip(engine.batches, engine.batches[1:], strict=False):
        assert (len(batch) + 1) * (max(batch) + 4 * n) > tokens
        assert min(batch) >= max(following)


@pytest.mark.parametrize("message", MESSAGES)
def test_out_of_memory_halves_the_batch_and_changes_no_answer(message, caplog):
    prompts, seeds = work([6] * 16)
    engine, budget = StubEngine(memory=45, message=message), Budget(160)
    with caplog.at_level(logging.WARNING):
        answers = answer_all(engine, prompts, seeds, GREEDY, budget)
    assert ids(answers) == expected(prompts, seeds)
    assert engine.failures == 2
    assert [len(batch) for batch in engine.batches] == [4, 4, 4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with {rows} rows ({message}): token budget now {tokens}" for rows, tokens in ((16, 80), (8, 40))
    ]
    # What was learned holds for the next window.
    answer_all(engine, prompts, seeds, GREEDY, budget)
    assert engine.failures == 2


def test_a_batch_far_below_the_budget_shrinks_at_once():
    prompts, seeds = work([6] * 4)
    engine, budget = StubEngine(memory=20), Budget(10**6)
    assert ids(answer_all(engine, prompts, seeds, GREEDY, budget)) == expected(prompts, seeds)
    assert engine.failures == 1


def test_python_running_out_of_memory_counts_too():
    prompts, seeds = work([6] * 4)
    engine = StubEngine(memory=20, error=MemoryError, message="")
    assert ids(answer_all(engine, prompts, seeds, GREEDY, Budget(40))) == expected(prompts, seeds)


def test_one_row_that_does_not_fit_is_an_error():
    prompts, seeds = work([6, 50])
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        answer_all(StubEngine(memory=20), prompts, seeds, GREEDY, Budget(100))


def test_other_errors_pass_through_at_once():
    prompts, seeds = work([6] * 4)
    engine = StubEngine(memory=1, message="shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        answer_all(engine, prompts, seeds, GREEDY, Budget(40))
    assert engine.failures == 1


def test_answers_of_a_model_do_not_depend_on_the_budget(monkeypatch):
    engine = TorchEngine(EncoderDecoder(tiny_t5(tied=False, seed=5), VALID))
    prompts = [[3 + (7 * i + j * j) % 29 for j in range(1 + i % 5)] + [EOS] for i in range(12)]
    seeds = [[i, 100 + i] for i in range(12)]
    decoding = Decoding("sample", 6, labels_per_input=2)
    whole = answer_all(engine, prompts, seeds, decoding, Budget())
    single = answer_all(engine, prompts, seeds, decoding, Budget(1))
    failing, calls = engine.answer, []

    def short_of_memory(prompts, *rest):
        calls.append(len(prompts))
        if len(prompts) > 3:
            raise RuntimeError(MESSAGES[1])
        return failing(prompts, *rest)

    monkeypatch.setattr(engine, "answer", short_of_memory)
    shrunk = answer_all(engine, prompts, seeds, decoding, Budget())
    assert max(calls) == 12
    assert ids(single) == ids(whole) == ids(shrunk)
    logps = [[answer.logps for row in made for answer in row] for made in (whole, single, shrunk)]
    for other in logps[1:]:
        assert [sum(row) for row in other] == pytest.approx([sum(row) for row in logps[0]], abs=1e-5)
