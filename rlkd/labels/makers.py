"""Whose labels a student learns, and how that differs from what the run itself says."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ..io.provenance import origins
from ..templates.template import Template
from .run import template_settings

logger = logging.getLogger(__name__)


def announce(
    labels: list[dict[str, Any]],
    teachers: Sequence[tuple[Any, str | None]],
    *,
    append_eos: bool | None = None,
    chats: Sequence[dict[str, Any] | None] | None = None,
) -> None:
    """Say who made the labels, and warn of those that are not the answers of one of `teachers`, or are answers to
    prompts that ended otherwise.

    labels: what `io.provenance.described` tells. teachers: models, and the digests of their weights; append_eos:
    whether their prompts end with end-of-sequence; chats: `Chat.record` of each; None if that is not known.
    """
    for made in labels:
        logger.info(
            "labels: answers of %s (%s), templates %s, strategy %s, data %s",
            made["teacher"], made["revision"], ", ".join(map(str, made["templates"])), made.get("strategy"),
            made.get("dataset") or made.get("data"),
        )  # fmt: skip
        if teachers and not any(_is_maker(made, *teacher) for teacher in teachers):
            names = " and ".join(str(model.config.name_or_path) for model, _ in teachers)
            logger.warning(
                "the labels are answers of %s (%s), not of this run's teacher %s: the student learns from the one and "
                "is evaluated by the other", made["teacher"], made["revision"], names,
            )  # fmt: skip
        theirs = made.get("append_eos")
        if None not in (theirs, append_eos) and theirs != append_eos:
            logger.warning(
                "the labels were written with teacher_append_eos: %s, but this run's teacher reads its prompts with %s",
                str(theirs).lower(), str(append_eos).lower(),
            )  # fmt: skip
        if chats and made.get("strategy") and made.get("chat") not in chats:
            logger.warning(
                "the labels were written to prompts %s, but this run's teacher reads its prompts %s (teacher_chat, "
                "teacher_system_prompt)", _shown_chat(made.get("chat")), _shown_chat(chats[0]),
            )  # fmt: skip


def differences(labels: Any, *, dataset: str, templates: Sequence[Template], settings: dict[str, Any]) -> list[str]:
    """How labels were made otherwise than a run's settings say, one line each: templates, dataset, and the entries of
    `settings`, which are some of a source's identity (sha256, input, row_map, student_template).
    """
    lines: list[str] = []
    names = template_settings([(t.name, t.id, t.fingerprint) for t in templates] or [("none", "", "")])
    for origin in origins(labels):
        theirs = origin["settings"]
        source = theirs.get("source") or {}
        if theirs.get("templates") not in (None, names):
            lines.append(f"  templates: {_names(theirs['templates'])} -> {_names(names)}")
        known = {**source, **(source.get("columns") or {})}
        same_data = known.get("sha256") is not None and known["sha256"] == settings.get("sha256")
        if not same_data and {origin["dataset"], known.get("sha256")} != {None}:
            lines.append(f"  dataset: {origin['dataset'] or known['sha256']} -> {dataset}")
        for name, value in settings.items():
            if name != "sha256" and name in known and known[name] != value:
                lines.append(f"  {name}: {known[name]!r} -> {value!r}")
    return list(dict.fromkeys(lines))


def _shown_chat(chat: dict[str, Any] | None) -> str:
    if chat is None:
        return "as plain text"
    system = "" if chat["system"] is None else f" after the system prompt {chat['system'][:60]!r}"
    return f"in the chat template {chat['template']}{system}"


def _is_maker(made: dict[str, Any], teacher: Any, weights: str | None) -> bool:
    """Whether the labels are of these weights; by name where their precision differs, or no digest is known."""
    ours, theirs = (str(d).removeprefix("torch.") for d in (getattr(teacher, "dtype", None), made.get("dtype")))
    if ours == theirs and made["revision"] is not None:
        return made["revision"] in (weights, getattr(teacher.config, "_commit_hash", None))
    theirs, ours = str(made["teacher"]), str(teacher.config.name_or_path)
    return theirs == ours or os.path.abspath(theirs) == os.path.abspath(ours)


def _names(templates: list[list[str]]) -> str:
    return ", ".join(f"{name} ({digest})" for name, _, digest in templates)
