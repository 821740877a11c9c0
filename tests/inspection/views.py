"""Reward views for tests, without models."""

from __future__ import annotations

import random
from typing import Any

from rlkd.evaluation.samples import Sample
from rlkd.inspection.reward_view import RewardView

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;<b>{{ 7 * 7 }}"
WORDS = ["the", " cat", " sat", " on", " a", " mat", ".", " </s>"]


def sample(tokens: list[str], *, seed: int = 0, scored: bool = True, **options: Any) -> Sample:
    """An answer with made-up numbers that hang together."""
    draw = random.Random(seed)
    best = [-draw.random() for _ in tokens]
    costs = [0.0 if draw.random() < 0.5 else draw.expovariate(0.4) for _ in tokens]
    columns: dict[str, Any] = {
        "rewards": [-cost for cost in costs],
        "logprobs": [b - cost for b, cost in zip(best, costs, strict=True)],
        "max_logprobs": best,
        "entropies": [draw.random() for _ in tokens],
        "student_logprobs": [-draw.expovariate(0.7) for _ in tokens],
        "top": [[(draw.choice(WORDS), b - k) for k in range(5)] for b in best],
    }
    named = {"id": "1", "input": "an input", "source": "student", "text": "".join(tokens), **options}
    return Sample(tokens=tokens, ids=[hash(t) % 1000 for t in tokens], **named, **(columns if scored else {}))


def view(cases: int = 3, tokens: int = 6, *, seed: int = 0) -> RewardView:
    """`cases` inputs, each with a student's and a teacher's answer of `tokens` tokens."""
    draw = random.Random(seed)
    samples = []
    for i in range(cases):
        for source in ("student", "teacher greedy"):
            words = [draw.choice(WORDS) for _ in range(tokens)]
            named = {"id": f"row {i}", "input": f"input number {i}", "source": source}
            samples.append(sample(words, seed=draw.randrange(10**6), prompts={"plain": f"say: {i}"}, **named))
    return RewardView(samples)
