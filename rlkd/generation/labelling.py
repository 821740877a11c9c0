"""One block of rows in, one shard of labels out: every row, template and sample gets exactly one label row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError, DivergenceError
from ..models.teacher import Teacher
from ..models.vocabulary import encode_texts
from ..records import PromptedRow, PseudoLabel
from .decode import row_seed
from .engines import Answer, Decoding, Engine

OnLong = Literal["truncate", "error", "skip"]
NO_LIMIT = 2**30


class StoppedError(Exception):
    """A signal came between two batches; `labels` are the finished ones by position in the shard."""

    def __init__(self, labels: dict[int, PseudoLabel]):
        super().__init__("stopped")
        self.labels = labels


@dataclass(slots=True)
class _Slot:
    """A prompt to answer: the place of its first label in the shard, and what its label rows have in common."""

    position: int
    row: PromptedRow
    template: tuple[str, str]
    text: str
    ids: list[int]
    truncated: bool = False


@dataclass
class Labeller:
    """templates, (name, id) of each prompt of a row; made, (model, revision, generation) of its label rows; advance is
    told (labels, tokens) of each batch; stopping is asked after each batch.
    """

    teacher: Teacher
    engine: Engine
    decoding: Decoding
    templates: list[tuple[str, str]]
    made: tuple[str, str | None, str]
    seed: int = 0
    batch_size: int = 16
    on_long: OnLong = "truncate"
    advance: Callable[[int, int], None] = lambda labels, tokens: None
    stopping: Callable[[], bool] = lambda: False

    def shard(self, rows: list[PromptedRow], done: dict[int, PseudoLabel]) -> list[PseudoLabel]:
        """The labels of all rows in order; `done` are known already, by position.

        Raises: StoppedError when asked to stop, DivergenceError if log-probabilities are not finite, DataError for a
        prompt beyond max_input_tokens with on_long = error.
        """
        labels = dict(done)
        slots = self._slots(rows, labels)
        # Longest first. What an earlier run did of this order is its beginning, so that batches stay the same.
        slots.sort(key=lambda slot: len(slot.ids), reverse=True)
        size = max(self.batch_size // self.decoding.labels_per_input, 1)
        self.advance(len(labels), 0)
        for start in range(0, len(slots), size):
            if self.stopping():
                raise StoppedError(labels)
            self._answer(slots[start : start + size], labels)
        return [labels[position] for position in range(len(labels))]

    def _slots(self, rows: list[PromptedRow], labels: dict[int, PseudoLabel]) -> list[_Slot]:
        """The prompts that need an answer; rows without one get their labels here."""
        n, slots, position = self.decoding.labels_per_input, [], 0
        for row in rows:
            for template, prompt in zip(self.templates, row.prompts, strict=True):
                if position not in labels:
                    if prompt.text is None:
                        self._blank(position, row, template, None, prompt.status, prompt.error, labels)
                    else:
                        slots.append(_Slot(position, row, template, prompt.text, []))
                position += n
        limit, tokenizer, eos = self.teacher.max_input_tokens, self.teacher.tokenizer, self.teacher.append_eos
        if slots:
            for slot, ids in zip(
                slots, encode_texts(tokenizer, [s.text for s in slots], NO_LIMIT, append_eos=eos), strict=True
            ):
                slot.ids, slot.truncated = ids, len(ids) > limit
        if long := [slot for slot in slots if slot.truncated]:
            slots = self._shorten(slots, long, labels)
        return slots

    def _shorten(self, slots: list[_Slot], long: list[_Slot], labels: dict[int, PseudoLabel]) -> list[_Slot]:
        """Apply on_long to the prompts beyond max_input_tokens."""
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
        cut = encode_texts(
            self.teacher.tokenizer, [slot.text for slot in long], limit, append_eos=self.teacher.append_eos
        )
        for slot, ids in zip(long, cut, strict=True):
            slot.ids = ids
        return slots

    def _answer(self, slots: list[_Slot], labels: dict[int, PseudoLabel]) -> None:
        n = self.decoding.labels_per_input
        seeds = [
            [row_seed(self.seed, slot.row.id, slot.template[0], sample) for sample in range(n)]
            if self.decoding.strategy == "sample"
            else [0] * n
            for slot in slots
        ]
        answers = self.engine.answer([slot.ids for slot in slots], seeds, self.decoding)
        self._check_finite(slots, answers)
        flat = [answer.ids for made in answers for answer in made]
        texts = iter(
            self.teacher.tokenizer.batch_decode(flat, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        for slot, made in zip(slots, answers, strict=True):
            for sample, answer in enumerate(made):
                labels[slot.position + sample] = self._label(slot, sample, answer, next(texts))
        self.advance(len(flat), sum(map(len, flat)))

    def _label(self, slot: _Slot, sample: int, answer: Answer, text: str) -> PseudoLabel:
        row = slot.row
        model, revision, generation = self.made
        return PseudoLabel(
            id=row.id,
            row=row.number,
            template=slot.template[0],
            template_id=slot.template[1],
            status="ok",
            error=None,
            teacher_input=slot.text,
            student_input=row.student_input,
            references=list(row.references),
            label=text,
            token_ids=answer.ids,
            sample=sample,
            n_in=len(slot.ids),
            n_out=len(answer.ids),
            truncated=slot.truncated,
            finish_reason="eos" if answer.finished else "length",
            sum_logprob=math.fsum(answer.logps),
            choices=None,
            choice_logprobs=None,
            model=model,
            revision=revision,
            generation=generation,
        )

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
        """Label rows that say why there is no label."""
        nothing: dict[str, Any] = dict.fromkeys(
            ("label", "token_ids", "n_in", "n_out", "truncated", "finish_reason", "sum_logprob", "choices")
        )
        for sample in range(self.decoding.labels_per_input):
            labels[position + sample] = PseudoLabel(
                id=row.id,
                row=row.number,
                template=template[0],
                template_id=template[1],
                status=status,
                error=error or "unknown",
                teacher_input=text,
                student_input=row.student_input,
                references=list(row.references),
                sample=sample,
                choice_logprobs=None,
                model=self.made[0],
                revision=self.made[1],
                generation=self.made[2],
                **nothing,
            )

    def _check_finite(self, slots: list[_Slot], answers: list[list[Answer]]) -> None:
        bad = [
            slot.row.id
            for slot, made in zip(slots, answers, strict=True)
            if not all(math.isfinite(sum(answer.logps)) for answer in made)
        ]
        if bad:
            raise DivergenceError(
                f"the teacher's log-probabilities are not finite for {len(bad)} of {len(slots)} inputs: "
                f"{', '.join(bad[:5])}. Its weights are {self.engine.identity().get('dtype', 'of unknown precision')}: "
                "use bfloat16 or float32 for T5 models. No label was written for them."
            )
