"""Engines: they turn prompts, as token ids, into answers with their log-probabilities under the teacher.

An engine's answers depend on prompts, seeds and settings, never on how prompts are batched. An engine is a class with
the methods of `EngineKind`, whose instances have those of `Engine`, and an entry in `registry.ENGINES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ...checks import check_settings
from ...errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from ...models.server import ServerSettings
    from ...models.spec import ModelSource

Strategy = Literal["greedy", "beam", "sample"]


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
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1.")
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


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine decodes, and how it computes; of these only compute_type affects answers.

    name          an entry of `ENGINES`, or auto: the first one with the reference's answers
    compute_type  precision other than that of the weights, if the engine offers one (CTranslate2: float32, bfloat16,
                  float16, int8)
    batch_tokens  padded tokens per forward (torch)
    threads       per forward; 0: one per core (ctranslate2)
    server        where the teacher is served (openai)
    """

    name: str = "auto"
    compute_type: str | None = None
    batch_tokens: int = 4096
    threads: int = 0
    server: ServerSettings | None = None


class Engine(Protocol):
    """An engine with its teacher. name: its key in `ENGINES`; exact: it computes with the teacher's weights as they
    are, so that its agreement with them need not be measured.
    """

    name: str
    exact: bool

    def identity(self) -> dict[str, Any]:
        """All that decides its answers, JSON-able: `teacher` (name or folder), `teacher_weights` (digest) or `revision`
        (commit), `dtype`, and what else matters.
        """
        ...

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        """`labels_per_input` answers to each prompt (token ids, as the teacher reads them), best first for beam search.

        seeds, one per answer, decide what is sampled; other strategies ignore them.
        """
        ...

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """Natural log-probability of each token of the given answer to each prompt, teacher-forced, temperature 1."""
        ...


class EngineKind(Protocol):
    """A class of engines: an entry of `ENGINES`. What it can do is known before any weights load."""

    def objection(self, model: ModelSource, decoding: Decoding | None, settings: EngineSettings) -> str | None:
        """Why it cannot do this work with this model, as a sentence; None if it can. Loads no weights.

        decoding None: given answers are to be scored (ranking).
        """
        ...

    def reservation(self, decoding: Decoding | None) -> str | None:
        """Why the reference is the better choice though this engine could do it, as a sentence; None if it is not."""
        ...

    def of(self, model: ModelSource, settings: EngineSettings) -> Engine:
        """The engine, made of a model that it has no objection to. The first moment at which weights may load."""
        ...
