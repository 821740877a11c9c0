"""What rlkd needs from a language model: states of prompts, hidden states of answers, decoding step by step, the head.

Sampling, scoring, losses, evaluation and inspection are written against `LanguageModel`; whether the model underneath
is an encoder-decoder, what its caches look like and how it marks the start of an answer is known to the implementation
alone. `architectures.py` lists the implementations. Shape legend: `rlkd.tensors`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .heads import Head
from .positions import Positions


class DecodingState(Protocol):
    """n answers being decoded: `LanguageModel.start` creates it, each step extends it by one token."""

    def step(self, tokens: Tensor | None) -> Tensor:
        """Append `tokens` [n] to the answers; None at the first step, when there are none yet.

        Returns: head inputs [n, D], from which `LanguageModel.head` gives the distribution of each next token.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue with the answers `rows` [m] (int64, ascending) only, and free what the others held."""
        ...


class LanguageModel(Protocol):
    """A conditional language model p(answer | prompt) over `valid_vocab` tokens.

    model        the transformers model (possibly PEFT-wrapped); whatever trains or moves its weights goes through it
    valid_vocab  V, the number of ids that are tokens; actions and normalisers are limited to them
    eos_id       the token that ends an answer; it belongs to the answer
    pad_id       fills what lies beyond an answer. It may equal eos_id or a token that answers use: masks, not ids,
                 decide what counts
    width        D, the width of the head's inputs
    positions    how long prompts and answers may be

    Answers are [B, R], right-padded. Prompts are lists of token ids, at least one each. batch_tokens bounds the padded
    tokens of one forward (None: one forward for all): it decides speed and memory, not results. An implementation is
    not an nn.Module itself and survives copy.deepcopy together with its model.
    """

    @property
    def model(self) -> Any: ...

    @property
    def valid_vocab(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def positions(self) -> Positions: ...

    def head(self) -> Head:
        """The vocabulary projection as transformers applies it, output scale and bias included.

        Raises ModelError if its exact logits are not available (quantised).
        """
        ...

    def prompt_states(self, prompts: list[list[int]], batch_tokens: int | None = 4096) -> list[Tensor]:
        """What decoding needs to know of each prompt, as one tensor whose layout only this model knows; differentiable.

        Encoder states [P_i, D] of an encoder-decoder; keys and values of a decoder-only model. A state may be
        repeated (several answers to one prompt), cloned, and cached, bounded by its size in bytes.
        """
        ...

    def answer_hidden(
        self, states: list[Tensor], answer_ids: Tensor, answer_mask: Tensor, batch_tokens: int | None = 4096
    ) -> Tensor:
        """Head inputs [N, D] that predict the N tokens of `answer_mask`, teacher-forced, row after row; differentiable.

        Args: states, B of `prompt_states`; answer_ids [B, R]; answer_mask [B, R] bool.
        Returns: entry j belongs to entry j of `answer_ids[answer_mask]`.
        """
        ...

    def start(self, states: list[Tensor]) -> DecodingState:
        """Begin one answer for each of `states`."""
        ...

    def beam_search(
        self, prompts: list[list[int]], *, num_beams: int, num_answers: int, max_new_tokens: int
    ) -> list[list[int]]:
        """The `num_answers` best hypotheses for each prompt, best first, as transformers' generate finds them.

        Returns: token ids of len(prompts) * num_answers answers, those of one prompt adjacent; end-of-sequence is
        included, and missing where `max_new_tokens` cut the answer.
        """
        ...
