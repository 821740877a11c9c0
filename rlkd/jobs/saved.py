"""A saved student by name, for commands that use one: how it is named, and the lengths that the run behind it had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.spec import ModelSpec, default_device
from ..runs.record import RunRecord

EXPORT_RECORD = "export.json"  # in a folder of `rlkd export`
LIMITS = {"max_input_tokens": 512, "max_new_tokens": 64}  # of a model that no run of rlkd made


def saved_student(request: Mapping[str, Any]) -> ModelSpec:
    """The generating model that a command's options name, on the default device."""
    return ModelSpec(
        request["model"],
        "student",
        dtype=request["dtype"],
        device=default_device(),
        allow_bin=bool(request["allow_bin"]),
        src_lang=request["src_lang"],
        tgt_lang=request["tgt_lang"],
        chat=request["student_chat"],
        system_prompt=request["student_system_prompt"],
    )


def limits_of(model: str) -> dict[str, int]:
    """Lengths of inputs and answers in the run that made a model, by setting; {} if it has no run.json."""
    record = RunRecord.read(Path(model))
    names = (*LIMITS, "max_length")
    found = {} if record is None else {name: record.settings.get(name) for name in names}
    return {name: value for name, value in found.items() if type(value) is int and value > 0}
