"""What a checkpoint's generation_config says of its answers: tokens that begin and end them, forced and forbidden ones.

They belong to the model as much as its weights do: BART begins every answer with `<s>`, a translation model with the
token of its language. `AnswerRules` holds them, and the logits of decoding, scores and losses are restricted alike.
How to search (beams, sampling temperature, length limits) is for whoever asks, except for beam search's length penalty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError
from .adapters import adapter_of
from .folders import GENERATION, check_json, check_place, explained
from .not_applied import ignored_settings

if TYPE_CHECKING:
    from .language_model import LanguageModel

# The logit of a token that cannot follow: its probability is exactly 0, and products with it stay finite.
FORBIDDEN = -1e4


@dataclass(frozen=True)
class AnswerRules:
    """What may stand in an answer y_0 y_1 ..., besides what the logits say; the empty rules by default.

    start_id         the decoder's input before y_0; None: there is none, the answer continues its prompt (decoder-only)
    eos_ids          tokens that end an answer; the first is the one that texts end with
    pad_id           fills what lies beyond an answer
    first            y_0, if it is forced (forced_bos_token_id)
    last             token that decoding writes in place of the last one it may make (forced_eos_token_id): the answer
                     still counts as cut. Training's limit is a horizon instead, and forces nothing
    banned           never allowed (suppress_tokens, bad_words_ids of one token)
    banned_at_start  not allowed as the first token that is not forced (begin_suppress_tokens)
    banned_phrases   token sequences that may not be completed (longer bad_words_ids)
    min_tokens       tokens before the first end (min_length, min_new_tokens)
    ngram            no n-gram of this size twice (no_repeat_ngram_size); 0: any
    length_penalty, early_stopping    of beam search, as in transformers
    ignored          settings of its checkpoint that are ignored (`models.not_applied`), by transformers' name
    """

    start_id: int | None = 0
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    first: int | None = None
    last: int | None = None
    banned: tuple[int, ...] = ()
    banned_at_start: tuple[int, ...] = ()
    banned_phrases: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    ngram: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    ignored: tuple[tuple[str, Any], ...] = ()

    @property
    def end_of_prompts(self) -> bool:
        """Whether prompts end with end-of-sequence unless told otherwise: those of an encoder do; an answer that
        continues its prompt would come after the end of the text.
        """
        return self.start_id is not None

    @property
    def moving(self) -> dict[str, Any]:
        """Rules that depend on what the answer holds so far, by transformers' name; `first` and `last` apart."""
        values = {
            "begin_suppress_tokens": self.banned_at_start,
            "bad_words_ids": self.banned_phrases,
            "min_length": self.min_tokens,
            "no_repeat_ngram_size": self.ngram,
        }
        return {name: value for name, value in values.items() if value}

    @property
    def format(self) -> dict[str, Any]:
        """Rules that two models must share for one to read what the other writes, by transformers' name."""
        return {
            "forced_bos_token_id": self.first,
            "eos_token_id": sorted(self.eos_ids),
            "suppress_tokens": sorted(self.banned),
            "begin_suppress_tokens": sorted(self.banned_at_start),
        }

    def identity(self) -> dict[str, Any]:
        """What a record of answers should name: nothing for models that only start, end and pad."""
        values = {
            "forced_bos_token_id": self.first,
            "forced_eos_token_id": self.last,
            "suppress_tokens": self.banned,
            **self.moving,
            "length_penalty": None if self.length_penalty == 1.0 else self.length_penalty,
            "early_stopping": self.early_stopping,
        }
        named = {name: value for name, value in values.items() if value not in (None, (), False)}
        record = {"generation_config": named, "generation_config_ignored": dict(self.ignored)}
        return {name: json.loads(json.dumps(value)) for name, value in record.items() if value}

    def within(self, valid_vocab: int) -> AnswerRules:
        """Without bans of ids that are no tokens: a saved student names the spare rows of its embedding."""
        return replace(self, banned=tuple(token for token in self.banned if token < valid_vocab))

    def complete(self, ids: list[int], most: int | None = None) -> list[int]:
        """The ids of a text with the forced first token, which not every tokenizer writes, cut to `most`."""
        if self.first is not None and ids[:1] != [self.first]:
            ids = [self.first, *ids]
            if most is not None and len(ids) > most:
                ids = [*ids[: most - 1], ids[-1]] if ids[-1] in self.eos_ids else ids[:most]
        return ids

    def up_to_end(self, ids: list[int]) -> list[int]:
        """The ids until the first that ends an answer, included."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[: end + 1]

    def ended(self, ids: list[int], most: int) -> bool:
        """Whether an answer of at most `most` tokens ended of itself."""
        return ids[-1:] != [] and ids[-1] in self.eos_ids and (self.last is None or len(ids) < most)

    def limits(self, ids: Tensor, mask: Tensor, most: int | None = None) -> Tensor | None:
        """[N, K] int64, for `restrict`, of the N tokens of `mask` [B, R] in given answers ids [B, R], row after row;
        None if there is nothing to restrict.

        most: the length at which decoding writes `last`. A given token is never forbidden: texts that other people
        wrote break rules such as no_repeat_ngram_size, and are scored as if the rule did not apply there.
        """
        if not self._restrict(most):
            return None
        made = []
        for row in ids.tolist():
            answer = AnswerSoFar(self, most)
            for token in row:
                forced, banned = answer.limits()
                made.append([forced if forced == token else -1, *(other for other in banned if other != token)])
                answer.append(token)
        return _table(made, ids.device)[mask.flatten()]

    def begin(self, rows: int, most: int | None = None) -> list[AnswerSoFar]:
        """The beginnings of `rows` answers to be decoded; empty if there is nothing to restrict."""
        return [AnswerSoFar(self, most) for _ in range(rows)] if self._restrict(most) else []

    def _restrict(self, most: int | None) -> bool:
        ends = self.last is not None and most is not None
        return bool(self.banned or self.moving or self.first is not None or ends)


NO_RULES = AnswerRules()


class AnswerSoFar:
    """An answer under rules, token by token."""

    def __init__(self, rules: AnswerRules, most: int | None):
        self.rules, self.most = rules, most
        self.ids: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        # N-grams and phrases count it, as in transformers; -1 is no token.
        self.append(-1 if rules.start_id is None else rules.start_id)

    def limits(self) -> tuple[int, list[int]]:
        """The only token that may follow (-1: there is a choice), and those that may not."""
        rules, place = self.rules, len(self.ids) - 1
        if rules.last is not None and self.most is not None and place == self.most - 1:
            return rules.last, []
        if rules.first is not None and place == 0:
            return rules.first, []
        banned = list(rules.banned)
        if place == (rules.first is not None):
            banned += rules.banned_at_start
        if place < rules.min_tokens:
            banned += rules.eos_ids
        banned += [p[-1] for p in rules.banned_phrases if tuple(self.ids[1 - len(p) :]) == p[:-1]]
        if rules.ngram:
            banned += self.followers.get(self._context(), [])
        return -1, banned

    def append(self, token: int) -> None:
        if self.rules.ngram:
            self.followers.setdefault(self._context(), []).append(token)
        self.ids.append(token)

    def _context(self) -> tuple[int, ...]:
        """What a next token would complete to an n-gram; shorter at the beginning, where none can be complete."""
        return tuple(self.ids[max(len(self.ids) - self.rules.ngram + 1, 0) :])


def next_limits(answers: Sequence[AnswerSoFar], device: torch.device) -> Tensor:
    """[n, K] int64, for `restrict`, of the next token of each answer."""
    return _table([[forced, *banned] for forced, banned in (answer.limits() for answer in answers)], device)


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows), default=1)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long, device=device)


def restrict(logits: Tensor, limits: Tensor | None) -> Tensor:
    """The logits [n, V], `FORBIDDEN` where `limits` [n, K] do not allow a token: column 0 holds the only token that may
    follow, or -1; the others hold tokens that may not, filled up with -1.
    """
    return logits if limits is None else logits.masked_fill(forbidden(logits, limits), FORBIDDEN)


def forbidden(logits: Tensor, limits: Tensor) -> Tensor:
    """[n, V] bool: the tokens that may not follow."""
    n, size = logits.shape
    banned = torch.zeros(n, size + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(limits[:, 1:] < 0, size, limits[:, 1:]), True)  # -1: a column of its own
    forced = limits[:, :1]
    others = torch.arange(size, device=logits.device) != forced
    return torch.where(forced < 0, banned[:, :-1], others)


def read_rules(
    config: Any, generation_config: Any, role: str, name: str, valid_vocab: int, *, continues: bool = False
) -> AnswerRules:
    """The rules of a checkpoint with `valid_vocab` tokens, from its configuration and transformers.GenerationConfig.

    continues: answers continue their prompts, and nothing starts them.
    Raises ModelError for ids that are no tokens, and if no token starts or ends an answer.
    """
    where = f"{role} '{name}': "

    def value(*names: str) -> Any:
        """The first that is set, in generation_config before config."""
        found = (getattr(source, key, None) for key in names for source in (generation_config, config))
        return next((value for value in found if value is not None), None)

    start, eos = value("decoder_start_token_id", "bos_token_id"), value("eos_token_id")
    if start is None and not continues:
        raise ModelError(
            f"{where}neither config.json nor generation_config.json has a decoder_start_token_id (or bos_token_id). "
            "Set it to the token that begins answers: the padding token for T5, end-of-sequence for BART."
        )
    if eos is None or eos == []:
        raise ModelError(
            f"{where}neither config.json nor generation_config.json has an eos_token_id, so no answer could end. "
            "Set it to the tokenizer's end-of-sequence token."
        )
    ends, pad = _ids(eos), value("pad_token_id")
    phrases = [tuple(phrase) for phrase in getattr(generation_config, "bad_words_ids", None) or ()]
    phrases = [p for p in phrases if not (len(p) == 1 and (p[0] in ends or valid_vocab <= p[0] < config.vocab_size))]

    def get(key: str, default: Any = None) -> Any:
        return getattr(generation_config, key, None) or default

    def tokens(key: str) -> tuple[int, ...]:
        """Without rows of the embedding that are no tokens: nothing can be said of them."""
        return tuple(token for token in _ids(get(key)) if not valid_vocab <= token < config.vocab_size)

    rules = AnswerRules(
        start_id=None if continues else _ids(start)[0],
        eos_ids=ends,
        pad_id=ends[0] if pad is None else _ids(pad)[0],
        first=getattr(generation_config, "forced_bos_token_id", None),
        last=(_ids(getattr(generation_config, "forced_eos_token_id", None)) or (None,))[0],
        banned=tuple(dict.fromkeys([*tokens("suppress_tokens"), *(p[0] for p in phrases if len(p) == 1)])),
        banned_at_start=tokens("begin_suppress_tokens"),
        banned_phrases=tuple(phrase for phrase in phrases if len(phrase) > 1),
        # min_length counts the start token.
        min_tokens=max(get("min_length", 0) - 1, get("min_new_tokens", 0)),
        ngram=0 if continues else get("no_repeat_ngram_size", 0),
        length_penalty=1.0 if (penalty := getattr(generation_config, "length_penalty", None)) is None else penalty,
        early_stopping=get("early_stopping", False),
        ignored=ignored_settings(generation_config, continues=continues),
    )
    _check_ids(rules, where, valid_vocab)
    return rules


def beam_search_settings(rules: AnswerRules, beyond: Iterable[int], **search: int) -> Any:
    """The transformers.GenerationConfig of a beam search under the rules; beyond, rows of the embedding that are no
    tokens (T5 pads it); search, how wide and how long, as in transformers.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        **search,
        do_sample=False,
        decoder_start_token_id=rules.start_id,
        eos_token_id=list(rules.eos_ids),
        pad_token_id=rules.pad_id,
        forced_bos_token_id=rules.first,
        forced_eos_token_id=rules.last,
        suppress_tokens=[*rules.banned, *beyond] or None,
        begin_suppress_tokens=list(rules.banned_at_start) or None,
        bad_words_ids=list(map(list, rules.banned_phrases)) or None,
        min_new_tokens=rules.min_tokens or None,
        no_repeat_ngram_size=rules.ngram or None,
        length_penalty=rules.length_penalty,
        early_stopping=rules.early_stopping,
    )


def rules_of(lm: LanguageModel) -> AnswerRules:
    """The rules of a language model; one whose head has none ends answers with its eos_id alone."""
    rules = lm.head().rules
    return rules if rules.eos_ids else replace(rules, eos_ids=(lm.eos_id,))


def load_generation_config(name: str, role: str, revision: str | None = None) -> Any:
    """The transformers.GenerationConfig of a folder or hub id, before weights load.

    Checkpoints without generation_config.json keep its fields in config.json, where transformers 5 overlooks them.
    An adapter without one has its base's. Raises ModelError if it cannot be read.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    folder = check_place(name, role)
    adapter = adapter_of(name, role, revision)
    if folder is not None and (folder / GENERATION).exists():
        check_json(folder, (GENERATION,), role, name)
        with explained(role, name, GENERATION):
            return GenerationConfig.from_pretrained(name)
    if adapter is not None:
        return load_generation_config(adapter.base, adapter.base_role, adapter.base_revision)
    if folder is None:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(name, revision=revision or "main")
    fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    return GenerationConfig.from_model_config(fields)


def check_same_format(teacher: AnswerRules, student: AnswerRules, names: tuple[str, str]) -> None:
    """Raises ModelError unless both models begin and end answers alike and ban the same tokens."""
    for key, theirs in teacher.format.items():
        if (ours := student.format[key]) != theirs:
            raise ModelError(
                f"teacher '{names[0]}' has {key} = {_short(theirs)} and student '{names[1]}' {_short(ours)}: the "
                "teacher would score answers that it cannot write. Set them alike in generation_config.json."
            )


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of a setting that is None, one id or a list of them."""
    return () if value is None else tuple(map(int, value)) if isinstance(value, (list, tuple)) else (int(value),)


def _check_ids(rules: AnswerRules, where: str, size: int) -> None:
    ids = {
        "decoder_start_token_id": _ids(rules.start_id),
        "eos_token_id": rules.eos_ids,
        "pad_token_id": (rules.pad_id,),
        "forced_bos_token_id": _ids(rules.first),
        "forced_eos_token_id": _ids(rules.last),
        "suppress_tokens or bad_words_ids": rules.banned,
        "begin_suppress_tokens": rules.banned_at_start,
        "bad_words_ids": sum(rules.banned_phrases, ()),
    }
    for key, tokens in ids.items():
        if wrong := [token for token in tokens if not 0 <= token < size]:
            raise ModelError(
                f"{where}{key} has {_short(wrong)}, which is none of its {size:,} tokens. "
                "Correct generation_config.json."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."
