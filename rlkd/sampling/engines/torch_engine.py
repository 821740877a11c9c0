"""The reference engine: the transformers model in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.generation import restrict, rules_of
from ...models.heads import CHUNK_ELEMENTS
from ...models.language_model import LanguageModel
from ...models.spec import ModelSource
from ...objectives.rewards import token_scores
from ...tensors import pad_rows
from ..decode import decode, greedy, sampler
from ..proposal import Proposal
from .protocol import Answer, Decoding, EngineSettings, TopK


class TorchEngine:
    """The reference: the transformers model in PyTorch. Greedy and sampled answers come from our own decoding loop
    (log-probabilities recorded, finished rows dropped, one seed per row), beam search from transformers' generate.
    """

    name = "torch"

    def __init__(self, lm: LanguageModel, batch_tokens: int = 4096):
        self.lm, self.batch_tokens = lm, batch_tokens
        self.exact = not getattr(lm.model, "is_quantized", False)

    @staticmethod
    def objection(model: ModelSource, decoding: Decoding | None, settings: EngineSettings) -> str | None:
        if settings.compute_type is not None:
            return (
                f"it computes in the precision of the teacher's weights (teacher_dtype): leave out compute_type = "
                f"'{settings.compute_type}'."
            )
        return None

    @staticmethod
    def reservation(decoding: Decoding | None) -> str | None:
        return None

    @classmethod
    def of(cls, model: ModelSource, settings: EngineSettings) -> TorchEngine:
        return cls(model.language_model(), settings.batch_tokens)

    def identity(self) -> dict[str, Any]:
        from ...models.digests import configuration_digest, weights_digest

        model = self.lm.model
        return {
            "teacher": model.name_or_path,
            "teacher_weights": weights_digest(model),
            "teacher_configuration": configuration_digest(model),
            "dtype": str(model.dtype),
            **rules_of(self.lm).identity(),
        }

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
            tables = self._top_k(states, [answer.ids for answer in answers], k, decoding.max_new_tokens)
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
        out = decode(
            self.lm,
            states,
            choose,
            max_new_tokens=width,
            proposal=Proposal(temperature=decoding.temperature),
            end_forced=True,
        )
        ids = [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]
        if decoding.temperature == 1.0:
            logps = [row[mask].tolist() for row, mask in zip(out.logps, out.mask, strict=True)]
        else:
            logps = self._logps(states, ids, width)
        return [Answer(*parts) for parts in zip(ids, logps, out.finished.tolist(), strict=True)]

    def _logps(self, states: list[Tensor], answers: list[list[int]], most: int | None = None) -> list[list[float]]:
        hidden, ids, limits, lengths = self._forced(states, answers, most)
        chosen, _, logsumexp, _, _ = self.lm.head().map(token_scores, hidden, ids, limits=limits)
        return [row.tolist() for row in (chosen - logsumexp).split(lengths)]

    def _top_k(self, states: list[Tensor], answers: list[list[int]], k: int, most: int) -> list[TopK]:
        hidden, _, limits, lengths = self._forced(states, answers, most)
        head = self.lm.head()
        k = min(k, head.valid_vocab)
        ids = np.empty((len(hidden), k), np.int32)
        logps = np.empty((len(hidden), k), np.float32)
        # Logits exist for one chunk of tokens at a time.
        chunk = max(16, CHUNK_ELEMENTS // head.valid_vocab)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = restrict(head.logits(hidden[rows]), None if limits is None else limits[rows])
            best, index = logits.log_softmax(-1).topk(k)
            ids[rows], logps[rows] = index.cpu().numpy(), best.cpu().numpy()
        ends = np.cumsum(lengths)[:-1]
        return [TopK(*parts) for parts in zip(np.split(ids, ends), np.split(logps, ends), strict=True)]

    def _forced(
        self, states: list[Tensor], answers: list[list[int]], most: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
        """Head inputs [N, D] of all answer tokens, teacher-forced, packed; their ids [N] and limits [N, K]; lengths of
        the answers. most: max_new_tokens of the answers, if they were decoded.
        """
        ids, mask = pad_rows(answers, self.lm.pad_id, self.lm.device)
        hidden = self.lm.answer_hidden(states, ids, mask, self.batch_tokens)
        limits = self.lm.head().rules.limits(ids, mask, most)
        return hidden, ids[mask], limits, [len(row) for row in answers]

    def _beam(self, prompts: list[list[int]], states: list[Tensor], decoding: Decoding) -> list[Answer]:
        rows = self.lm.beam_search(
            prompts,
            num_beams=decoding.num_beams,
            num_answers=decoding.labels_per_input,
            max_new_tokens=decoding.max_new_tokens,
        )
        most, rules = decoding.max_new_tokens, rules_of(self.lm)
        logps = self._logps(states, rows, most)
        return [
            Answer(ids, row_logps, finished=rules.ended(ids, most)) for ids, row_logps in zip(rows, logps, strict=True)
        ]
