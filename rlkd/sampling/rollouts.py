"""Rollouts: answers sampled from the behaviour policy, with the log-probabilities they were sampled with."""

from __future__ import annotations

from typing import Any

from ..models.policy import Policy
from ..models.vocabulary import encode_texts
from ..records import Answers, Example
from ..tensors import pad_rows
from .decode import Decoded, decode, greedy, row_seed, sampler


def sample_rollouts(
    policy: Policy,
    tokenizer: Any,
    examples: list[Example],
    *,
    rollouts_per_prompt: int,
    max_input_tokens: int,
    max_new_tokens: int,
    seed: tuple[object, ...],
) -> Answers:
    """K answers to each example by exact sampling at temperature 1; rows of one prompt are adjacent, B = K *
    len(examples).

    The state of each prompt is computed once. Row k of example e is drawn from `row_seed(*seed, e.id, k)`, so the
    answers do not depend on how the examples are split over processes.
    """
    k = rollouts_per_prompt
    repeated = [example for example in examples for _ in range(k)]
    seeds = [row_seed(*seed, example.id, j) for example in examples for j in range(k)]
    choose = sampler(seeds, max_new_tokens, policy.lm.device)
    prompts, decoded = _answer(policy, tokenizer, examples, choose, max_input_tokens, max_new_tokens, k)
    return _rollouts(policy, repeated, [prompt for prompt in prompts for _ in range(k)], decoded)


def greedy_answers(
    policy: Policy, tokenizer: Any, examples: list[Example], *, max_input_tokens: int, max_new_tokens: int
) -> Answers:
    """The most probable answer to each example, token by token, in the form of rollouts (B = len(examples))."""
    prompts, decoded = _answer(policy, tokenizer, examples, greedy, max_input_tokens, max_new_tokens, 1)
    return _rollouts(policy, examples, prompts, decoded)


def _answer(
    policy: Policy,
    tokenizer: Any,
    examples: list[Example],
    choose: Any,
    max_input_tokens: int,
    max_new_tokens: int,
    k: int,
) -> tuple[list[list[int]], Decoded]:
    import torch

    prompts = encode_texts(tokenizer, [example.student_input for example in examples], max_input_tokens)
    with torch.no_grad():
        states = policy.lm.prompt_states(prompts)
    return prompts, decode(policy.lm, [s for s in states for _ in range(k)], choose, max_new_tokens=max_new_tokens)


def _rollouts(policy: Policy, examples: list[Example], prompts: list[list[int]], decoded: Decoded) -> Answers:
    input_ids, input_mask = pad_rows(prompts, policy.lm.pad_id, policy.lm.device)
    return Answers(
        examples=examples,
        input_ids=input_ids,
        input_mask=input_mask,
        answer_ids=decoded.ids,
        answer_mask=decoded.mask,
        behaviour_logps=decoded.logps,
        finished=decoded.finished,
    )
