"""Classification by ranking, as in T0's evaluation: the answer choice with the highest probability under the
teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..models.generation import NO_RULES, AnswerRules
from ..models.vocabulary import NO_LIMIT, decode_texts, encode_answers
from .engines.protocol import Engine
from .schedule import Budget, in_batches


def choice_problem(
    tokenizer: Any, choices: Sequence[str], longest: int | None = None, rules: AnswerRules = NO_RULES
) -> str | None:
    """Why ranking these answer choices would say nothing, as a clause; None if their tokens differ. longest: the most
    tokens of an answer that the teacher has positions for.

    A choice without tokens of its own (empty, or characters that the vocabulary lacks) has no probability to compare;
    choices with the same tokens are an exact tie. A choice that is given twice is one choice.
    """
    if not choices:
        return "there are no answer choices"
    encoded = encode_answers(tokenizer, list(choices), NO_LIMIT, rules)
    first: dict[tuple[int, ...], str] = {}
    for choice, ids, read in zip(choices, encoded, decode_texts(tokenizer, encoded), strict=True):
        if not choice.strip():
            return "an answer choice is empty"
        if longest is not None and len(ids) > longest:
            return f"the answer choice '{choice[:40]}' has {len(ids)} tokens, the teacher {longest} positions"
        if not read.strip():
            return f"the tokenizer has no tokens for the answer choice '{choice}'"
        if (other := first.setdefault(tuple(ids), choice)) != choice:
            return f"the answer choices '{other}' and '{choice}' have the same tokens"
    return None


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
