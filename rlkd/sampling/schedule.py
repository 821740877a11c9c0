"""Batches for an engine: prompts of similar length together, as many as a token budget allows; answers in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .engines.protocol import Answer, Decoding, Engine

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Budget:
    """Padded tokens, of prompts and answers, that one batch may hold. It shrinks when memory runs out, and stays
    smaller for the batches that follow. It decides speed and memory, never an answer.

    The default suits a CPU: larger batches pad more keys for every step to read, which costs more than they save (int8,
    64 prompts: 1.9 times the time at 16,384). A GPU wants more.
    """

    tokens: int = 4096


def answer_all(
    engine: Engine,
    prompts: list[list[int]],
    seeds: list[list[int]],
    decoding: Decoding,
    budget: Budget,
) -> list[list[Answer]]:
    """`engine.answer` of all prompts, in their order, computed in batches of similar length.

    A batch that runs out of memory is retried in halves. Raises what the engine raises; out of memory only if a single
    prompt does not fit.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]

    def run(rows: list[int]) -> None:
        made = engine.answer([prompts[i] for i in rows], [seeds[i] for i in rows], decoding)
        for i, row in zip(rows, made, strict=True):
            answers[i] = row

    new = decoding.labels_per_input * decoding.max_new_tokens
    in_batches(run, [len(prompt) for prompt in prompts], [new] * len(prompts), budget)
    return answers


def in_batches(run: Callable[[list[int]], None], lengths: Sequence[int], more: Sequence[int], budget: Budget) -> None:
    """`run(rows)` on batches of row indices, longest first, until every row was in one that returned.

    A batch costs rows x (longest of `lengths` + largest of `more`) tokens, at most the budget unless it is one row.
    """
    # Longest first: what does not fit in memory fails at once.
    todo = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -more[i], i))
    while todo:
        size, cost = _fit(todo, lengths, more, budget.tokens)
        try:
            run(todo[:size])
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
            failed = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            todo = todo[size:]
            continue
        # The exception is gone by now, and with it the frames that held the batch's tensors.
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        budget.tokens = min(budget.tokens, cost) // 2
        logger.warning("out of memory with %d rows (%s): token budget now %d", size, failed, budget.tokens)


def _fit(todo: list[int], lengths: Sequence[int], more: Sequence[int], tokens: int) -> tuple[int, int]:
    """How many of the rows fit in one batch (at least one), and its cost."""
    longest, extra = lengths[todo[0]], more[todo[0]]
    size = 1
    for i in todo[1:]:
        extra = max(extra, more[i])
        if (size + 1) * (longest + extra) > tokens:
            break
        size += 1
    return size, size * (longest + max(more[i] for i in todo[:size]))


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    # Accelerate detects PyTorch's messages; CTranslate2 reports "CUDA failed with error out of memory".
    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "out of memory" in str(error)
