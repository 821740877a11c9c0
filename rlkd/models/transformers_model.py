"""What every `LanguageModel` over a transformers model has alike, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from .generation import AnswerRules
from .positions import Positions


@dataclass(frozen=True)
class TransformersModel(ABC):
    """The part of `LanguageModel` that is read off the transformers model.

    model        the transformers model (possibly PEFT-wrapped)
    valid_vocab  number of ids that are real tokens; actions and normalisers are limited to them
    """

    model: Any
    valid_vocab: int

    @staticmethod
    @abstractmethod
    def read_rules(config: Any, generation_config: Any, role: str, name: str, valid_vocab: int) -> AnswerRules:
        """As `generation.read_rules`, for its architecture."""
        ...

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def rules(self) -> AnswerRules:
        """What the checkpoint's generation_config says of answers. Raises ModelError as `read_rules` does."""
        name = getattr(self.config, "name_or_path", None) or type(self.model).__name__
        rules = self.read_rules(self.config, self.model.generation_config, "model", name, self.config.vocab_size)
        return rules.within(self.valid_vocab)

    @property
    def eos_id(self) -> int:
        return self.rules.eos_ids[0]

    @property
    def pad_id(self) -> int:
        return self.rules.pad_id

    @property
    def width(self) -> int:
        return int(self._base.get_output_embeddings().weight.shape[1])

    @property
    @abstractmethod
    def positions(self) -> Positions: ...

    @property
    def _base(self) -> Any:
        """Without PEFT's wrapping; adapters are in its layers, and the head and its configuration are its own."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _projection(self) -> Any:
        """The output embeddings. Raises ModelError if they are quantised."""
        projection = self._base.get_output_embeddings()
        if not projection.weight.is_floating_point():
            raise ModelError(
                "the output head is quantised, so its exact logits are not available. "
                "Keep it in full precision: add 'lm_head' to llm_int8_skip_modules."
            )
        return projection
