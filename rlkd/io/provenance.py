"""Where labels in memory come from, kept in their data set's description: selecting, filtering and joining rows
preserve it.
"""

from __future__ import annotations

import json
from typing import Any

KEY = "rlkd_labels"


def attach(rows: Any, origins: list[dict[str, Any]]) -> None:
    """Note in a `datasets.Dataset` where its rows come from: one origin per `generation` of labels, JSON-able."""
    rows.info.description = json.dumps({KEY: origins})


def origins(rows: Any) -> list[dict[str, Any]]:
    """What `attach` noted, of all data sets that were joined; [] for rows without origin."""
    text = getattr(getattr(rows, "info", None), "description", None) or ""
    found: list[dict[str, Any]] = []
    for part in text.split("\n\n"):  # how `datasets` joins descriptions
        try:
            found += json.loads(part)[KEY]
        except (ValueError, KeyError, TypeError):
            continue
    return found
