"""Teacher and student must share a vocabulary: the reward is per token."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from ..errors import ConfigError, ModelError
from .adapters import adapter_of
from .chat import chat_of
from .folders import AGAIN, check_place, check_tokenizer, explained, has_tokenizer
from .generation import AnswerRules
from .languages import has_languages, language_ids

NO_LIMIT = 2**30  # tokens of a text that is not to be cut


def valid_vocab(tokenizer: Any) -> int:
    """V, the number of ids that are tokens: one more than the largest, holes included, added tokens too.

    `len(tokenizer)` counts tokens instead, and is too small where ids have holes.
    """
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_record(tokenizer: Any) -> dict[str, Any]:
    """What token ids mean: {tokens, their number; eos, the id that ends an answer; sha256, a digest of all tokens}.
    Equal for the same vocabulary whatever class of tokenizer holds it.
    """
    digest = sha256()
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{i} {token}\n".encode(errors="surrogatepass"))
    return {"tokens": len(tokenizer.get_vocab()), "eos": tokenizer.eos_token_id, "sha256": digest.hexdigest()[:16]}


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether every id is the same token to both tokenizers."""
    return one is other or one.get_vocab() == other.get_vocab()


def check_same_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any, teacher: str, student: str) -> int:
    """Number of valid ids shared by both tokenizers. Raises ModelError with both sizes and the first differing token.

    Compares tokenizers, not configurations: T5 models pad the embedding beyond the tokenizer (32,128 rows for
    32,100 pieces), which is fine. Runs before any weights load.
    """
    if same_vocabulary(teacher_tokenizer, student_tokenizer):
        return valid_vocab(student_tokenizer)
    ours = {i: t for t, i in teacher_tokenizer.get_vocab().items()}
    theirs = {i: t for t, i in student_tokenizer.get_vocab().items()}
    if ours == theirs:
        return valid_vocab(student_tokenizer)
    first = next(i for i in range(max(*ours, *theirs) + 1) if ours.get(i) != theirs.get(i))
    raise ModelError(
        f"teacher '{teacher}' and student '{student}' have different vocabularies: {len(ours):,} and "
        f"{len(theirs):,} tokens; "
        f"first difference at id {first}: {ours.get(first)!r} against {theirs.get(first)!r}. Their token ids are "
        "compared here: choose models with the same tokenizer, or wrap the teacher in OtherTokenizer, as recipes do."
    )


def check_ends(tokenizer: Any, role: str, name: str) -> None:
    """Raises ModelError if the tokenizer has no token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{role} '{name}': its tokenizer has no end-of-sequence token, so no answer could end. Set its eos_token "
            "to the token that ends texts, and save it again."
        )


def check_vocabulary_fits(config: Any, valid_vocab: int, role: str, name: str) -> None:
    """Raises ModelError if the tokenizer has ids the model's embedding lacks."""
    if config.vocab_size < valid_vocab:
        raise ModelError(
            f"{role} '{name}': the tokenizer has ids up to {valid_vocab - 1} but the model's vocab_size is "
            f"{config.vocab_size}. "
            "The tokenizer and the model do not match."
        )


def fitted_vocab(tokenizer: Any, config: Any, role: str, name: str) -> int:
    """V of a tokenizer and a model: `valid_vocab`, or the model's vocab_size where the ids beyond it are special tokens
    that no text has (Gemma 3's tokenizer knows an image, its text models do not). Raises ModelError for other ids that
    the model's embedding lacks.
    """
    size = valid_vocab(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if special.issuperset(range(config.vocab_size, size)):
        return min(size, config.vocab_size)
    check_vocabulary_fits(config, size, role, name)
    return size


def check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    """Raises ModelError for a token that the model's embedding lacks."""
    if missing := [row for row in prompts if max(row) >= vocab_size]:
        raise ModelError(
            f"{len(missing)} of {len(prompts)} prompts hold a special token that the model has no embedding for, first "
            f"id {max(missing[0])}: remove its text from the rows or the template."
        )


def load_tokenizer(name: str, role: str, revision: str | None = None) -> Any:
    """The tokenizer saved with a model; an adapter without one has its base's. Raises ModelError if there is none,
    or if its files are damaged.
    """
    from transformers import AutoTokenizer

    folder, adapter = check_place(name, role), adapter_of(name, role, revision)
    if adapter is not None and (folder is None or not has_tokenizer(folder)):
        return load_tokenizer(adapter.base, adapter.base_role, adapter.base_revision)
    if folder is not None:
        check_tokenizer(folder, role, name)
    with explained(role, name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ModelError(f"{role} '{name}': its tokenizer has special tokens only, no vocabulary. {AGAIN}")
    return tokenizer


def end_of_prompts(asked: bool | None, rules: AnswerRules, tokenizer: Any = None) -> bool:
    """Whether a teacher's prompts end with end-of-sequence; None takes what suits the model. Raises ConfigError where
    answers continue their prompts, or a chat template ends them.
    """
    if chat_of(tokenizer) is not None:
        if asked:
            raise ConfigError("append_eos = True: the chat template says how prompts end. Leave it out.")
        return False
    if asked and not rules.end_of_prompts:
        raise ConfigError(
            "append_eos = True: the answers of a decoder-only teacher continue their prompts, and would come after the "
            "end of a text. Leave it out (teacher_append_eos: null; no --input-eos)."
        )
    return rules.end_of_prompts if asked is None else asked


def encode_prompts(tokenizer: Any, texts: list[str], max_tokens: int, *, append_eos: bool = True) -> list[list[int]]:
    """Token ids of each text as a prompt, cut to `max_tokens`: in the chat template of a tokenizer that is set to it
    (`chat.with_chat`), else as `encode_texts`.
    """
    chat = chat_of(tokenizer)
    if chat is not None and texts:
        return chat.prompts(texts, max_tokens)
    return encode_texts(tokenizer, texts, max_tokens, append_eos=append_eos)


def encode_texts(tokenizer: Any, texts: list[str], max_tokens: int, *, append_eos: bool = True) -> list[list[int]]:
    """Token ids of each text as the tokenizer frames it, cut to `max_tokens` (end-of-sequence kept).

    append_eos False: without end-of-sequence; what begins a text (Llama's `<s>`) stays. T0 was trained so on inputs,
    and decoder-only models continue their prompts.
    """
    # A translation model's tokenizer writes the language and the end together, on either side.
    special = append_eos or not has_languages(tokenizer)
    end = int(special and not append_eos and _ids(tokenizer, [""], 1)[0][-1:] == [tokenizer.eos_token_id])
    rows = [row[: len(row) - end] for row in _ids(tokenizer, texts, max_tokens + end, special=special)]
    # A model cannot attend to nothing: an empty prompt becomes its end-of-sequence token.
    return [row or [tokenizer.eos_token_id] for row in rows]


def encode_bare(tokenizer: Any, texts: list[str], max_tokens: int = NO_LIMIT) -> list[list[int]]:
    """Token ids of each text alone, without anything that begins or ends it, cut to `max_tokens`."""
    return _ids(tokenizer, texts, max_tokens, special=False)


def _ids(tokenizer: Any, texts: list[str], max_tokens: int, *, special: bool = True) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=special,
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def encode_answers(tokenizer: Any, texts: list[str], max_tokens: int, rules: AnswerRules) -> list[list[int]]:
    """Token ids of each text as a model with these rules writes it, cut to `max_tokens` (end-of-sequence kept).

    An answer that continues its prompt follows it after a space, unless it begins with white space of its own; in a
    chat, as the template has it.
    """
    if not rules.end_of_prompts:
        return _continuations(tokenizer, texts, max_tokens, rules)
    rows = tokenizer(
        # Marian has a vocabulary for each side; translation models mark the language.
        text_target=texts,
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    end = tokenizer.eos_token_id
    if has_languages(tokenizer):  # the first mBART writes the language after the end, for the decoder to start with
        rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
    return [rules.complete(_framed(row, end, max_tokens, rules), max_tokens) for row in rows]


def _framed(row: list[int], end: int, max_tokens: int, rules: AnswerRules) -> list[int]:
    """Without the start token, which is not part of an answer, and with an end, as Gemma's tokenizer does not write."""
    ends = rules.eos_ids or (end,)
    if rules.eos_ids and rules.start_id not in ends and row[:1] == [rules.start_id]:
        row = row[1:]
    return row if row[-1:] and row[-1] in (end, *ends) else [*row[: max_tokens - 1], end]


def _continuations(tokenizer: Any, texts: list[str], max_tokens: int, rules: AnswerRules) -> list[list[int]]:
    """Token ids of texts that follow a prompt, with end-of-sequence."""
    chat = chat_of(tokenizer)
    rows = _after_word(tokenizer, texts) if chat is None else chat.answers(texts)
    ends = (tokenizer.eos_token_id if chat is None else chat.end, *rules.eos_ids)
    end = next(token for token in ends if token in rules.eos_ids)
    return [[*row[: max_tokens - 1], end] for row in rows]


def _after_word(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that follow a word: the pieces with which a word begins in mid-text."""
    word = "a"
    before = len(encode_bare(tokenizer, [word])[0])
    joined = [word + (text if not text or text[0].isspace() else f" {text}") for text in texts]
    return [row[before:] for row in encode_bare(tokenizer, joined)]


class UnknownText:
    """Finds the pieces of a text that a tokenizer replaces by its unknown token.

    Words that it knows are remembered: tokenizers split texts at white space, so that they need not be looked at again.
    """

    MOST_WORDS = 1_000_000

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: set[str] = set()

    def __call__(self, text: str) -> tuple[str, ...]:
        """The pieces, each once, in the order of the text."""
        if self.tokenizer.unk_token_id is None:
            return ()
        new = [word for word in dict.fromkeys(text.split()) if word not in self._known]
        if not new:
            return ()
        pieces = self._pieces(" ".join(new))
        if len(self._known) > self.MOST_WORDS:
            self._known.clear()
        self._known.update(word for word in new if not any(piece in word for piece in pieces))
        return pieces

    def _pieces(self, text: str) -> tuple[str, ...]:
        tokenizer, unknown = self.tokenizer, self.tokenizer.unk_token_id
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        if not tokenizer.is_fast:
            ids = tokenizer(text, **options)["input_ids"]
            alone = dict.fromkeys(text.replace(" ", "")) if unknown in ids else {}
            return tuple(one for one in alone if unknown in tokenizer(one, **options)["input_ids"])
        found = tokenizer(text, return_offsets_mapping=True, **options)
        places = [place for place, token in zip(found["offset_mapping"], found["input_ids"], strict=True)
                  if token == unknown]  # fmt: skip
        return tuple(dict.fromkeys(piece for start, end in places if (piece := text[start:end].strip())))


def unknown_to(*tokenizers: Any) -> Callable[[str], tuple[str, ...]]:
    """As `UnknownText`: the pieces that one of the tokenizers does not know."""
    different: list[Any] = []
    for tokenizer in tokenizers:
        if not any(same_vocabulary(tokenizer, other) for other in different):
            different.append(tokenizer)
    finders = [UnknownText(tokenizer) for tokenizer in different]
    return lambda text: tuple(dict.fromkeys(piece for finder in finders for piece in finder(text)))


def decode_texts(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    """The text of each row of token ids, special tokens left out, spaces as they are."""
    if has_languages(tokenizer):  # not all of their tokenizers count the languages as special tokens
        marks = language_ids(tokenizer)
        rows = [[token for token in row if token not in marks] for row in rows]
    if not tokenizer.is_fast:
        return [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]
    # What tokenizer.decode calls for each row, at a fifth of the time.
    return tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True)


def token_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """One piece of text per token; joined they are the answer, special tokens shown.

    A character that is spread over several byte tokens comes with the last of them; the others are empty.
    """
    if not tokenizer.is_fast:
        return _slow_pieces(tokenizer, ids)
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def _slow_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """As `token_pieces`, for a tokenizer written in Python: what each token adds to the text of those before it."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = text.startswith(shown) and not text.endswith("\ufffd")  # no half of a character
        pieces.append(text[len(shown) :] if whole or end == len(ids) else "")
        shown += pieces[-1]
    return pieces
