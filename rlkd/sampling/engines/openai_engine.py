"""Labels of a decoder-only teacher on a server of vLLM or SGLang; none of its weights are here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...models.served import normalises, unservable
from ...models.server import Server, ServerSettings, TokenScores
from ...models.spec import ModelSource
from .protocol import Answer, Decoding, EngineSettings, TopK


class OpenAIEngine:
    """Greedy and sampled answers of a server. Their log-probabilities are asked for afterwards, of prompt and answer:
    at temperature 1 whatever the sampling, and those that training with the same server reads.

    A row's seed is sent with its request; whether it gives the same answer in every batch is up to the server.
    """

    name = "openai"
    exact = True  # as far as can be told: there are no weights here to compare with

    def __init__(self, model: ModelSource, settings: ServerSettings):
        self.rules, self.rows = model.rules, model.config.vocab_size
        self.whole, self.teacher = normalises(model), getattr(model, "name", model.config.name_or_path)
        self.server = Server(settings, model.valid_vocab, getattr(model, "tokenizer", None))

    @staticmethod
    def objection(model: ModelSource, decoding: Decoding | None, settings: EngineSettings) -> str | None:
        if settings.server is None:
            return "it takes the server's URL (--server-url)."
        if decoding is None or decoding.strategy == "beam":
            return "it decodes greedily and samples: it neither ranks choices nor searches with beams."
        if decoding.strategy == "sample" and settings.server.api == "sglang":
            return "SGLang's samples do not follow a row's seed."
        if settings.compute_type is not None or model.quantized:
            return "the server decides on the teacher's precision: leave out compute_type and teacher_quantization."
        return unservable(model)

    @staticmethod
    def reservation(decoding: Decoding | None) -> str | None:
        return "it must be asked for."

    @classmethod
    def of(cls, model: ModelSource, settings: EngineSettings) -> OpenAIEngine:
        assert settings.server is not None
        return cls(model, settings.server)

    def identity(self) -> dict[str, Any]:
        """As in `Engine`. The server is asked for its model; it does not tell a digest of the weights."""
        spare = {} if self.whole else {"normalised_over": f"{self.rows} ids, {self.server.valid_vocab} of them tokens"}
        return {"teacher": self.teacher, "server_model": self.server.model, "dtype": "of the server", **spare,
                **self.rules.identity()}  # fmt: skip

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        """As in `Engine`. Raises as `Server.generate` and `Server.score`."""
        n, sampled = decoding.labels_per_input, decoding.strategy == "sample"
        rows = [prompt for prompt in prompts for _ in range(n)]
        ids = self.server.generate(
            rows,
            self.rules,
            decoding.max_new_tokens,
            temperature=decoding.temperature if sampled else 0.0,
            seeds=[seed for row in seeds for seed in row] if sampled else None,
        )
        k = decoding.top_k_logprobs
        answers = []
        for made, scores in zip(ids, self.server.score(rows, ids, max(k, 1)), strict=True):
            finished = self.rules.ended(made, decoding.max_new_tokens)
            answer = Answer(made, [token.chosen for token in scores], finished)
            answers.append(replace(answer, top_k=_table(scores)) if k else answer)
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """As in `Engine`. Raises as `Server.score`."""
        return [[token.chosen for token in row] for row in self.server.score(prompts, answers)]


def _table(scores: list[TokenScores]) -> TopK:
    ids, logps = zip(*(zip(*token.best, strict=True) for token in scores), strict=True)
    return TopK(np.array(ids, np.int32), np.array(logps, np.float32))
