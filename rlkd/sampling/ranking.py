"""Classification by ranking, as in T0's evaluation: the answer choice with the highest probability under the
teacher.
"""

from __future__ import annotations

import math

from .engines.protocol import Engine
from .schedule import Budget, in_batches


def rank(
    engine: Engine, prompts: list[list[int]], choices: list[list[list[int]]], budget: Budget | None = None
) -> list[list[float]]:
    """Log-probability (nats) of each answer choice of each prompt; the largest is the teacher's answer.

    The sum over the choice's tokens, without length normalisation. As in T0's evaluation, which encodes prompts without
    end-of-sequence and choices with it, its log-probability belongs to the sum: choices are token ids as the tokenizer
    gives them, end-of-sequence included. One prompt's choices go to the engine together, which encodes it once (torch).
    """
    scores: list[list[float]] = [[] for _ in prompts]

    def run(rows: list[int]) -> None:
        pairs = [(prompts[i], choice) for i in rows for choice in choices[i]]
        sums = map(math.fsum, engine.score([prompt for prompt, _ in pairs], [choice for _, choice in pairs]))
        for i in rows:
            scores[i] = [next(sums) for _ in choices[i]]

    # Each choice is scored with its own copy of the prompt's state.
    widths = [[len(choice) for choice in row] for row in choices]
    costs = [sum(row) + (len(row) - 1) * len(prompt) for row, prompt in zip(widths, prompts, strict=True)]
    in_batches(run, [len(prompt) for prompt in prompts], costs, budget or Budget())
    return scores
