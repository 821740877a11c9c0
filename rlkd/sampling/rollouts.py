"""Rollouts: answers sampled from the behaviour policy, with the log-probabilities they were sampled with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..models.generation import rules_of
from ..models.policy import Policy
from ..models.vocabulary import encode_prompts
from ..records import Answers, Example
from ..tensors import pad_rows
from .decode import Decoded, decode, greedy, row_seed, sampler
from .proposal import PLAIN, Proposal

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.language_model import LanguageModel
    from ..models.signals import Write


def sample_rollouts(
    policy: Policy,
    tokenizer: Any,
    examples: list[Example],
    *,
    rollouts_per_prompt: int,
    max_input_tokens: int,
    max_new_tokens: int,
    seed: tuple[object, ...],
    proposal: Proposal = PLAIN,
) -> Answers:
    """K answers to each example by exact sampling from `proposal`, by default the policy itself; rows of one prompt are
    adjacent, B = K * len(examples).

    The state of each prompt is computed once, the teacher's too. Row k of example e is drawn from
    `row_seed(*seed, e.id, k)`, so the answers do not depend on how the examples are split over processes.
    """
    k = rollouts_per_prompt
    repeated = [example for example in examples for _ in range(k)]
    seeds = [row_seed(*seed, example.id, j) for example in examples for j in range(k)]
    choose = sampler(seeds, max_new_tokens, policy.lm.device)
    prompts, states = _prompts(policy, tokenizer, examples, max_input_tokens)
    decoded = decode(
        policy.lm,
        [state for state in states for _ in range(k)],
        choose,
        max_new_tokens=max_new_tokens,
        proposal=proposal,
        guide=proposal.guide(repeated),
    )
    answers = _rollouts(policy, repeated, [prompt for prompt in prompts for _ in range(k)], decoded)
    if proposal.plain:
        return answers
    return replace(answers, policy_logps=decoded.own_logps, cut_mass=decoded.cut if proposal.top_p < 1 else None)


def greedy_answers(
    policy: Policy, tokenizer: Any, examples: list[Example], *, max_input_tokens: int, max_new_tokens: int
) -> Answers:
    """The most probable answer to each example, token by token, in the form of rollouts (B = len(examples))."""
    prompts, states = _prompts(policy, tokenizer, examples, max_input_tokens)
    return _rollouts(policy, examples, prompts, decode(policy.lm, states, greedy, max_new_tokens=max_new_tokens))


def greedy_writer(max_new_tokens: int) -> Write:
    """Greedy decoding as a teacher's `LocalSource.answer` uses it."""

    def write(lm: LanguageModel, states: list[Tensor]) -> list[list[int]]:
        decoded = decode(lm, states, greedy, max_new_tokens=max_new_tokens)
        return [ids[mask].tolist() for ids, mask in zip(decoded.ids, decoded.mask, strict=True)]

    return write


def _prompts(
    policy: Policy, tokenizer: Any, examples: list[Example], max_input_tokens: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Token ids of each prompt, and its state."""
    import torch

    texts = [example.student_input for example in examples]
    prompts = encode_prompts(tokenizer, texts, max_input_tokens, append_eos=rules_of(policy.lm).end_of_prompts)
    with torch.no_grad():
        return prompts, policy.lm.prompt_states(prompts)


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
