"""A saved student by name, for commands that use one: how it is named, and the lengths that the run behind it had."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.spec import ModelSpec, default_device
from ..runs.record import RunRecord
from ..trainers.supervised import ReferenceTrainer

logger = logging.getLogger(__name__)
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


def with_lengths(request: Mapping[str, Any]) -> dict[str, Any]:
    """A command's options, with the lengths that it leaves open as the model's run had them."""
    found = LIMITS | limits_of(request["model"])
    return {**request, **{name: int(request[name] or found[name]) for name in LIMITS}}


def warn_of_training(request: Mapping[str, Any]) -> None:
    """Say where the run that made the model gave it other inputs, or other lengths, than the command asks for."""
    model = request["model"]
    record = RunRecord.read(Path(model))
    settings = {} if record is None else record.settings
    inputs = (
        () if record is None or record.trainer == ReferenceTrainer.__name__ else ("student_template", "pair_column")
    )
    trained = {name: settings[name] for name in inputs if name in settings}
    trained |= {name: value for name, value in limits_of(model).items() if request.get(name)}
    changed = [f"{name} {then} (now {request[name]})" for name, then in trained.items() if then != request[name]]
    if changed:
        logger.warning("'%s' was trained with %s", model, ", ".join(changed))
