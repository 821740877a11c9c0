"""What a command writes to the terminal or into a log file: our lines, without secrets and other libraries' noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from .redaction import redact_outputs


def prepare_outputs() -> None:
    """Log lines on stderr, secrets redacted; no warnings that only developers of other libraries can act on, and no
    progress bars of libraries in a log file.
    """
    redact_outputs()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rlkd").setLevel(logging.INFO)
    _quieten()
    if not sys.stderr.isatty():
        _no_bars()


def _quieten() -> None:
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator")
    if os.environ.get("WANDB_MODE") == "offline":
        os.environ["WANDB_MODE"] = "dryrun"  # the same to wandb; for the other, transformers prints a line on stdout


def _no_bars() -> None:
    """Turn off the progress bars of libraries that load and save: in a log file they are only carriage returns."""
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # it has already read the variable
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
