"""How closely an engine of lower precision follows the full-precision teacher."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from .engines.protocol import Decoding, Engine
from .schedule import Budget, answer_all, in_batches


def agreement(
    engine: Engine, reference: Engine, prompts: list[list[int]], decoding: Decoding, budget: Budget | None = None
) -> dict[str, float]:
    """Both engines answer `prompts` greedily, in at most decoding.max_new_tokens.

    Returns: prompts, their number; exact_match, the share of equal answers; mean_abs_delta_logprob, the mean absolute
    difference, in nats per token, between the engine's log-probabilities of its answers' tokens and the reference's.
    """
    greedy = replace(decoding, strategy="greedy", labels_per_input=1, temperature=1.0, top_k_logprobs=0)
    budget = budget or Budget()
    seeds = [[0]] * len(prompts)
    ours, theirs = (
        [row[0] for row in answer_all(which, prompts, seeds, greedy, budget)] for which in (engine, reference)
    )
    logps: list[list[float]] = [[] for _ in prompts]

    def score(rows: list[int]) -> None:
        for i, row in zip(rows, reference.score([prompts[i] for i in rows], [ours[i].ids for i in rows]), strict=True):
            logps[i] = row

    in_batches(score, [len(prompt) for prompt in prompts], [len(answer.ids) for answer in ours], budget)
    pairs = zip(chain.from_iterable(answer.logps for answer in ours), chain.from_iterable(logps), strict=True)
    deltas = [abs(a - b) for a, b in pairs]
    return {
        "prompts": len(prompts),
        "exact_match": sum(a.ids == b.ids for a, b in zip(ours, theirs, strict=True)) / len(prompts),
        "mean_abs_delta_logprob": sum(deltas) / len(deltas),
    }
