"""A teacher whose vocabulary is not the student's: its reward is carried over by character spans.

The regret of a text is defined in the teacher's own tokens. So the student's answer is decoded, the teacher scores the
text in its own tokens, and each token of the student gets the share of the teacher's tokens that it overlaps:

    r_i = sum_j w_ij r'_j,    w_ij = |span i with span j| / |span j|,    sum_i w_ij = 1

Sums over an answer are the teacher's. The shares of one teacher token are known only when its last character is: within
it, credit is approximate, which a horizon of several tokens (`lam` > 0) covers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from ..records import TeacherSignal
from ..tensors import pad_rows
from .generation import AnswerRules
from .signals import LocalSource, Write
from .teacher import Teacher
from .vocabulary import NO_LIMIT, decode_texts, encode_answers, token_pieces

logger = logging.getLogger(__name__)

Span = tuple[float, float]
SHARED_VOCABULARY = frozenset({"distribution", "state_value"})


@dataclass(frozen=True)
class Spelled:
    """An answer as text; spans [start, end) of its tokens in characters, without that of end-of-sequence; whether it
    has ended.
    """

    text: str
    spans: list[Span]
    ended: bool


class Speller:
    """How a tokenizer, under the `AnswerRules` of its model, writes answers."""

    def __init__(self, tokenizer: Any, rules: AnswerRules):
        self.tokenizer, self.rules = tokenizer, rules
        self.prefix: list[int] = []
        self.prefix = self.ids([""], [False])[0]  # what begins every answer: BART's `<s>`, a language

    def ids(self, texts: list[str], ended: list[bool]) -> list[list[int]]:
        """Token ids of each text, with end-of-sequence where it has ended."""
        rows = encode_answers(self.tokenizer, texts, NO_LIMIT, self.rules)
        found = []
        for row, end in zip(rows, ended, strict=True):
            while row and row[-1] in self.rules.eos_ids:
                row = row[:-1]
            found.append([*row, self.rules.eos_ids[0]] if end else row)
        return found

    def read(self, ids: list[int]) -> Spelled:
        """The text of token ids, special tokens shown: one that is no part of the format is as wrong as any text.

        The tokens that share a character, or a few, have equal parts of it. Those after the last whole character, in
        an answer that was cut, have none.
        """
        ended = bool(ids) and ids[-1] in self.rules.eos_ids
        body = ids[:-1] if ended else ids
        begun = 0
        while begun < len(self.prefix) and body[begun : begun + 1] == [self.prefix[begun]]:
            begun += 1
        pieces = token_pieces(self.tokenizer, body[begun:])
        return Spelled("".join(pieces), [(0.0, 0.0)] * begun + _spans(pieces), ended)

    def spans(self, ids: list[int], text: str) -> list[Span]:
        """The spans in `text` of the ids that it was encoded to, without end-of-sequence."""
        spelled = self.read(ids)
        return spelled.spans if spelled.text == text else _moved(spelled.spans, spelled.text, text)


def _spans(pieces: list[str]) -> list[Span]:
    """Spans in the joined pieces; the tokens before a piece that have none of their own share it."""
    spans: list[Span] = []
    start, waiting = 0.0, 0
    for piece in pieces:
        waiting += 1
        if piece:
            width = len(piece) / waiting
            spans += [(start + k * width, start + (k + 1) * width) for k in range(waiting)]
            start, waiting = start + len(piece), 0
    return spans + [(start, start)] * waiting


def _moved(spans: list[Span], spelled: str, text: str) -> list[Span]:
    """Spans in `spelled` as spans in `text`, which the tokenizer changed: other spaces, unknown or normalised
    characters. What replaces a piece of text shares its place evenly.
    """
    same = "".join(spelled.split()) == "".join(text.split())
    places = [*(_spaced if same else _matched)(spelled, text), (float(len(text)), float(len(text)))]

    def place(x: float, end: int) -> float:
        """Where character position x is, as the end (1) of the character before it or the start (0) of the next."""
        whole = int(x)
        if end and whole == x:
            return places[max(whole - 1, 0)][1]
        start, stop = places[whole]
        return start + (x - whole) * (stop - start)

    return [(place(start, 0), place(stop, 1 if stop > start else 0)) for start, stop in spans]


def _spaced(spelled: str, text: str) -> list[Span]:
    """The place in `text` of each character of `spelled`, which differs in white space only."""
    words = iter([k for k, character in enumerate(text) if not character.isspace()])
    places: list[Span] = []
    end, start = 0, next(words, len(text))
    for character in spelled:
        if character.isspace():
            places.append((float(end), float(start)))
        else:
            places.append((float(start), start + 1.0))
            end, start = start + 1, next(words, len(text))
    return places


def _matched(spelled: str, text: str) -> list[Span]:
    """The place in `text` of each character of `spelled`, by the longest pieces that they share."""
    places: list[Span] = []
    for _, i1, i2, j1, j2 in SequenceMatcher(None, spelled, text, autojunk=False).get_opcodes():
        scale = (j2 - j1) / max(i2 - i1, 1)
        places += [(j1 + scale * k, j1 + scale * (k + 1)) for k in range(i2 - i1)]
    return places


def shares(ours: list[Span], theirs: list[Span]) -> Tensor:
    """w [n, m] float64 of n >= 1 tokens and m teacher tokens: |i with j| / |j|; columns sum to 1.

    A teacher token without characters, or with characters that none of ours has, belongs to the one at its place.
    """
    mine, other = (torch.tensor(spans, dtype=torch.float64).reshape(-1, 2) for spans in (ours, theirs))
    overlap = torch.minimum(mine[:, None, 1], other[None, :, 1]) - torch.maximum(mine[:, None, 0], other[None, :, 0])
    overlap = overlap.clamp(min=0)
    total = overlap.sum(0)
    # At its place: the first of ours that ends beyond it, or is as empty as it is.
    here = (mine[:, None, 1] > other[None, :, 0]) | (mine[:, None, :] == other[None, :, :1]).all(-1)
    first = torch.where(here.any(0), here.double().argmax(0), len(ours) - 1)
    alone = torch.nn.functional.one_hot(first, len(ours)).T.double()
    return torch.where(total > 1e-9, overlap / total.clamp(min=1e-9), alone)


class ByText:
    """A `SignalSource` in a student's tokens, around one with another vocabulary, which is asked by text.

    Args: teacher, with a `tokenizer` and `rules` of its own; tokenizer, the student's; rules, what its model's answers
    begin and end with.
    What needs a shared vocabulary is not in `gives`: distributions, hence the exact one-step term and divergences, and
    V of the state before a token, hence `baseline: none`. End-of-sequence is end-of-sequence: an answer that was cut
    is scored without one.
    """

    lacks = ", which has another vocabulary than the student,"

    def __init__(self, teacher: Any, tokenizer: Any, rules: AnswerRules):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.gives, self.max_input_tokens = teacher.gives - SHARED_VOCABULARY, teacher.max_input_tokens
        self.ours, self.theirs = Speller(tokenizer, rules), Speller(teacher.tokenizer, teacher.rules)
        self.cut = 0  # answers longer than the teacher's positions

    @property
    def rules(self) -> AnswerRules:
        return self.ours.rules

    @property
    def model(self) -> Any:
        return self.teacher.model

    def identity(self) -> dict[str, str]:
        """As in `LocalSource`."""
        return {**self.teacher.identity(), "teacher's vocabulary": "another: answers are scored as text"}

    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `SignalSource`, in the gauge in which logsumexp is 0; there are no distributions.

        Args as in `Teacher.score`, answers [B, R] in the student's tokens.
        """
        texts = self._translated(answer_ids, answer_mask)
        signal = self.teacher.score(teacher_inputs, *texts.answers, ids=ids)
        return texts.shared(signal, answer_mask)

    def written(self, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Answers of the teacher, in the student's tokens, of at most `max_new_tokens`."""
        ended = [self.theirs.read(row).ended for row in rows]
        return [ids[:max_new_tokens] for ids in self.ours.ids(decode_texts(self.teacher.tokenizer, rows), ended)]

    def _translated(self, answer_ids: Tensor, answer_mask: Tensor) -> _Translated:
        spelled = [self.ours.read(row[m].tolist()) for row, m in zip(answer_ids, answer_mask, strict=True)]
        rows = self.theirs.ids([one.text for one in spelled], [one.ended for one in spelled])
        weights = [self._weights(one, row) for one, row in zip(spelled, rows, strict=True)]
        # A teacher scores one token at least; without weights, this one counts for nothing.
        # 0: prompts alone may fill the window, and the model itself says when one does.
        longest = getattr(self.teacher, "longest_answer", None) or None
        kept = [row[:longest] or [self.theirs.rules.eos_ids[0]] for row in rows]
        if long := sum(len(row) > len(some) for row, some in zip(rows, kept, strict=True)):
            if not self.cut:
                logger.warning(
                    f"{long} of {len(rows)} answers have more tokens in the teacher's vocabulary than its {longest} "
                    "positions: what is beyond is not scored. Lower max_new_tokens."
                )
            self.cut += long
        return _Translated(pad_rows(kept, self.theirs.rules.pad_id, answer_ids.device), weights)

    def _weights(self, one: Spelled, row: list[int]) -> Tensor:
        """w [n, m] of an answer's n tokens, or of none but its end, and the teacher's m."""
        if not one.spans:
            return torch.ones(1, len(row), dtype=torch.float64)
        weights = shares(one.spans, self.theirs.spans(row, one.text))
        return torch.block_diag(weights, torch.ones(1, 1, dtype=torch.float64)) if one.ended else weights


class OtherTokenizer(ByText, LocalSource):
    """A local teacher as a student of another vocabulary sees it."""

    teacher: Teacher

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        return self.teacher.teachers

    def score_ends(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        ids: list[str] | None = None,
    ) -> tuple[TeacherSignal, Tensor]:
        """As in `LocalSource`; the states are the teacher's."""
        texts = self._translated(answer_ids, answer_mask)
        signal, ends = self.teacher.score_ends(teacher_inputs, *texts.answers, ids=ids)
        return texts.shared(signal, answer_mask), ends

    def answer(self, teacher_inputs: list[tuple[str, ...]], write: Write, max_new_tokens: int) -> list[list[int]]:
        """As in `LocalSource`: the teacher's texts in the student's tokens."""
        return self.written(self.teacher.answer(teacher_inputs, write, max_new_tokens), max_new_tokens)


class ServedOtherTokenizer(ByText):
    """A teacher without a model here, which answers by itself (`AnsweringSource`), seen likewise."""

    @property
    def name(self) -> str:
        """As in `ServerTeacher`."""
        return self.teacher.name

    def greedy(self, texts: list[str], max_new_tokens: int) -> list[list[int]]:
        """As in `AnsweringSource`: the teacher's texts in the student's tokens."""
        return self.written(self.teacher.greedy(texts, max_new_tokens), max_new_tokens)


@dataclass(frozen=True)
class _Translated:
    """Answers in the teacher's tokens, (ids, mask) [B, R'], and w of each row."""

    answers: tuple[Tensor, Tensor]
    weights: list[Tensor]

    def shared(self, signal: TeacherSignal, mask: Tensor) -> TeacherSignal:
        """The signal [B, R'] by tokens of the student, [B, R] of `mask`."""
        signal = replace(signal, distribution=None)
        names = [f.name for f in fields(signal) if getattr(signal, f.name) is not None]
        columns = torch.stack([getattr(signal, name) for name in names]).double()
        if "logsumexp" in names:  # logits of different states have no common zero
            gauge = columns[names.index("logsumexp")].clone()
            for k, name in enumerate(names):
                columns[k] -= 0 if name == "entropy" else gauge
        out = columns.new_zeros(len(names), *mask.shape)
        for i, weights in enumerate(self.weights):
            known = columns[:, i, : weights.shape[1]]
            shared = known @ weights[:, : known.shape[1]].T.to(known.device)
            out[:, i, mask[i]] = shared[:, : int(mask[i].sum())]
        values = dict(zip(names, out.to(signal.chosen.dtype), strict=True))
        return TeacherSignal(**values)
