"""What a run is made from besides its settings and data: models, tokenizers and how the teacher reads its prompts."""

from __future__ import annotations

from typing import Any

from ..models.chat import chat_of
from ..models.digests import configuration_digest, tokenizer_digest, weights_digest
from ..models.signals import LocalSource

# Of a resumed run, too: it is looked at before the checkpoint is loaded.
NAMES = {"student": "initial student"}


def describe_inputs(trainer: Any) -> dict[str, str]:
    """{what: digest} of a trainer that has not begun to train; the initial student is also the KL reference."""
    described = {}
    for role, model in trainer.models().items():
        if model is not None:
            described[weights_of(role)] = weights_digest(model)
            described[f"{NAMES.get(role, role)}'s configuration"] = configuration_digest(model)
    tokenizers = {"tokenizer": trainer.tokenizer, "teacher's tokenizer": getattr(trainer, "teacher_tokenizer", None)}
    source = trainer.teacher
    for role, teacher in (source.teachers if isinstance(source, LocalSource) else {}).items():
        tokenizers[f"{role}'s tokenizer"] = teacher.tokenizer
        described[f"{role}'s reading"] = (
            f"{teacher.max_input_tokens} tokens, append_eos {teacher.append_eos}, {teacher.combination}, "
            f"{teacher.lm.valid_vocab} words{_in_chat(teacher.tokenizer)}"
        )
    if hasattr(source, "identity"):
        described |= source.identity()
    for name, tokenizer in tokenizers.items():
        if tokenizer is not None:
            described[name] = tokenizer_digest(tokenizer)
    return described


def _in_chat(tokenizer: Any) -> str:
    chat = chat_of(tokenizer)
    return "" if chat is None else f", chat template {chat.record['template']}, system prompt {chat.system!r}"


def weights_of(role: str) -> str:
    """The name in `describe_inputs` of the weights of the model with that role."""
    return f"{NAMES.get(role, role)}'s weights"
