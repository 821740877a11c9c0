"""How many tokens a model has positions for: what it cannot read is refused by length, not by an IndexError."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class Positions:
    """The longest texts that a model reads, in tokens; None: any length.

    prompt, answer  of an encoder-decoder, each on its own
    together        the context window of a decoder-only model, which prompt and answer share
    """

    prompt: int | None = None
    answer: int | None = None
    together: int | None = None

    def check(self, prompt: int = 0, answer: int = 0) -> None:
        """Raises ModelError for a prompt and an answer of so many tokens if they are too long."""
        for what, length, limit, field in (
            ("a prompt", prompt, self.prompt, "max_input_tokens"),
            ("an answer", answer, self.answer, "max_new_tokens"),
        ):
            if limit is not None and length > limit:
                raise ModelError(
                    f"{what} has {length} tokens, the model {limit} positions: set {field} to at most {limit}."
                )
        if self.together is not None and prompt + answer > self.together:
            raise ModelError(
                f"a prompt of {prompt} and an answer of {answer} tokens do not fit into the model's context window of "
                f"{self.together}: lower max_input_tokens or max_new_tokens."
            )

    def check_settings(self, max_input_tokens: int, max_new_tokens: int | None, whose: str) -> None:
        """Raises ConfigError if texts of these lengths are too long; `whose` names the model."""
        given = {"max_input_tokens": max_input_tokens, "max_new_tokens": max_new_tokens}
        for (field, value), limit in zip(given.items(), (self.prompt, self.answer), strict=True):
            if value is not None and limit is not None and value > limit:
                raise ConfigError(
                    f"{field} = {value}: {whose} has {limit} positions. Set {field} to at most {limit}; longer texts "
                    "are cut."
                )
        needed = max_input_tokens + (1 if max_new_tokens is None else max_new_tokens)
        if self.together is not None and needed > self.together:
            raise ConfigError(
                f"max_input_tokens = {max_input_tokens} and max_new_tokens = {max_new_tokens}: prompt and answer share "
                f"the context window of {whose}, {self.together} tokens. Lower one of them; longer texts are cut."
            )

    def longest_answer(self, max_input_tokens: int) -> int | None:
        """Tokens of the longest answer to a prompt of at most `max_input_tokens`."""
        return self.answer if self.together is None else max(self.together - max_input_tokens, 0)
