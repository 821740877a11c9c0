"""The engines, and the choice among them, made before any weights load."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from ...checks import check_choice
from ...errors import ConfigError
from .protocol import Decoding, Engine, EngineKind, EngineSettings

if TYPE_CHECKING:
    from ...models.spec import ModelSource

logger = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "torch"
# Name -> the engine's class, or where it is, so that listing the names imports none. `auto` tries them in this order;
# entries after the reference, which can do everything, must be named explicitly.
ENGINES: dict[str, str | EngineKind] = {
    "ctranslate2": "rlkd.sampling.engines.ctranslate2_engine:CTranslate2Engine",
    REFERENCE: "rlkd.sampling.engines.torch_engine:TorchEngine",
    "openai": "rlkd.sampling.engines.openai_engine:OpenAIEngine",
}


def engine_names() -> tuple[str, ...]:
    """The values of `--engine`."""
    return (AUTO, *ENGINES)


@dataclass(frozen=True)
class EngineChoice:
    """An engine that can do the work and is not made yet: no weights are loaded. passed_over: why `auto` rejected
    others, by name.
    """

    name: str
    model: ModelSource
    settings: EngineSettings
    passed_over: dict[str, str] = field(default_factory=dict)

    def make(self) -> Engine:
        """Load what the engine needs. If `auto` chose it, log why."""
        if self.settings.name == AUTO:
            why = "".join(f"; not {name}: {reason}" for name, reason in self.passed_over.items()).rstrip(".")
            logger.info("engine: %s in %s%s", self.name, self.settings.compute_type or self.model.dtype, why)
        return _kind(self.name).of(self.model, self.settings)

    def reference(self) -> Engine:
        """PyTorch with the model's weights in full: what an approximate engine is compared with."""
        return _kind(REFERENCE).of(self.model.full_precision(), replace(self.settings, compute_type=None))


def choose_engine(settings: EngineSettings, model: ModelSource, decoding: Decoding | None) -> EngineChoice:
    """The requested engine; `auto` takes the first with the reference's answers and no objection. No weights
    are loaded.

    decoding: None if given answers are to be scored (ranking).
    Raises ConfigError if the engine is unknown, not installed, or cannot do the work.
    """
    wanted = settings.name
    check_choice("engine", wanted, engine_names())
    refused: dict[str, str] = {}
    for name in ENGINES if wanted == AUTO else (wanted,):
        kind = _kind(name)
        reason = kind.objection(model, decoding, settings)
        if reason is None and wanted == AUTO:
            reason = kind.reservation(decoding)
        if reason is None:
            return EngineChoice(name, model, settings, refused)
        refused[name] = reason
    if wanted != AUTO:
        remedy = "" if wanted == REFERENCE else f" Use --engine {REFERENCE}."
        raise ConfigError(f"engine = '{wanted}': {refused[wanted]}{remedy}")
    raise ConfigError(
        "engine = 'auto': no engine can do this.\n" + "\n".join(f"  {name}: {why}" for name, why in refused.items())
    )


def _kind(name: str) -> EngineKind:
    entry = ENGINES[name]
    return resolve_name(entry) if isinstance(entry, str) else entry
