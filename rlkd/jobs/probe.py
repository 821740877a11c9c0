"""The job of `rlkd probe`: linear probes of the layers of several frozen encoders, on the same rows."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..checks import check_settings
from ..choices import Pool
from ..data.labelled import EncodedTexts
from ..data.probe_rows import ProbeRows
from ..errors import ConfigError, ModelError
from ..evaluation.probing import Split, linear_probe, majority_baseline
from ..models.encoders import representations
from ..models.encoders.classifiers import check_length
from ..models.spec import default_device
from ..models.vocabulary import check_vocabulary_fits, load_tokenizer, valid_vocab

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSettings:
    """pool, how a layer's outputs become one vector per text; layers, their numbers in ascending order (0: the
    embeddings), None for all; max_length, tokens a text is cut to; batch_size, rows in one forward; allow_bin,
    as in `ModelSpec`.
    """

    pool: Pool = "cls"
    layers: list[int] | None = None
    max_length: int = 128
    batch_size: int = 32
    allow_bin: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class _Encoder:
    """A model whose configuration and tokenizer fit the settings; no weights are loaded."""

    name: str
    config: Any
    tokenizer: Any

    @classmethod
    def checked(cls, name: str, settings: ProbeSettings) -> _Encoder:
        config = representations.load_encoder_config(name, allow_bin=settings.allow_bin)
        last = config.num_hidden_layers
        if settings.layers is not None and settings.layers[-1] > last:
            raise ConfigError(f"--layers {settings.layers[-1]}: model '{name}' has the layers 0 to {last}")
        check_length(settings.max_length, config, f"model '{name}'")
        tokenizer = load_tokenizer(name, "model")
        check_vocabulary_fits(config, valid_vocab(tokenizer), "model", name)
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"model '{name}': its tokenizer has no padding token. Set one (pad_token) and save it again."
            )
        return cls(name, config, tokenizer)

    def scores(self, rows: ProbeRows, settings: ProbeSettings) -> dict[str, Any]:
        """Scores of the embeddings' mean and of each layer."""
        layers = settings.layers if settings.layers is not None else range(self.config.num_hidden_layers + 1)
        model = representations.load_encoder(self.name, self.config, allow_bin=settings.allow_bin).to(default_device())
        mean: Pool = "mean"
        wanted = list(dict.fromkeys([(0, mean), *((layer, settings.pool) for layer in layers)]))
        splits = []
        for part in (rows.train, rows.validation, rows.test):
            texts = EncodedTexts(part, self.tokenizer, settings.max_length, len(rows.classes))
            features = representations.pooled_layers(model, texts.batches(settings.batch_size), wanted)
            splits.append((features, np.array(texts.labels)))
            logger.info("%s: %d rows read", self.name, len(texts))
        scores = {}
        for choice in wanted:
            train, validation, test = (Split(features[choice], labels) for features, labels in splits)
            scores[choice] = linear_probe(train, validation, test)
        return {
            "embeddings_mean": asdict(scores[0, mean]),
            "layers": [{"layer": layer, **asdict(scores[layer, settings.pool])} for layer in layers],
        }


def probe_models(models: list[str], rows: ProbeRows, settings: ProbeSettings) -> dict[str, Any]:
    """Test accuracies, with intervals, of linear probes: for each model those of its layers and of its embeddings'
    mean, and the accuracy of the most frequent label. All models are checked before weights load.

    Returns: labels, rows (by split), pool, majority, models; JSON-able. Raises ModelError or ConfigError.
    """
    encoders = [_Encoder.checked(name, settings) for name in models]
    results = [{"model": encoder.name, **encoder.scores(rows, settings)} for encoder in encoders]
    labels = (np.array([row["label"] for row in part]) for part in (rows.train, rows.test))
    return {
        "labels": list(rows.classes),
        "rows": {split: len(getattr(rows, split)) for split in ("train", "validation", "test")},
        "pool": settings.pool,
        "majority": asdict(majority_baseline(*labels)),
        "models": results,
    }
