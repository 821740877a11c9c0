"""A tracker (wandb, trackio, ...) that is down does not end a run: metrics.jsonl has all numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger(__name__)


def survive_outages(callbacks: Iterable[TrainerCallback]) -> None:
    """Let each of transformers' tracker callbacks fail once, with a warning; it is not called again."""
    for callback in callbacks:
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            outage = Outage(type(callback).__name__.removesuffix("Callback"))
            for event in (name for name in dir(callback) if name.startswith("on_")):
                setattr(callback, event, outage.survived(getattr(callback, event)))


class Outage:
    """Whether a tracker has failed."""

    def __init__(self, tracker: str):
        self.tracker, self.failed = tracker, False

    def survived(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, doing nothing once the tracker has failed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return None
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.failed = True
                logger.warning(
                    f"the tracker {self.tracker} failed and is disabled for the rest of the run; metrics.jsonl has "
                    f"every number ({type(error).__name__}: {error})"
                )

        return call
