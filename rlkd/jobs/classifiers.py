"""A saved classifier by name, for commands that take any model: it is checked before its weights load."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..choices import ProblemType
from ..errors import ConfigError, ModelError
from ..models.encoders import bilstm as _bilstm  # noqa: F401  registers its configuration
from ..models.encoders.classifiers import check_length, longest_text
from ..models.encoders.labels import auto_class, check_problem, head_of, problem_of, stated_problem
from ..models.encoders.rehearsal import is_encoder
from ..models.encoders.words import reading_words
from ..models.loading import check_saved_weights, load_config, load_pretrained
from ..models.spec import default_device
from ..models.vocabulary import check_vocabulary_fits, load_tokenizer, valid_vocab
from .saved import EXPORT_RECORD, limits_of

logger = logging.getLogger(__name__)

CLASSIFIERS_ONLY = {
    "pair_column": None,
    "label_separator": None,
}  # options without effect with a generating model, and their defaults
LONGEST = 512  # tokens of a text, where the model has as many positions and nothing else is asked for


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier whose configuration and tokenizer fit; classes, the names of its logits; max_length, tokens of a
    text; problem_type, what its outputs are.
    """

    name: str
    config: Any
    tokenizer: Any
    classes: tuple[str, ...]
    max_length: int
    problem_type: ProblemType = "single_label_classification"
    allow_bin: bool = False

    @classmethod
    def of(cls, request: dict[str, Any]) -> SavedClassifier | None:
        """The model that a command names, None if it is no classifier. Raises ModelError if it is one that cannot be
        used, ConfigError for more tokens than it has positions. No weights are loaded.
        """
        name, allow_bin = request["model"], bool(request["allow_bin"])
        if (Path(name) / EXPORT_RECORD).exists():
            raise ModelError(f"model '{name}' was written by rlkd export: name the student that it was made of.")
        config = load_config(name, "model")
        if head_of(config) is None:
            return None
        if not is_encoder(config):
            raise ModelError(
                f"model '{name}' classifies with a '{config.model_type}' model, which reads texts in one direction: "
                "only encoders are supported here."
            )
        problem = problem_of(config)
        check_problem(config, "model", problem, name)
        if problem == "regression" and stated_problem(config) is None:
            logger.warning("model '%s' has one output and no problem_type: it is taken for a number", name)
        tokenizer = load_tokenizer(name, "model")
        if problem == "token_classification":
            refuse_options(request, {"pair_column": None}, "a classifier of words, which reads one text")
            tokenizer = reading_words(tokenizer, "model", name)
        check_vocabulary_fits(config, valid_vocab(tokenizer), "model", name)
        if tokenizer.pad_token_id is None:
            raise ModelError(f"model '{name}': its tokenizer has no padding token. Set one (pad_token), save it again.")
        usual = limits_of(name).get("max_length") or min(longest_text(config) or LONGEST, LONGEST)
        length = request["max_input_tokens"] or usual
        check_length(length, config, f"model '{name}'")
        check_saved_weights(name, "model", allow_bin=allow_bin)
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        return cls(name, config, tokenizer, names, length, problem, allow_bin)

    def load(self) -> Any:
        """The model in float32 on the default device, for evaluation. Raises ModelError as `load_pretrained`."""
        model = load_pretrained(
            auto_class(self.config),
            self.name,
            "model",
            config=self.config,
            allow_bin=self.allow_bin,
            dtype=torch.float32,
        )
        return model.eval().to(default_device())


def refuse_options(request: dict[str, Any], others: dict[str, Any], kind: str) -> None:
    """Raise ConfigError for an option that has no effect with a model of this kind; others: option -> its default."""
    for name, default in others.items():
        value = request.get(name)
        if value not in (default, [], ()):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect: '{request['model']}' is {kind}. Leave it out."
            )
