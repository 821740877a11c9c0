"""Files of a run folder other than models: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..io.files import append_text, write_text

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
METRICS, ALARMS_FILE = "metrics.jsonl", "alarms.jsonl"
SAMPLES, TOKEN_REWARDS, HELD_OUT = "samples.jsonl", "token_rewards.jsonl", "held_out.jsonl"


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records; the folder is created if missing. Raises RlkdError naming the file if the disk is full."""
    append_text(path, "".join(_line(record) for record in records))


def keep_first_and_last(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Write the evaluation of `step` and keep the first one of the run; those between are replaced."""
    kept: list[str] = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            first = None
            for line in file:
                written = json.loads(line)["step"]
                first = written if first is None else first
                if written != first or written >= step:
                    break
                kept.append(line)
    write_text(path, "".join([*kept, *(_line({"step": step, **row}) for row in rows)]))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
