"""The frozen teacher: it labels, and it scores what students write.

Scoring is one teacher-forced forward per answer. Encoder states are cached per prompt, rows are batched by length, only
valid tokens reach the head, and the head runs in chunks: logits [B, R, V] never exist.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from ..checks import check_settings
from ..errors import DivergenceError, ModelError
from ..objectives.rewards import pool_templates, token_scores
from ..records import TeacherScores
from ..tensors import unpack
from .encoder_decoder import EncoderDecoder
from .vocabulary import encode_texts

TemplateCombination = Literal["average", "pool"]
Result = TypeVar("Result")
logger = logging.get_logger("rlkd")


class EncoderCache:
    """Encoder states per prompt, least recently used out first, bounded by `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._states: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> Tensor | None:
        state = self._states.get(key)
        if state is None:
            self.misses += 1
        else:
            self.hits += 1
            self._states.move_to_end(key)
        return state

    def put(self, key: tuple[int, ...], state: Tensor) -> None:
        size = state.numel() * state.element_size()
        if size > self.max_bytes or key in self._states:
            return
        # A row sliced from a padded batch would keep the whole batch alive.
        self._states[key] = state.clone()
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self._states.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()


@dataclass
class Teacher:
    """A frozen encoder-decoder with its tokenizer.

    max_input_tokens  prompts are cut to this
    append_eos        end inputs with end-of-sequence (T5, Flan-T5: yes; T0: no)
    combination       several templates of one input: average their rewards, or pool their log-probs
    batch_tokens      padded tokens per forward; less uses less memory and changes no result
                      (halved when memory runs out)
    cache_bytes       room for encoder states of prompts seen before
    Raises ConfigError for another combination.
    """

    lm: EncoderDecoder
    tokenizer: Any
    max_input_tokens: int = 512
    append_eos: bool = True
    combination: TemplateCombination = "average"
    batch_tokens: int = 4096
    cache_bytes: int = 512 * 2**20
    cache: EncoderCache = field(init=False)

    def __post_init__(self) -> None:
        check_settings(self)
        self.lm.model.eval().requires_grad_(False)
        self.cache = EncoderCache(self.cache_bytes)

    def encode(self, texts: list[str]) -> list[Tensor]:
        """Encoder states [P_i, D] of each text; only texts not in the cache are encoded."""
        keys = [
            tuple(ids) for ids in encode_texts(self.tokenizer, texts, self.max_input_tokens, append_eos=self.append_eos)
        ]
        states = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        missing = [key for key, state in states.items() if state is None]
        with torch.no_grad():
            made = self._in_memory(lambda tokens: self.lm.encode_prompts([list(k) for k in missing], tokens))
            for key, state in zip(missing, made, strict=True):
                states[key] = state
                self.cache.put(key, state)
        return [states[key] for key in keys]  # type: ignore[misc]

    @torch.no_grad()
    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        with_hidden: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherScores:
        """Score each answer under each of its templates.

        Args: teacher_inputs, B tuples of the same number K of texts; answer_ids, answer_mask [B, R]; with_hidden keeps
        the head input for exact expectations; ids name the rows in errors.
        Returns: TeacherScores, zeros at padding. Raises DivergenceError if a teacher logit is not finite, ModelError
        if not even one row at a time fits in memory.
        """
        lengths = answer_mask.sum(1).tolist()
        per_template = []
        for k in range(len(teacher_inputs[0])):
            states = self.encode([texts[k] for texts in teacher_inputs])
            per_template.append(self._answer_hidden(states, answer_ids, lengths))
        if self.combination == "pool":
            per_template = [torch.stack(per_template).mean(0)]
        scores = [self._scores(hidden, answer_ids, answer_mask, with_hidden) for hidden in per_template]
        combined = pool_templates(scores) if len(scores) > 1 else scores[0]
        self._check_finite(combined, ids)
        return combined

    @torch.no_grad()
    def alternatives(self, hidden: Tensor, answer_mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable next tokens at each position, best first, and their log-probabilities, both [B, R, k].

        Args: hidden [B, R, D] from `score(with_hidden=True)`; with several templates they are of the renormalised mean
        log-probability.
        """

        def best(logits: Tensor) -> tuple[Tensor, ...]:
            values, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
            return (*ids.unbind(-1), *values.unbind(-1))

        columns = [unpack(column, answer_mask) for column in self.lm.head().map(best, hidden[answer_mask])]
        half = len(columns) // 2
        return torch.stack(columns[:half], -1), torch.stack(columns[half:], -1)

    def _answer_hidden(self, states: list[Tensor], answer_ids: Tensor, lengths: list[int]) -> Tensor:
        return self._in_memory(lambda tokens: self.lm.answer_hidden(states, answer_ids, lengths, tokens))

    def _in_memory(self, forward: Callable[[int], Result]) -> Result:
        """`forward(batch_tokens)`; when memory runs out, again with half as many, which then stay."""
        try:
            return forward(self.batch_tokens)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise

        def halve() -> int:
            self.batch_tokens //= 2
            logger.warning(f"out of memory in the teacher: trying again with {self.batch_tokens} tokens a batch")
            return self.batch_tokens

        asked = self.batch_tokens
        try:
            return find_executable_batch_size(forward, halve(), halve)()
        except RuntimeError as error:
            if self.batch_tokens:
                raise
            self.batch_tokens = asked
            raise ModelError(
                "the teacher does not fit in memory, not even one row at a time: lower max_input_tokens or "
                "max_new_tokens, load it in bfloat16 (teacher_dtype), or use a smaller teacher"
            ) from error

    def _scores(self, hidden: Tensor, answer_ids: Tensor, mask: Tensor, with_hidden: bool) -> TeacherScores:
        values = self.lm.head().map(token_scores, hidden[mask], answer_ids[mask])
        chosen, largest, logsumexp, mean, entropy = (unpack(value, mask) for value in values)
        return TeacherScores(chosen, largest, logsumexp, mean, entropy, hidden if with_hidden else None)

    def _check_finite(self, scores: TeacherScores, ids: list[str] | None) -> None:
        good = torch.isfinite(scores.chosen) & torch.isfinite(scores.logsumexp) & torch.isfinite(scores.entropy)
        bad = (~good).any(1).nonzero().squeeze(-1).tolist()
        if not bad:
            return
        names = [ids[i] if ids else f"row {i}" for i in bad[:5]]
        raise DivergenceError(
            f"the teacher's logits are not finite for {len(bad)} of {len(good)} answers: {', '.join(names)}. "
            f"Its weights are {self.lm.model.dtype}: use bfloat16 or float32 for T5 models, and check that the "
            "checkpoint loads without missing weights."
        )
