"""What a label folder recorded of the teacher's probabilities: as a signal, for training without the teacher, and as
weights of its labels.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any, ClassVar

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..errors import DataError
from ..io.provenance import described
from ..records import TeacherSignal, TopTokens
from ..tensors import pad_stack
from .tokens import check_own

BATCH = 1000
LabelKey = tuple[Any, ...]


class RecordedTeacher:
    """A teacher that is not there: the signal of labels that `rlkd generate-pseudolabels --top-k-logprobs K` wrote.

    It knows the K most probable tokens at every prefix of its labels, and nothing of other answers. In the signal
    `chosen` is NaN where the label's token is not among them. name: of the model that wrote the labels, None if not
    known.
    Args: labels, rows of `load_pseudolabels`; tokenizer, the student's. Raises DataError if nothing was recorded, K
    changes within the labels, or their token ids are those of another vocabulary.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"max", "logsumexp", "top_k"})
    model: ClassVar[None] = None

    def __init__(self, labels: Any, tokenizer: Any):
        check_recorded(labels)
        check_own(labels, tokenizer, "the student")
        self.name = ", ".join(dict.fromkeys(str(made["teacher"]) for made in described(labels))) or None
        self._rows = labels.select_columns(["token_ids", "top_ids", "top_logps"])
        self._of_prompt: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(labels["teacher_input"]):
            self._of_prompt[text].append(i)

    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `SignalSource`. Raises DataError for an answer that is no label, nor the beginning of one."""
        answers = [row[kept].tolist() for row, kept in zip(answer_ids, answer_mask, strict=True)]
        found = [self._find(*pair) for pair in zip(teacher_inputs, answers, strict=True)]
        if unknown := [ids[i] if ids else f"row {i}" for i, row in enumerate(found) if row is None]:
            raise DataError(
                f"{len(unknown)} of {len(answers)} answers are not among the recorded labels, so that nothing is known "
                f"of them: {', '.join(unknown[:5])}. Train on the rows of the label folder as they are."
            )
        lengths = [len(answer) for answer in answers]
        top = TopTokens(*(_stacked(found, name, lengths, answer_ids.device) for name in ("top_ids", "top_logps")))
        given = top.ids == answer_ids[..., None]
        chosen = torch.where(given, top.logps, 0.0).sum(-1).masked_fill(answer_mask & ~given.any(-1), math.nan)
        return TeacherSignal(chosen=chosen, max=top.logps[..., 0], logsumexp=torch.zeros_like(chosen), top_k=top)

    def _find(self, texts: tuple[str, ...], answer: list[int]) -> dict[str, Any] | None:
        """A label to this prompt that begins with the answer: what follows its tokens depends on nothing else."""
        for i in self._of_prompt.get(texts[0], ()) if len(texts) == 1 else ():
            row = self._rows[i]
            if row["token_ids"][: len(answer)] == answer:
                return row
        return None


def _stacked(rows: list[Any], name: str, lengths: list[int], device: torch.device) -> Tensor:
    """Column `name` of label rows, cut to the lengths of the answers: [B, R, K], zeros at padding."""
    kind = np.int64 if name == "top_ids" else np.float32
    parts = [torch.from_numpy(np.array(row[name][:n], kind)) for row, n in zip(rows, lengths, strict=True)]
    return pad_stack(parts, 0).to(device)


def check_recorded(labels: Any) -> None:
    """Raise DataError unless every label has the same number of most probable tokens at each of its positions."""
    names = ("teacher_input", "token_ids", "top_ids", "top_logps")
    if missing := [name for name in names if name not in (getattr(labels, "column_names", None) or ())]:
        raise DataError(
            f"the labels have no column {', '.join(missing)}, so the teacher's probabilities were not recorded. Make "
            "them with `rlkd generate-pseudolabels --top-k-logprobs K`, or set teacher_signal to model."
        )
    without, widths = 0, Counter[int]()
    for batch in labels.select_columns(["top_ids"]).with_format("arrow").iter(BATCH):
        without += batch["top_ids"].null_count
        for width in pc.value_counts(pc.list_value_length(pc.list_flatten(batch["top_ids"]))).to_pylist():
            widths[width["values"]] += width["counts"]
    if without or len(widths) != 1:
        shown = f"{without} of {len(labels)} labels have none" if without else f"K is {sorted(widths)} in one folder"
        raise DataError(
            f"the labels' most probable tokens (top_ids) were not recorded alike: {shown}. Make the labels again in "
            "one run of `rlkd generate-pseudolabels --top-k-logprobs K`."
        )


def label_key(row: Any) -> LabelKey:
    """What tells a label from all others of a data set."""
    return tuple(row[name] for name in ("generation", "row", "template", "sample"))


def probability_weights(labels: Any) -> dict[LabelKey, float]:
    """The weight of each label, n q(y|x) / (m sum of q over the distinct labels of its prompt), q the teacher's
    probability: sequence-level distillation with the n best answers (Kim & Rush 2016, arXiv 1606.07947, sec. 3.2).

    n labels of one prompt sum to n; one that occurs m times counts once. Raises DataError if their probability was not
    recorded, or every prompt has one label, so that all weights are 1.
    """
    names = ("generation", "row", "template", "sample", "token_ids", "sum_logprob")
    if missing := [name for name in names if name not in (getattr(labels, "column_names", None) or ())]:
        raise DataError(
            f"label_weights = 'probability': the labels have no column {', '.join(missing)}. Take labels of "
            "`rlkd generate-pseudolabels`, or set it to equal."
        )
    prompts: dict[LabelKey, list[tuple[LabelKey, tuple[int, ...], float]]] = defaultdict(list)
    for row in labels.select_columns(list(names)):
        key = label_key(row)
        prompts[key[:3]].append((key, tuple(row["token_ids"]), row["sum_logprob"]))
    weights = {key: weight for group in prompts.values() for key, weight in _weights(group)}
    if all(weight == 1.0 for weight in weights.values()):
        raise DataError(
            "label_weights = 'probability': no prompt has two different labels, so every weight is 1. Make several "
            "with --labels-per-input N --strategy beam, or set it to equal."
        )
    return weights


def _weights(group: list[tuple[LabelKey, tuple[int, ...], float]]) -> list[tuple[LabelKey, float]]:
    """The weights of the labels of one prompt: (key, tokens, log-probability) each."""
    times = Counter(tokens for _, tokens, _ in group)
    best = max(logprob for *_, logprob in group)
    total = math.fsum(math.exp(logprob - best) / times[tokens] for _, tokens, logprob in group)
    return [(key, len(group) * math.exp(logprob - best) / (times[tokens] * total)) for key, tokens, logprob in group]
