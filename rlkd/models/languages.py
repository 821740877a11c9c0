"""Languages of translation models (mBART, mBART-50, M2M100, NLLB, PLBART), whose tokenizers mark texts with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .generation import AnswerRules

STARTS_WITH_LANGUAGE = "MBartTokenizer"  # the first mBART: the language is the decoder's input, not its first output


def in_languages(
    rules: AnswerRules, tokenizer: Any, src_lang: str | None, tgt_lang: str | None, role: str, name: str
) -> AnswerRules:
    """The rules of answers in the language `tgt_lang`; None takes the one that the checkpoint forces.

    The tokenizer then marks prompts with `src_lang` (None: its default) and answers with `tgt_lang`. Raises ModelError
    if it does not know one of them, or if the model needs a language to answer in and nobody names it.
    """
    if not has_languages(tokenizer):
        if given := src_lang or tgt_lang:
            raise ModelError(
                f"src_lang or tgt_lang = {given!r}: the tokenizer of {role} '{name}' has no languages. Leave both out: "
                "they are for mBART, M2M100, NLLB and PLBART."
            )
        return rules
    ids = {code: language_id(tokenizer, code) for code in languages(tokenizer)}
    at_start = type(tokenizer).__name__.removesuffix("Fast") == STARTS_WITH_LANGUAGE
    if tgt_lang is None:
        # Not the tokenizer's default: where the checkpoint names none, translating to English is a guess.
        own = rules.start_id if at_start else rules.first
        tgt_lang = next((code for code, token in ids.items() if token == own), None)
    for field, code in (("tgt_lang", tgt_lang), ("src_lang", src_lang)):
        if code not in ids and (field == "tgt_lang" or code is not None):
            known = f"{', '.join(list(ids)[:8])}{', ...' if len(ids) > 8 else ''}"
            raise ModelError(
                f"{field} = {code!r}: {role} '{name}' translates between {len(ids)} languages: {known}. "
                "Set src_lang and tgt_lang to two of them."
            )
    assert tgt_lang is not None
    if src_lang is not None:
        tokenizer.src_lang = src_lang
    tokenizer.tgt_lang = tgt_lang
    return replace(rules, start_id=ids[tgt_lang]) if at_start else replace(rules, first=ids[tgt_lang])


def has_languages(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "tgt_lang") and bool(languages(tokenizer))


def languages_of(tokenizer: Any) -> dict[str, str]:
    """src_lang and tgt_lang that the tokenizer marks texts with; empty if it marks none."""
    return {"src_lang": tokenizer.src_lang, "tgt_lang": tokenizer.tgt_lang} if has_languages(tokenizer) else {}


def languages(tokenizer: Any) -> list[str]:
    """Codes of the languages that the tokenizer knows, as its documentation writes them."""
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if codes:
        return list(codes)
    special = [str(token) for token in tokenizer.all_special_tokens]
    return [token for token in special if len(token) > 4 and token[3] == "_"]  # NLLB: eng_Latn


def language_ids(tokenizer: Any) -> set[int]:
    """The ids of all languages' tokens."""
    return {language_id(tokenizer, code) for code in languages(tokenizer)}


def language_id(tokenizer: Any, code: str) -> int:
    """The id of a language's token."""
    codes = getattr(tokenizer, "lang_code_to_id", None)
    return int(codes[code] if codes else tokenizer.convert_tokens_to_ids(code))
