"""The job of `rlkd inspect-rewards`: reward views from models and from label folders, by name."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

from ..checks import check_choice
from ..data.flaws import FlawCounts
from ..errors import DataError
from ..inspection.build import reward_view
from ..inspection.labels import from_labels
from ..inspection.reward_view import RewardView
from ..labels.store import finished_manifest
from ..models.signals import LocalSource
from ..models.spec import ModelSpec, check_pair, paired
from ..objectives.rewards import REWARDS
from ..records import Example
from .wiring import Reading, local_teacher, row_source, teacher_spec

logger = logging.getLogger(__name__)
STUDENTS = ("student", "student_before")


def view_of_models(request: dict[str, Any]) -> RewardView:
    """A teacher's scores of its own and of students' answers, on rows. Checks come in order of cost:
    configurations and vocabularies, templates and rows; weights load last.

    Raises: ModelError, DataError or ConfigError before weights load.
    """
    check_choice("reward_value", request["reward_value"], REWARDS)
    teacher = teacher_spec(request)
    shared = ("device", "allow_bin", "src_lang", "tgt_lang")
    how: dict[str, Any] = {name: getattr(teacher.model, name) for name in shared}
    how |= {"chat": request["student_chat"], "system_prompt": request["student_system_prompt"]}
    students = {role: ModelSpec(request[role], role, **how) for role in STUDENTS if request[role]}
    specs = list(students.values())
    for spec in specs:
        spec.check()
        spec.check_lengths(request["max_input_tokens"], request["max_new_tokens"])
    if specs and (said := paired(teacher.model, specs[0])):
        logger.info("%s", said)
    for first, spec in pairwise(specs):
        check_pair(first, spec)
    names, examples = _examples(request, teacher.tokenizer)
    source: LocalSource = local_teacher(teacher, specs[0]) if specs else teacher.load()
    return reward_view(
        source,
        specs[0].tokenizer if specs else source.tokenizer,
        examples,
        student={role.replace("_", " "): spec.load() for role, spec in students.items()},
        value=request["reward_value"],
        template_names=names,
        max_new_tokens=request["max_new_tokens"],
    )


def view_of_labels(request: dict[str, Any]) -> RewardView:
    """Labels with the numbers recorded with them or, if a teacher is named, with its scores. It reads prompts as the
    labels' teacher did.

    Raises: DataError unless the folder holds finished labels that tell how; ModelError before weights load.
    """
    check_choice("reward_value", request["reward_value"], REWARDS)
    settings = finished_manifest(request["labels"]).header["settings"]
    for name, kind in (("teacher", str), ("max_input_tokens", int), ("append_eos", bool)):
        if not isinstance(settings.get(name), kind):
            raise DataError(f"{request['labels']}: its manifest's settings have no {name}. Get the labels again.")
    reading = {"max_input_tokens": settings["max_input_tokens"], "input_eos": settings["append_eos"]}
    reading |= {name: settings.get(name) for name in ("src_lang", "tgt_lang")}
    chat = settings.get("chat")
    reading |= {"teacher_chat": chat is not None, "teacher_system_prompt": chat and chat["system"]}
    if not request["teacher"]:
        logger.info("reading tokens with the tokenizer of '%s', which the labels name", settings["teacher"])
    teacher = teacher_spec({**request, **reading, "teacher": request["teacher"] or settings["teacher"]})
    return from_labels(
        request["labels"],
        teacher.tokenizer,
        teacher=teacher if request["teacher"] else None,
        value=request["reward_value"],
        limit=request["limit"],
    )


def _examples(request: dict[str, Any], tokenizer: Any) -> tuple[list[str], list[Example]]:
    """Names of the templates, and the inputs that all of them apply to; what is wrong with these is logged."""
    source = Reading.of(request, tokenizer).prompted_rows(row_source(request))
    rows = [row for _, block in source.blocks(request["limit"], lambda k: k == 0) for row in block]
    flaws = FlawCounts()
    flaws.add_rows(rows, source.render.template_names)
    for line in flaws.lines():
        logger.warning("%s", line)
    failed = [next((p.error for p in row.prompts if p.status == "failed"), None) for row in rows]
    errors = [error for error in failed if error is not None]
    examples = [
        Example(row.id, row.student_input, tuple(str(prompt.text) for prompt in row.prompts), row.references)
        for row in rows
        if all(prompt.text for prompt in row.prompts)
    ]
    if errors and not examples:
        raise DataError(errors[0])
    if errors:
        logger.warning("left out %d of %d rows, on which a template fails: %s", len(errors), len(rows), errors[0])
    if not examples:
        raise DataError(
            f"'{request['dataset']}': no row has an input under every template. Choose other templates or columns."
        )
    return source.render.template_names, examples
