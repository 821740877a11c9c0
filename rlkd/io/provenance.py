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


def described(rows: Any) -> list[dict[str, Any]]:
    """Who made labels, and from what, for a run's record: {folder, teacher, revision, dtype, templates, append_eos,
    chat, strategy, dataset, data, vocabulary, generation} for each generation. What their origins do not tell (labels
    that lost them) is read from their columns; [] for other rows.
    """
    made = origins(rows)
    if made:
        return [_of_origin(origin) for origin in made]
    names = ("model", "revision", "generation", "template")
    if not set(names) <= set(getattr(rows, "column_names", None) or ()):
        return []
    templates: dict[tuple[Any, ...], dict[str, None]] = {}
    for model, revision, generation, template in zip(*(rows[name] for name in names), strict=True):
        templates.setdefault((model, revision, generation), {})[template] = None
    return [
        {"teacher": model, "revision": revision, "generation": generation, "templates": list(found)}
        for (model, revision, generation), found in templates.items()
    ]


def _of_origin(origin: dict[str, Any]) -> dict[str, Any]:
    settings = origin["settings"]
    return {
        "folder": origin["folder"],
        "teacher": settings.get("teacher"),
        "revision": settings.get("revision") or settings.get("teacher_weights"),
        # Older versions, which did not note the tokenizer, took a digest of a sample of the weights.
        "dtype": settings.get("dtype") if "tokenizer" in settings else None,
        "templates": [template[0] for template in settings.get("templates", [])],
        "append_eos": settings.get("append_eos"),
        "chat": settings.get("chat"),
        "strategy": settings.get("strategy"),
        "dataset": origin["dataset"],
        "data": settings.get("source"),
        "vocabulary": origin["vocabulary"],
        "generation": origin["generation"],
    }
