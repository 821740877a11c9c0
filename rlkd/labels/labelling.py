"""One block of rows in, one shard of labels out: every row, template and sample gets exactly one label row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checks import check_settings
from ..errors import DataError, DivergenceError, ServerError
from ..models.generation import NO_RULES, AnswerRules
from ..models.vocabulary import NO_LIMIT, decode_texts, encode_answers, encode_prompts
from ..records import PromptedRow, PseudoLabel
from ..sampling.decode import row_seed
from ..sampling.engines.protocol import Answer, Decoding, Engine
from ..sampling.ranking import choice_problem, rank
from ..sampling.schedule import Budget, in_batches
from .options import OnLong


class PromptReader(Protocol):
    """How prompts become token ids: a `Teacher`, or the `TeacherSpec` of one that is not loaded."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_input_tokens(self) -> int: ...
    @property
    def append_eos(self) -> bool: ...


class StoppedError(Exception):
    """A signal arrived between two batches, or a server failed (the cause); `labels` are the finished ones by position
    in the shard.
    """

    def __init__(self, labels: dict[int, PseudoLabel]):
        super().__init__("stopped")
        self.labels = labels


@dataclass(slots=True)
class Slot:
    """A prompt to answer: the position of its first label in the shard, and what its label rows have in common."""

    position: int
    row: PromptedRow
    template: tuple[str, str]
    text: str
    choices: tuple[str, ...] | None
    ids: list[int]
    truncated: bool = False


@dataclass
class Labeller:
    """Makes the labels of one shard.

    decoding   None to rank the templates' answer choices
    templates  (name, id) of each prompt of a row
    made       (model, revision, generation) of the label rows
    advance    called after each batch with the numbers of labels and tokens made
    stopping   called before each batch; True stops the run
    """

    teacher: PromptReader
    engine: Engine
    decoding: Decoding | None
    templates: list[tuple[str, str]]
    made: tuple[str, str | None, str]
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    on_long: OnLong = "truncate"
    advance: Callable[[int, int], None] = lambda labels, tokens: None
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        check_settings(self)

    def shard(self, rows: list[PromptedRow], done: dict[int, PseudoLabel]) -> list[PseudoLabel]:
        """The labels of all rows in order; those in `done`, by position, are already known.

        Raises: StoppedError if `stopping` returns True, DivergenceError if log-probabilities are not finite, DataError
        for a prompt longer than max_input_tokens with on_long = error.
        """
        labels = dict(done)
        slots = self._slots(rows, labels)
        self.advance(len(labels), 0)

        def run(chosen: list[int]) -> None:
            if self.stopping():
                raise StoppedError(labels)
            try:
                (self._answer if self.decoding else self._rank)([slots[i] for i in chosen], labels)
            except ServerError as error:
                raise StoppedError(labels) from error

        # Longest first. An interrupted run finished a prefix of that order, so the remaining batches stay the same.
        more = [self._extra_tokens(slot) for slot in slots]
        in_batches(run, [len(slot.ids) for slot in slots], more, self.budget)
        return [labels[position] for position in range(len(labels))]

    @property
    def rules(self) -> AnswerRules:
        """What the teacher's checkpoint says of answers; an engine with a teacher of another kind has no rules."""
        return getattr(self.teacher, "rules", NO_RULES)

    @property
    def labels_per_prompt(self) -> int:
        return self.decoding.labels_per_input if self.decoding else 1

    def _extra_tokens(self, slot: Slot) -> int:
        """Tokens that a prompt's answers add to its own."""
        if self.decoding:
            return self.decoding.labels_per_input * self.decoding.max_new_tokens
        return len(slot.choices or ()) * len(slot.ids)

    def _slots(self, rows: list[PromptedRow], labels: dict[int, PseudoLabel]) -> list[Slot]:
        """The prompts that need an answer; rows without one get their labels here."""
        slots: list[Slot] = []
        position = 0
        for row in rows:
            for template, prompt in zip(self.templates, row.prompts, strict=True):
                if position not in labels:
                    if prompt.text is None:
                        self._blank(position, row, template, None, prompt.status, prompt.error, labels)
                    else:
                        slots.append(Slot(position, row, template, prompt.text, prompt.choices, []))
                position += self.labels_per_prompt
        slots = self._encoded(slots, labels)
        if self.decoding is None:
            slots = self._rankable(slots, labels)
        if long := [slot for slot in slots if slot.truncated]:
            slots = self._shorten(slots, long, labels)
        return slots

    def _encoded(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> list[Slot]:
        """The prompts with their ids; those that the tokenizer fails on get their labels here."""

        def encode(some: list[Slot]) -> None:
            texts = [slot.text for slot in some]
            found = encode_prompts(self.teacher.tokenizer, texts, NO_LIMIT, append_eos=self.teacher.append_eos)
            for slot, ids in zip(some, found, strict=True):
                slot.ids, slot.truncated = ids, len(ids) > self.teacher.max_input_tokens

        if not slots:
            return slots
        # Tokenizers raise errors of many kinds for a text, which is then found by trying them one by one.
        try:
            encode(slots)
            return slots
        except Exception as error:
            usable, first = [], error
        for slot in slots:
            try:
                encode([slot])
                usable.append(slot)
            except Exception as error:
                reason = f"the tokenizer fails on the prompt: {type(error).__name__}: {error}"
                self._blank(slot.position, slot.row, slot.template, None, "failed", reason, labels)
        if not usable:
            raise first
        return usable

    def _rankable(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> list[Slot]:
        """The prompts whose answer choices have different tokens, and not too many; the others fail."""
        longest = getattr(self.teacher, "longest_answer", None)
        found = {
            choices: choice_problem(self.teacher.tokenizer, choices, longest, self.rules)
            for choices in {s.choices or () for s in slots}
        }
        for slot in slots:
            if problem := found[slot.choices or ()]:
                self._blank(slot.position, slot.row, slot.template, slot.text, "failed", problem, labels)
        return [slot for slot in slots if not found[slot.choices or ()]]

    def _shorten(self, slots: list[Slot], long: list[Slot], labels: dict[int, PseudoLabel]) -> list[Slot]:
        """Apply on_long to the prompts that are longer than max_input_tokens."""
        limit = self.teacher.max_input_tokens
        if self.on_long == "error":
            first = long[0]
            raise DataError(
                f"row {first.row.number} (id '{first.row.id}'), template '{first.template[0]}' has {len(first.ids)} "
                f"tokens, max_input_tokens is {limit}. Raise it, or use on_long truncate or skip."
            )
        if self.on_long == "skip":
            for slot in long:
                reason = f"prompt longer than {limit} tokens"
                self._blank(slot.position, slot.row, slot.template, slot.text, "skipped", reason, labels)
            return [slot for slot in slots if not slot.truncated]
        cut = encode_prompts(
            self.teacher.tokenizer, [slot.text for slot in long], limit, append_eos=self.teacher.append_eos
        )
        for slot, ids in zip(long, cut, strict=True):
            slot.ids = ids
        return slots

    def _answer(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> None:
        assert self.decoding is not None
        n = self.decoding.labels_per_input
        seeds = [
            [row_seed(self.seed, slot.row.id, slot.template[0], sample) for sample in range(n)]
            if self.decoding.strategy == "sample"
            else [0] * n
            for slot in slots
        ]
        answers = self.engine.answer([slot.ids for slot in slots], seeds, self.decoding)
        self._check_finite(slots, [[value for answer in made for value in answer.logps] for made in answers])
        flat = [answer.ids for made in answers for answer in made]
        texts = iter(decode_texts(self.teacher.tokenizer, flat))
        for slot, made in zip(slots, answers, strict=True):
            for sample, answer in enumerate(made):
                text = next(texts)
                if self._only_padding(answer.ids):
                    reason = "the answer is only padding tokens"
                    values = {"teacher_input": slot.text}
                    label = self._row(slot.row, slot.template, sample, "failed", reason, values)
                else:
                    label = self._label(slot, sample, answer, text)
                labels[slot.position + sample] = label
        self.advance(len(flat), sum(map(len, flat)))

    def _only_padding(self, ids: list[int]) -> bool:
        tokenizer, rules = self.teacher.tokenizer, self.rules
        framing = {*rules.eos_ids, rules.first, tokenizer.eos_token_id}
        return {token for token in ids if token not in framing} == {tokenizer.pad_token_id}

    def _rank(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> None:
        """Label with the most probable choice; the first of equal ones."""
        texts = list(dict.fromkeys(choice for slot in slots for choice in slot.choices or ()))
        rows = encode_answers(self.teacher.tokenizer, texts, NO_LIMIT, self.rules)
        ids = dict(zip(texts, rows, strict=True))
        choices = [[ids[choice] for choice in slot.choices or ()] for slot in slots]
        scores = rank(self.engine, [slot.ids for slot in slots], choices, self.budget)
        self._check_finite(slots, scores)
        for slot, sums in zip(slots, scores, strict=True):
            best = max(range(len(sums)), key=sums.__getitem__)
            text = (slot.choices or ())[best]
            answer = Answer(ids[text], [sums[best]], True)
            ranked = {"finish_reason": "ranked", "choices": list(slot.choices or ()), "choice_logprobs": sums}
            labels[slot.position] = self._label(slot, 0, answer, text, **ranked)
        self.advance(len(slots), sum(len(choice) for row in choices for choice in row))

    def _label(self, slot: Slot, sample: int, answer: Answer, text: str, **ranked: Any) -> PseudoLabel:
        values: dict[str, Any] = {
            "teacher_input": slot.text,
            "label": text,
            "token_ids": answer.ids,
            "n_in": len(slot.ids),
            "n_out": len(answer.ids),
            "truncated": slot.truncated,
            "finish_reason": "eos" if answer.finished else "length",
            "sum_logprob": math.fsum(answer.logps),
            "top_ids": None if answer.top_k is None else answer.top_k.ids.tolist(),
            "top_logps": None if answer.top_k is None else answer.top_k.logps.tolist(),
        }
        return self._row(slot.row, slot.template, sample, "ok", None, values | ranked)

    def _blank(
        self,
        position: int,
        row: PromptedRow,
        template: tuple[str, str],
        text: str | None,
        status: str,
        error: str | None,
        labels: dict[int, PseudoLabel],
    ) -> None:
        """Label rows with the reason for the missing label."""
        for sample in range(self.labels_per_prompt):
            labels[position + sample] = self._row(
                row, template, sample, status, error or "unknown", {"teacher_input": text}
            )

    def _row(
        self,
        row: PromptedRow,
        template: tuple[str, str],
        sample: int,
        status: str,
        error: str | None,
        values: dict[str, Any],
    ) -> PseudoLabel:
        return PseudoLabel(
            id=row.id,
            row=row.number,
            template=template[0],
            template_id=template[1],
            status=status,
            error=error,
            student_input=row.student_input,
            references=list(row.references),
            sample=sample,
            model=self.made[0],
            revision=self.made[1],
            generation=self.made[2],
            **values,
        )

    def _check_finite(self, slots: list[Slot], values: list[list[float]]) -> None:
        bad = [slot.row.id for slot, row in zip(slots, values, strict=True) if not all(map(math.isfinite, row))]
        if bad:
            error = DivergenceError(
                f"the teacher's log-probabilities are not finite for {len(bad)} of {len(slots)} inputs: "
                f"{', '.join(bad[:5])}. Its weights are {self.engine.identity().get('dtype', 'of unknown precision')}: "
                "use bfloat16 or float32 for T5 models. No label was written for them."
            )
            error.batch = tuple(
                {"id": slot.row.id, "template": slot.template[0], "finite": slot.row.id not in bad,
                 "teacher_input": slot.text, "token_ids": slot.ids}
                for slot in slots
            )  # fmt: skip
            raise error
