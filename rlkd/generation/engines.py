"""Engines: what turns token-id prompts into answers with their log-probabilities under the teacher.

Every engine gives the same answers for the same prompts, seeds and settings, whatever they are batched with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.architectures import EncoderDecoder
from ..objectives.rewards import token_scores
from ..tensors import length_mask, pad_stack
from .decode import decode, greedy, sampler

Strategy = Literal["greedy", "beam", "sample"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded. num_beams is for beam search, temperature for sampling.

    labels_per_input: samples, or the best hypotheses of beam search.
    Raises ConfigError for settings that contradict each other.
    """

    strategy: Strategy
    max_new_tokens: int
    labels_per_input: int = 1
    num_beams: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"strategy = '{self.strategy}': allowed are {', '.join(get_args(Strategy))}.")
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


@dataclass(frozen=True, slots=True)
class Answer:
    """ids, end-of-sequence included; logps, natural log-probability of each under the teacher at temperature 1;
    finished, False if max_new_tokens cut the answer.
    """

    ids: list[int]
    logps: list[float]
    finished: bool


class Engine(Protocol):
    """name: as in `--engine`."""

    name: str

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

    def __init__(self, adapter: EncoderDecoder, batch_tokens: int = 4096):
        self.adapter, self.batch_tokens = adapter, batch_tokens

    def identity(self) -> dict[str, Any]:
        from .label_store import weights_digest

        model = self.adapter.model
        return {"teacher": model.name_or_path, "teacher_weights": weights_digest(model), "dtype": str(model.dtype)}

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        if decoding.strategy == "beam":
            return self._beam(prompts, decoding)
        n = decoding.labels_per_input
        flat = [seed for row in seeds for seed in row]
        device, width = self.adapter.device, decoding.max_new_tokens
        choose = greedy if decoding.strategy == "greedy" else sampler(flat, width, device)
        states = [s for s in self.adapter.encode_prompts(prompts, self.batch_tokens) for _ in range(n)]
        out = decode(self.adapter, states, choose, max_new_tokens=width, temperature=decoding.temperature)
        ids = [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]
        if decoding.temperature == 1.0:
            logps = [row[mask].tolist() for row, mask in zip(out.logps, out.mask, strict=True)]
        else:
            logps = self._logps(states, ids)
        answers = [Answer(*parts) for parts in zip(ids, logps, out.finished.tolist(), strict=True)]
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    @torch.no_grad()
    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        # The answers to one prompt share its encoder states.
        distinct = {tuple(prompt): None for prompt in prompts}
        encoded = self.adapter.encode_prompts([list(prompt) for prompt in distinct], self.batch_tokens)
        states = dict(zip(distinct, encoded, strict=True))
        return self._logps([states[tuple(prompt)] for prompt in prompts], answers)

    def _logps(self, states: list[Tensor], answers: list[list[int]]) -> list[list[float]]:
        ids = pad_stack([torch.tensor(row) for row in answers], self.adapter.pad_id).to(self.adapter.device)
        lengths = [len(row) for row in answers]
        mask = length_mask(lengths).to(ids.device)
        hidden = self.adapter.answer_hidden(states, ids, lengths, self.batch_tokens)
        chosen, _, logsumexp, _, _ = self.adapter.head().map(token_scores, hidden[mask], ids[mask])
        return [row.tolist() for row in (chosen - logsumexp).split(lengths)]

    def _beam(self, prompts: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        from transformers import GenerationConfig

        adapter, n = self.adapter, decoding.labels_per_input
        input_ids, mask = adapter.pad_prompts(prompts)
        with _own_generation_config(adapter.model):
            sequences = adapter.model.generate(
                input_ids=input_ids,
                attention_mask=mask.long(),
                generation_config=GenerationConfig(
                    num_beams=decoding.num_beams,
                    num_return_sequences=n,
                    max_new_tokens=decoding.max_new_tokens,
                    do_sample=False,
                    decoder_start_token_id=adapter.start_id,
                    eos_token_id=adapter.eos_id,
                    pad_token_id=adapter.pad_id,
                    # Rows beyond the tokenizer (T5 pads its embedding) are no tokens.
                    suppress_tokens=list(range(adapter.valid_vocab, adapter.config.vocab_size)) or None,
                ),
            )
        rows, finished = [], []
        for row in sequences[:, 1:].tolist():
            finished.append(adapter.eos_id in row)
            rows.append(row[: row.index(adapter.eos_id) + 1] if finished[-1] else row)
        logps = self.score([prompt for prompt in prompts for _ in range(n)], rows)
        answers = [Answer(*parts) for parts in zip(rows, logps, finished, strict=True)]
        return [answers[i : i + n] for i in range(0, len(answers), n)]


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation defaults (BART's n-gram ban ...), which would merge into ours."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
