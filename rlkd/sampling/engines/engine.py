"""Engines: what turns token-id prompts into answers with their log-probabilities under the teacher.

Every engine gives the same answers for the same prompts, seeds and settings, whatever they are batched with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_settings
from ...errors import ConfigError
from ...models.heads import CHUNK_ELEMENTS
from ...models.language_model import LanguageModel
from ...objectives.rewards import token_scores
from ...tensors import pad_rows
from ..decode import decode, greedy, sampler

logger = logging.getLogger(__name__)

Strategy = Literal["greedy", "beam", "sample"]
EngineName = Literal["auto", "torch", "ctranslate2"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded. num_beams is for beam search, temperature for sampling.

    labels_per_input: samples, or the best hypotheses of beam search. top_k_logprobs: how many of the teacher's best
    tokens to record at each position of an answer.
    Raises ConfigError for settings that contradict each other.
    """

    strategy: Strategy
    max_new_tokens: int
    labels_per_input: int = 1
    num_beams: int = 4
    temperature: float = 1.0
    top_k_logprobs: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.labels_per_input < 1 or (self.strategy == "greedy" and self.labels_per_input > 1):
            raise ConfigError(
                f"labels_per_input = {self.labels_per_input} with strategy = '{self.strategy}': greedy decoding has "
                "one answer. Use 1, or strategy sample or beam."
            )
        if self.strategy == "beam" and not 1 < self.num_beams >= self.labels_per_input:
            raise ConfigError(
                f"num_beams = {self.num_beams} with labels_per_input = {self.labels_per_input}: beam search needs "
                "at least 2 beams and no fewer beams than labels. Raise num_beams."
            )
        if self.temperature <= 0 or (self.strategy != "sample" and self.temperature != 1.0):
            raise ConfigError(
                f"temperature = {self.temperature} with strategy = '{self.strategy}': it must be above 0 and only "
                "sampling uses it. Leave it at 1, or use strategy sample."
            )
        if self.top_k_logprobs < 0:
            raise ConfigError(f"top_k_logprobs = {self.top_k_logprobs}: use 0 (record none) or more.")


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's k best tokens at each of the R positions of an answer, best first: ids int32 [R, k] and logps
    float32 [R, k], natural log-probabilities at temperature 1.
    """

    ids: np.ndarray
    logps: np.ndarray


@dataclass(frozen=True, slots=True)
class Answer:
    """ids, end-of-sequence included; logps, natural log-probability of each under the teacher at temperature 1;
    finished, False if max_new_tokens cut the answer; top_k, if `Decoding.top_k_logprobs` asks for it.
    """

    ids: list[int]
    logps: list[float]
    finished: bool
    top_k: TopK | None = None


class Engine(Protocol):
    """name: as in `--engine`; exact: computes with the teacher's weights as they are."""

    name: str
    exact: bool

    def identity(self) -> dict[str, Any]:
        """All that decides its answers: model, digest of the weights, precision. JSON-able."""
        ...

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        """`labels_per_input` answers to each prompt (token ids, as the teacher reads them), best first for beam search.

        seeds, one per answer, decide what is sampled; other strategies ignore them.
        """
        ...

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """Natural log-probability of each token of the given answer to each prompt, teacher-forced, temperature 1."""
        ...


class TorchEngine:
    """The reference: the transformers model in PyTorch. Greedy and sampled answers come from our own decoding loop
    (log-probabilities recorded, finished rows dropped, one seed per row), beam search from transformers' generate.
    """

    name = "torch"

    def __init__(self, lm: LanguageModel, batch_tokens: int = 4096):
        self.lm, self.batch_tokens = lm, batch_tokens
        self.exact = not getattr(lm.model, "is_quantized", False)

    def identity(self) -> dict[str, Any]:
        from ...models.digests import weights_digest

        model = self.lm.model
        return {"teacher": model.name_or_path, "teacher_weights": weights_digest(model), "dtype": str(model.dtype)}

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        n = decoding.labels_per_input
        states = [s for s in self.lm.prompt_states(prompts, self.batch_tokens) for _ in range(n)]
        answers = (
            self._beam(prompts, states, decoding)
            if decoding.strategy == "beam"
            else self._own_loop(states, [seed for row in seeds for seed in row], decoding)
        )
        if k := decoding.top_k_logprobs:
            tables = self._top_k(states, [answer.ids for answer in answers], k)
            answers = [replace(answer, top_k=table) for answer, table in zip(answers, tables, strict=True)]
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    @torch.no_grad()
    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        # The answers to one prompt share its state.
        distinct = {tuple(prompt): None for prompt in prompts}
        made = self.lm.prompt_states([list(prompt) for prompt in distinct], self.batch_tokens)
        states = dict(zip(distinct, made, strict=True))
        return self._logps([states[tuple(prompt)] for prompt in prompts], answers)

    def _own_loop(self, states: list[Tensor], seeds: list[int], decoding: Decoding) -> list[Answer]:
        width = decoding.max_new_tokens
        choose = greedy if decoding.strategy == "greedy" else sampler(seeds, width, self.lm.device)
        out = decode(self.lm, states, choose, max_new_tokens=width, temperature=decoding.temperature)
        ids = [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]
        if decoding.temperature == 1.0:
            logps = [row[mask].tolist() for row, mask in zip(out.logps, out.mask, strict=True)]
        else:
            logps = self._logps(states, ids)
        return [Answer(*parts) for parts in zip(ids, logps, out.finished.tolist(), strict=True)]

    def _logps(self, states: list[Tensor], answers: list[list[int]]) -> list[list[float]]:
        hidden, ids, lengths = self._forced(states, answers)
        chosen, _, logsumexp, _, _ = self.lm.head().map(token_scores, hidden, ids)
        return [row.tolist() for row in (chosen - logsumexp).split(lengths)]

    def _top_k(self, states: list[Tensor], answers: list[list[int]], k: int) -> list[TopK]:
        hidden, _, lengths = self._forced(states, answers)
        head = self.lm.head()
        k = min(k, head.valid_vocab)
        ids = np.empty((len(hidden), k), np.int32)
        logps = np.empty((len(hidden), k), np.float32)
        # Logits exist for one chunk of tokens at a time.
        chunk = max(16, CHUNK_ELEMENTS // head.valid_vocab)
        for start in range(0, len(hidden), chunk):
            best, index = head.logits(hidden[start : start + chunk]).log_softmax(-1).topk(k)
            rows = slice(start, start + len(best))
            ids[rows], logps[rows] = index.cpu().numpy(), best.cpu().numpy()
        ends = np.cumsum(lengths)[:-1]
        return [TopK(*parts) for parts in zip(np.split(ids, ends), np.split(logps, ends), strict=True)]

    def _forced(self, states: list[Tensor], answers: list[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
        """Head inputs [N, D] of all answer tokens, teacher-forced, packed; their ids [N]; the answers' lengths."""
        ids, mask = pad_rows(answers, self.lm.pad_id, self.lm.device)
        hidden = self.lm.answer_hidden(states, ids, mask, self.batch_tokens)
        return hidden, ids[mask], [len(row) for row in answers]

    def _beam(self, prompts: list[list[int]], states: list[Tensor], decoding: Decoding) -> list[Answer]:
        rows = self.lm.beam_search(
            prompts,
            num_beams=decoding.num_beams,
            num_answers=decoding.labels_per_input,
            max_new_tokens=decoding.max_new_tokens,
        )
        logps = self._logps(states, rows)
        return [
            Answer(ids, row_logps, finished=ids[-1] == self.lm.eos_id)
            for ids, row_logps in zip(rows, logps, strict=True)
        ]


def make_engine(
    name: EngineName,
    lm: LanguageModel,
    decoding: Decoding | None,
    *,
    compute_type: str | None = None,
    batch_tokens: int = 4096,
    threads: int = 0,
    parallel: int = 1,
) -> Engine:
    """The engine of that name for a teacher; 'auto' takes the fastest that gives the same answers, and logs why.

    Args: decoding, None if the engine only scores given answers (ranking); compute_type, of CTranslate2: float32,
    bfloat16, float16 or int8 (an approximation: see `agreement`), by default the teacher's own; batch_tokens, padded
    tokens per forward (torch); threads per forward, 0 for one per core, and forwards in parallel (CTranslate2).
    Raises ConfigError if the engine is unknown, not installed, or cannot do what `decoding` or compute_type asks for.
    """
    check_choice("engine", name, EngineName)
    reason = "asked for."
    if name != "torch":
        from . import ctranslate2_engine as ct2

        precision = compute_type or str(lm.model.dtype).removeprefix("torch.")
        objection = ct2.objection(lm, decoding, precision)
        if objection is None and name == "auto":
            objection = ct2.reservation(decoding)
        if objection is None:
            logger.info("engine: ctranslate2 in %s", precision)
            return ct2.CTranslate2Engine(lm, precision, threads=threads, parallel=parallel)
        if name == "ctranslate2":
            raise ConfigError(f"engine = 'ctranslate2': {objection} Use --engine torch.")
        reason = f"with CTranslate2, {objection}"
    if compute_type is not None:
        raise ConfigError(
            f"compute_type = '{compute_type}' is a precision of CTranslate2, and engine = '{name}' means PyTorch here: "
            f"{reason} Leave it out (PyTorch computes in the teacher's dtype)."
        )
    logger.info("engine: torch: %s", reason)
    return TorchEngine(lm, batch_tokens)
