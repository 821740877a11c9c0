"""Greedy and sampled decoding that records log-probabilities and drops finished rows from the batch.

transformers' generate neither records the log-probability of what it samples without holding all logits, nor shrinks
the batch when rows end; for training rollouts both matter. Beam search stays with it (`LanguageModel.beam_search`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.generation import next_limits, restrict, rules_of
from ..models.language_model import LanguageModel
from ..tensors import length_mask
from .proposal import PLAIN, Proposal, TeacherGuide, mix

# Given log-probs [n, V], the original row of each of the n live rows [n] and the step, the chosen tokens [n].
Chooser = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Answers, [B, R] each unless said, 0 at padding.

    ids       end-of-sequence included;  mask;  finished [B]
    logps     log mu(a_t|s_t) under the distribution that the tokens were drawn from
    own_logps log pi(a_t|s_t) of the model itself;  cut, the probability of the tokens that `top_p` left out at s_t
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    finished: Tensor
    own_logps: Tensor
    cut: Tensor


def greedy(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
    """The most probable token of each row."""
    return log_probs.argmax(-1)


def sampler(seeds: list[int], max_new_tokens: int, device: torch.device) -> Chooser:
    """Exact sampling by inverse transform, one uniform per (row, step) drawn from the row's own seed.

    A row's answer therefore does not depend on its batch, its shard or its process. It draws from all of the
    distribution that it is given: there is no top-k, which transformers' `do_sample` sets to 50 unless told otherwise.
    """
    uniforms = torch.stack(
        [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    ).to(device)

    def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
        # float64: in float32 the sum over the vocabulary loses the smallest probabilities.
        cumulative = log_probs.double().exp().cumsum(-1)
        threshold = uniforms[rows, step].unsqueeze(-1) * cumulative[:, -1:]
        # right=True skips tokens of zero probability at the threshold; the clamp covers a uniform that rounds to the
        # total.
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=log_probs.shape[-1] - 1)

    return choose


def row_seed(*parts: object) -> int:
    """A 63-bit seed from the run's seed, the row's id and whatever else names the draw; stable across machines."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def decode(
    lm: LanguageModel,
    states: list[Tensor],
    choose: Chooser,
    *,
    max_new_tokens: int,
    proposal: Proposal = PLAIN,
    guide: TeacherGuide | None = None,
    end_forced: bool = False,
) -> Decoded:
    """Decode one answer per entry of `states` (of `lm.prompt_states`).

    Stops a row at end-of-sequence or after `max_new_tokens`; a row cut there has finished False. Tokens are chosen from
    `proposal`, with `guide`'s share of the teacher, under the `AnswerRules` of both models.
    end_forced: whether a cut row's last token is the one that the rules force there (`AnswerRules.last`).
    """
    device, head = lm.device, lm.head()
    n, rules = len(states), rules_of(lm)
    ends = torch.tensor(rules.eos_ids, device=device)
    answers = rules.begin(n, max_new_tokens if end_forced else None)  # empty where nothing is restricted
    rows = torch.arange(n, device=device)  # original row of each live row
    ids = torch.full((n, max_new_tokens), lm.pad_id, device=device)
    # log-probability when drawn, the model's own, probability cut: filled step by step
    recorded = torch.zeros((3, n, max_new_tokens), device=device)
    lengths = torch.full((n,), max_new_tokens, device=device)
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    state, tokens = lm.start(states), None
    for t in range(max_new_tokens):
        limits = next_limits([answers[i] for i in rows.tolist()], device) if answers else None
        logits = restrict(head.logits(state.step(tokens)), limits)
        log_probs, cut = proposal.own_share(logits)
        if guide is not None:
            log_probs = mix(log_probs, restrict(guide.logits(tokens), limits).log_softmax(-1), guide.share)
        tokens = choose(log_probs, rows, t)
        if answers:
            for i, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                answers[i].append(token)
        ids[rows, t] = tokens
        own = log_probs if proposal.plain else logits.log_softmax(-1)
        logps, own_logps = (x.gather(-1, tokens[:, None]).squeeze(-1) for x in (log_probs, own))
        recorded[:, rows, t] = torch.stack([logps, own_logps, cut]).to(recorded.dtype)
        # Rows that have ended continue until they are dropped; their further tokens are masked at the end.
        ended = torch.isin(tokens, ends) & ~finished[rows]
        lengths[rows[ended]] = t + 1
        finished[rows[ended]] = True
        alive = ~finished[rows]
        live = int(alive.sum())
        if live == 0:
            break
        # Dropping rows copies the cache, so wait until a fifth of the batch has ended.
        if live <= 0.8 * len(rows):
            keep = alive.nonzero().squeeze(-1)
            rows, tokens = rows[keep], tokens[keep]
            state.keep(keep)
            if guide is not None:
                guide.keep(keep)
    if end_forced and rules.last is not None:
        finished &= lengths < max_new_tokens  # an end that was forced was not chosen
    width = int(lengths.max())
    answer_mask = length_mask(lengths, width)
    ids = torch.where(answer_mask, ids[:, :width], lm.pad_id)
    logps, own_logps, cut = recorded[:, :, :width] * answer_mask
    return Decoded(ids, answer_mask, logps, finished, own_logps, cut)
