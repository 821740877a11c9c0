"""Prompts as a turn of a chat: the tokenizer's own chat template around each text.

Whether a model reads its prompts so is kept in its tokenizer's configuration (`RECORD`): it is saved with a student,
and everything that encodes prompts or answers with this tokenizer does it alike.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from ..errors import ConfigError, ModelError, cut

logger = logging.getLogger(__name__)

RECORD = "rlkd_chat"
ROLES = ("teacher", "student")  # those that have a setting
# A text that no template writes by itself.
PROBE = "rlkd probe"
# Some templates write the date of the day. A prompt must be the same tomorrow: this is what Llama's write without one.
DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Chat:
    """Prompts as the user's turn of a chat, which the assistant's turn follows.

    system  text of a system turn before it; None: what the template writes without one
    """

    tokenizer: Any
    system: str | None = None

    def render(self, text: str, answer: str | None = None) -> str:
        """The text as transformers' `apply_chat_template` frames it, up to the beginning of an answer or, with one, up
        to its end. Raises as the template does.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        given = [] if answer is None else [{"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": text}, *given], add_generation_prompt=answer is None, tokenize=False
        )

    def prompts(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text in its frame. Of one with more than `max_tokens` the text is cut, never the frame.

        Raises ConfigError if the frame alone has more.
        """
        rows = self._ids([self.render(text) for text in texts])
        return [
            row if len(row) <= max_tokens else self._cut(text, max_tokens)
            for text, row in zip(texts, rows, strict=True)
        ]

    def answers(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as an answer, without its end; white space before it is left out, as templates do."""
        before, *rows = self._ids([self._opening, *(self._opening + text.lstrip() for text in texts)])
        joined = all(row[: len(before)] == before for row in rows)
        return [row[len(before) :] for row in rows] if joined else self._ids([text.lstrip() for text in texts])

    @cached_property
    def end(self) -> int | None:
        """The token that ends a turn; None if the template writes no special token after an answer."""
        try:
            whole = self.render("a", PROBE)
        except Exception:  # a template for prompts alone
            return None
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        after = self._ids([whole[whole.rfind(PROBE) + len(PROBE) :]])[0] if PROBE in whole else []
        return next((token for token in after if token in special), None)

    @property
    def record(self) -> dict[str, Any]:
        """What decides how prompts read: a digest of the template, and the system prompt."""
        return {"template": sha256(self.tokenizer.get_chat_template().encode()).hexdigest()[:16], "system": self.system}

    def check_room(self, max_tokens: int, whose: str) -> None:
        """Raises ConfigError if prompts of so many tokens have no room for a text."""
        frame = len(self._ids([self.render("")])[0])
        if frame >= max_tokens:
            raise ConfigError(
                f"max_input_tokens = {max_tokens}: the chat template of {whose} takes {frame} tokens without any text. "
                "Raise max_input_tokens."
            )

    @cached_property
    def _opening(self) -> str:
        """What stands between a text and its answer."""
        whole = self.render(PROBE)
        return whole[whole.rfind(PROBE) + len(PROBE) :]

    def _cut(self, text: str, max_tokens: int) -> list[int]:
        self.check_room(max_tokens, "these prompts")
        kept = len(self._ids([text])[0])
        row = self._ids([self.render(text)])[0]
        while len(row) > max_tokens:
            kept = max(kept - (len(row) - max_tokens), 0)
            row = self._ids([self.render(self._beginning(text, kept))])[0]
        return row

    def _beginning(self, text: str, tokens: int) -> str:
        if not self.tokenizer.is_fast:
            return self.tokenizer.decode(self._ids([text])[0][:tokens], clean_up_tokenization_spaces=False)
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return text[: places["offset_mapping"][tokens - 1][1]] if tokens else ""

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Of texts in which the special tokens are written out."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def chat_of(tokenizer: Any) -> Chat | None:
    """How the tokenizer frames prompts as chats; None if it does not."""
    record = getattr(tokenizer, "init_kwargs", {}).get(RECORD)
    return None if record is None else Chat(tokenizer, record.get("system"))


def chat_record(tokenizer: Any) -> dict[str, Any]:
    """{chat: `Chat.record`} for records of labels and runs; {} for prompts as they are."""
    chat = chat_of(tokenizer)
    return {} if chat is None else {"chat": chat.record}


def with_chat(tokenizer: Any, system: str | None = None, *, role: str = "model", name: str = "in memory") -> Any:
    """A copy of the tokenizer that reads prompts as turns of a chat, after the system prompt if one is given.

    Raises ConfigError if it has no chat template or the template refuses the system prompt, ModelError if it does not
    write the texts that it is given; `role` and `name` identify the model.
    """
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{role}_chat = True: the tokenizer of {role} '{name}' has no chat template. Name a model that was tuned "
            f"for chats, or set {role}_chat to false."
        ) from error
    made = _with_record(tokenizer, {"system": system})
    if "strftime_now" in template and DATE not in template:
        made.chat_template = DATE + template
    try:
        rendered = Chat(made, system).render(PROBE)
    except Exception as error:
        what = f"{role}_chat = True" if system is None else f"{role}_system_prompt"
        raise ConfigError(
            f"{what}: the chat template of {role} '{name}' refuses it: {cut(' '.join(str(error).split()), 200)}. "
            "Leave it out."
        ) from error
    if missing := [text for text in (PROBE, system) if text is not None and text.strip() not in rendered]:
        raise ModelError(
            f"{role} '{name}': its chat template leaves out the text {cut(missing[0])!r} that it is given. "
            "It is not one for texts."
        )
    return made


def without_chat(tokenizer: Any) -> Any:
    """The tokenizer as one that reads prompts as they are."""
    return tokenizer if chat_of(tokenizer) is None else _with_record(tokenizer, None)


def as_asked(tokenizer: Any, asked: bool | None, system: str | None, role: str, name: str) -> Any:
    """The tokenizer with or without its chat template; asked None: as it was saved, which is without unless rlkd
    trained the model with it; then says that there is one. Raises as `with_chat`, or ConfigError for a system prompt
    without a chat.
    """
    role, saved = role.removesuffix("_before"), chat_of(tokenizer)
    if system is not None and not asked:
        raise ConfigError(
            f"{role}_system_prompt is set without {role}_chat, of which it is a part: set {role}_chat to true."
        )
    if asked:
        return with_chat(tokenizer, system, role=role, name=name)
    if asked is False:
        return without_chat(tokenizer)
    if saved is not None:
        return with_chat(tokenizer, saved.system, role=role, name=name)
    if role in ROLES and getattr(tokenizer, "chat_template", None):
        logger.warning(
            "%s '%s' has a chat template, and reads its prompts as plain text: set %s_chat to true if it was tuned for "
            "chats, or to false for plain text", role, name, role,
        )  # fmt: skip
    return tokenizer


def frame(tokenizer: Any) -> list[str]:
    """What the tokenizer's chat template writes around a text and its answer; [] without one that can be used."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    chat = chat_of(tokenizer) or Chat(tokenizer)
    try:
        return [chat.render(""), chat.render("", "")]
    except Exception:  # said where it is to be used
        return []


def copy_chat(source: Any, tokenizer: Any) -> None:
    """Give a tokenizer the chat template of another, and whether prompts stand in it."""
    tokenizer.chat_template = getattr(source, "chat_template", None)
    if chat_of(source) is not None:
        tokenizer.init_kwargs[RECORD] = source.init_kwargs[RECORD]


def end_turns(generation: Any, config: Any, tokenizer: Any) -> None:
    """Let answers end with the token that ends a turn of the tokenizer's chat, first of all: in place, in a
    transformers.GenerationConfig. `config` has the ends where it has none.
    """
    chat = chat_of(tokenizer)
    if chat is None or chat.end is None:
        return
    known = generation.eos_token_id if generation.eos_token_id is not None else getattr(config, "eos_token_id", None)
    ends = [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]
    generation.eos_token_id = [chat.end, *(token for token in ends if token != chat.end)]


def _with_record(tokenizer: Any, record: dict[str, Any] | None) -> Any:
    made = copy.copy(tokenizer)
    made.init_kwargs = {**tokenizer.init_kwargs, RECORD: record}
    if record is None:
        del made.init_kwargs[RECORD]
    return made
