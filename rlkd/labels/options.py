"""How a label run is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..checks import check_settings
from ..sampling.schedule import Budget

OnLong = Literal["truncate", "error", "skip"]
By = Literal["logprob", "logprob_per_token", "reward"]  # what the best answers have most of: `filtering.Filter`


@dataclass(frozen=True)
class RunOptions:
    """How a label run is done; of this only seed and on_long decide a label.

    seed                 of sampling
    on_long              prompts longer than max_input_tokens: cut them, stop, or leave them without a label
    batch_tokens         padded tokens, of prompts and answers, in one batch
    shard_rows           label rows per file; an interrupted run loses at most one file
    part                 (i, n): only shards k with k % n == i, for job arrays
    overwrite            replace the labels in the folder
    allow_config_change  continue an unfinished folder with changed settings
    quiet                no progress
    request              the command, for `rlkd data repair`
    Raises ConfigError for an unknown on_long.
    """

    seed: int = 0
    on_long: OnLong = "truncate"
    batch_tokens: int = Budget().tokens
    shard_rows: int = 5000
    part: tuple[int, int] | None = None
    overwrite: bool = False
    allow_config_change: bool = False
    quiet: bool = False
    request: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
