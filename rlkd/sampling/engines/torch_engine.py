"""The reference engine: the transformers model in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.encoder_decoder import EncoderDecoder
from ...models.heads import CHUNK_ELEMENTS
from ...models.spec import ModelSource
from ...objectives.rewards import token_scores
from ...tensors import length_mask, pad_stack
from ..decode import decode, greedy, sampler
from .protocol import Answer, Decoding, EngineSettings, TopK


class TorchEngine:
    """The reference: the transformers model in PyTorch. Greedy and sampled answers come from our own decoding loop
    (log-probabilities recorded, finished rows dropped, one seed per row), beam search from transformers' generate.
    """

    name = "torch"

    def __init__(self, lm: EncoderDecoder, batch_tokens: int = 4096):
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
        from ...models.digests import weights_digest

        model = self.lm.model
        return {"teacher": model.name_or_path, "teacher_weights": weights_digest(model), "dtype": str(model.dtype)}

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        n = decoding.labels_per_input
        states = [s for s in self.lm.encode_prompts(prompts, self.batch_tokens) for _ in range(n)]
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
        # The answers to one prompt share its encoder states.
        distinct = {tuple(prompt): None for prompt in prompts}
        encoded = self.lm.encode_prompts([list(prompt) for prompt in distinct], self.batch_tokens)
        states = dict(zip(distinct, encoded, strict=True))
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
        ids = pad_stack([torch.tensor(row, dtype=torch.long) for row in answers], self.lm.pad_id)
        ids = ids.to(self.lm.device)
        lengths = [len(row) for row in answers]
        mask = length_mask(lengths).to(ids.device)
        hidden = self.lm.answer_hidden(states, ids, lengths, self.batch_tokens)
        return hidden[mask], ids[mask], lengths

    def _beam(self, prompts: list[list[int]], states: list[Tensor], decoding: Decoding) -> list[Answer]:
        from transformers import GenerationConfig

        lm = self.lm
        input_ids, mask = lm.pad_prompts(prompts)
        with _own_generation_config(lm.model):
            sequences = lm.model.generate(
                input_ids=input_ids,
                attention_mask=mask.long(),
                generation_config=GenerationConfig(
                    num_beams=decoding.num_beams,
                    num_return_sequences=decoding.labels_per_input,
                    max_new_tokens=decoding.max_new_tokens,
                    do_sample=False,
                    decoder_start_token_id=lm.start_id,
                    eos_token_id=lm.eos_id,
                    pad_token_id=lm.pad_id,
                    # Rows beyond the tokenizer (T5 pads its embedding) are no tokens.
                    suppress_tokens=list(range(lm.valid_vocab, lm.config.vocab_size)) or None,
                ),
            )
        rows, finished = [], []
        for row in sequences[:, 1:].tolist():
            finished.append(lm.eos_id in row)
            rows.append(row[: row.index(lm.eos_id) + 1] if finished[-1] else row)
        logps = self._logps(states, rows)
        return [Answer(*parts) for parts in zip(rows, logps, finished, strict=True)]


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation defaults (BART's n-gram ban ...), which would merge into ours."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
