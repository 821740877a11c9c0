"""A classifier as the maker of label rows: the label is the most probable class, the ranked choices are the classes; of
a classifier of words, the label is the tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..data.labelled import EncodedTexts
from ..data.words import UNREAD, EncodedWords, label_logits
from ..models.digests import configuration_digest, weights_digest
from ..records import PromptedRow, PseudoLabel
from ..sampling.engines.protocol import Answer
from .labelling import Labeller, Slot, StoppedError

NO_SECOND_TEXT = "no second text"


@dataclass(frozen=True)
class ClassifierReader:
    """How a classifier reads texts, or pairs of texts; a `PromptReader`."""

    tokenizer: Any
    max_input_tokens: int
    pairs: bool = False
    append_eos: bool = True  # as its tokenizer frames texts


class ClassifierEngine:
    """A sequence classifier with its weights; classes, the names of its logits in their order. It writes no tokens, so
    that of an `Engine` it has the identity alone.
    """

    name = "classifier"
    exact = True

    def __init__(self, model: Any, classes: Sequence[str]):
        self.model, self.classes = model.eval(), list(classes)

    def identity(self) -> dict[str, Any]:
        return {
            "teacher": self.model.name_or_path,
            "teacher_weights": weights_digest(self.model),
            "teacher_configuration": configuration_digest(self.model),
            "dtype": str(self.model.dtype),
        }

    @torch.inference_mode()
    def log_probabilities(self, batch: dict[str, torch.Tensor]) -> list[list[float]]:
        """Natural log-probability of each class, [B, C], of encoded texts."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        logps: list[list[float]] = self.model(**inputs).logits.double().log_softmax(-1).tolist()
        return logps


@dataclass
class ClassLabeller(Labeller):
    """Makes the label rows of one shard from the classes of its texts, or pairs of texts. A shard that a signal
    interrupts is computed again, so that its batches, and the last bits, are those of an uninterrupted run.
    """

    def shard(self, rows: list[PromptedRow], done: dict[int, PseudoLabel]) -> list[PseudoLabel]:
        """As in `Labeller`."""
        labels: dict[int, PseudoLabel] = {}
        slots = [slot for i, row in enumerate(rows) if (slot := self._slot(i, row, labels)) is not None]
        self.advance(len(labels), 0)
        if slots:
            self._classify(slots, labels)
        return [labels[i] for i in range(len(rows))]

    def _slot(self, position: int, row: PromptedRow, labels: dict[int, PseudoLabel]) -> Slot | None:
        """The text to classify; None for a row without one, which gets its label row here."""
        (prompt,), template = row.prompts, self.templates[0]
        status, reason = prompt.status, prompt.error
        if status == "ok" and self.pairs and not (row.second or "").strip():
            status, reason = "skipped", NO_SECOND_TEXT
        if prompt.text is None or status != "ok":
            self._blank(position, row, template, prompt.text, status, reason, labels)
            return None
        between = f" {self.teacher.tokenizer.sep_token or ''} "
        return Slot(position, row, template, prompt.text + (between + str(row.second) if self.pairs else ""), None, [])

    @property
    def pairs(self) -> bool:
        """Whether it classifies pairs of texts."""
        return cast(ClassifierReader, self.teacher).pairs

    def _classify(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> None:
        engine, tokenizer = cast(ClassifierEngine, self.engine), self.teacher.tokenizer
        texts = [{"text": slot.row.prompts[0].text, "text_pair": slot.row.second} for slot in slots]
        columns = [[text[name] for text in texts] for name in (("text", "text_pair") if self.pairs else ("text",))]
        whole = tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        encoded = EncodedTexts(texts, tokenizer, self.teacher.max_input_tokens, len(engine.classes))
        for slot, ids, all_ids in zip(slots, encoded.ids["input_ids"], whole, strict=True):
            slot.ids, slot.truncated = ids, len(all_ids) > len(ids)
        for numbers, batch in encoded.batches(max(self.budget.tokens // max(encoded.lengths), 1)):
            if self.stopping():
                raise StoppedError({})
            some, logps = [slots[k] for k in numbers], engine.log_probabilities(batch)
            self._check_finite(some, logps)
            for slot, values in zip(some, logps, strict=True):
                best = max(range(len(values)), key=values.__getitem__)
                ranked = {"finish_reason": "ranked", "choices": engine.classes, "choice_logprobs": values}
                answer = Answer([], [values[best]], True)
                labels[slot.position] = self._label(slot, 0, answer, engine.classes[best], **ranked)
            self.advance(len(numbers), 0)


class TagLabeller(ClassLabeller):
    """Makes label rows of the tags of a text's words, which are what spaces separate: one tag for each word, with
    spaces between; O for a word that the classifier does not read, and the row is truncated then.
    """

    def _classify(self, slots: list[Slot], labels: dict[int, PseudoLabel]) -> None:
        engine = cast(ClassifierEngine, self.engine)
        words = [str(slot.row.prompts[0].text).split() for slot in slots]
        length = self.teacher.max_input_tokens
        rows = [{"words": own} for own in words]
        encoded = EncodedWords(rows, self.teacher.tokenizer, length, len(engine.classes))
        for slot, ids, unread in zip(slots, encoded.ids["input_ids"], encoded.unread, strict=True):
            slot.ids, slot.truncated = ids, unread > 0
        for numbers, batch in encoded.collated(max(self.budget.tokens // max(encoded.lengths), 1)):
            if self.stopping():
                raise StoppedError({})
            best, tags = self._tags(batch)
            logps = [[x for x, start in zip(*pair, strict=True) if start != UNREAD]
                     for pair in zip(best, batch["words"].tolist(), strict=True)]  # fmt: skip
            self._check_finite([slots[k] for k in numbers], logps)
            for k, values, found in zip(numbers, logps, tags, strict=True):
                text = " ".join(engine.classes[tag] for tag in found[: len(words[k])])
                labels[slots[k].position] = self._label(slots[k], 0, Answer([], values, True), text)
            self.advance(len(numbers), 0)

    @torch.inference_mode()
    def _tags(self, batch: dict[str, torch.Tensor]) -> tuple[list[list[float]], list[list[int]]]:
        """Of every word, the natural log-probability of its tag and the tag, two lists of [B, W]."""
        engine = cast(ClassifierEngine, self.engine)
        inputs = {name: tensor.to(engine.model.device) for name, tensor in batch.items()}
        best = label_logits(engine.model, inputs, engine.classes).double().log_softmax(-1).max(-1)
        return best.values.tolist(), best.indices.tolist()
