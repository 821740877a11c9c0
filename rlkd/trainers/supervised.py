"""Supervised distillation on pseudo-labels: SeqKD (Kim & Rush 2016), or a token-level divergence on their prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError, DataError
from ..evaluation.evaluator import TaskMetric
from ..io.provenance import described
from ..labels.makers import announce
from ..labels.recorded import LabelKey, label_key, probability_weights
from ..labels.tokens import own_generations
from ..models.chat import chat_record
from ..models.generation import NO_RULES, AnswerRules, rules_of
from ..models.heads import TokenFunction
from ..models.signals import LocalSource, SignalSource, check_signal
from ..models.vocabulary import NO_LIMIT, encode_answers, encode_prompts
from ..objectives.divergences import DIVERGENCES, merged_events
from ..records import Answers, Example, Minibatch, TeacherSignal, given
from ..tensors import length_mask, pad_stack
from .arguments import SupervisedArguments
from .distillation import DistillationTrainer
from .layer_terms import LayerTerms
from .objective import Objective, StudentTokens, Term, with_terms
from .start import START_NEEDS
from .warm_up import WarmUp


class SequenceKD(Objective):
    """loss_t = -w log pi(y_t | x, y_<t) of a label y, [B, R]: the teacher is imitated through its answers alone. w is
    the label's weight (`label_weights`), 1 without.
    """

    def token_loss(self, student: StudentTokens, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        weights = minibatch.answers.weights
        return -student.logps if weights is None else -student.logps * weights[:, None], {}


class DivergenceKD(Objective):
    """loss_t = D(p, pi) at every prefix of the answers, [B, R]; D and its parameters as in `SupervisedArguments`.

    Where only the teacher's K most probable tokens were recorded, D is that of the K + 1 events of `merged_events`.
    """

    needs = frozenset({"distribution"})

    def __init__(self, args: SupervisedArguments):
        self.what, self.remedy = f"objective = {args.objective!r}", "objective: sequence"
        self.divergence = DIVERGENCES[args.objective]
        self.parameters = {name: getattr(args, name) for name, _ in self.divergence.parameters}
        self.temperature = args.temperature

    def check(self, gives: frozenset[str], why: str = "") -> None:
        """As in `Objective`; the most probable tokens are enough where the others may be merged."""
        if "distribution" in gives or "top_k" not in gives:
            super().check(gives, why)
        elif not self.divergence.merges:
            enough = ", ".join(name for name, divergence in DIVERGENCES.items() if divergence.merges)
            raise ConfigError(
                f"{self.what} needs the probability of every token, but only the teacher's most probable ones were "
                f"recorded: choose {enough} or sequence."
            )
        elif self.temperature != 1.0:
            raise ConfigError(
                f"temperature = {self.temperature:g}: softens the probability of every token, but only the teacher's "
                "most probable ones were recorded: set it to 1."
            )

    def token_function(
        self, signal: TeacherSignal | None, annotations: Any = None
    ) -> tuple[TokenFunction, tuple[Tensor, ...]]:
        assert signal is not None
        if signal.top_k is not None:
            top_k = signal.top_k
            return with_terms(Term(self.of_top_tokens, lambda *args: args, (top_k.ids, top_k.logps)))
        distribution = given(signal.distribution)

        divergence = partial(self.divergence, temperature=self.temperature, **self.parameters)
        return with_terms(Term(divergence, lambda *states: (distribution.logits(*states),), distribution.token_args))

    def of_top_tokens(self, logits: Tensor, ids: Tensor, logps: Tensor) -> Tensor:
        """D of student logits [n, V] and the teacher's most probable tokens, [n, K] each."""
        return self.divergence(*merged_events(logits, ids, logps), **self.parameters)

    def token_loss(self, student: StudentTokens, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        return student.extra[0], {}


def imitation(args: SupervisedArguments) -> Objective:
    """The objective that `args.objective` names."""
    return SequenceKD() if args.objective == "sequence" else DivergenceKD(args)


def check_readiness(args: SupervisedArguments, gives: frozenset[str]) -> None:
    """Raises ConfigError for `until_ready` with a teacher that cannot tell whether the student is ready."""
    if args.until_ready:
        check_signal(START_NEEDS, gives, "until_ready", "it takes the teacher's model; or set it to false.")


class PseudoLabelCollator:
    """Rows with `student_input` and `label` (and the exact `token_ids`, if recorded) to padded tensors.

    own: the generations of labels whose token ids are the tokenizer's (`own_generations`); None for all. Other labels
    are encoded from their text. weights: of each label, by `label_key`; None without.
    Returns input_ids, input_mask [B, P], answer_ids, answer_mask [B, R], and `examples` with the rows' names and, for
    divergences, what the teacher reads; labels begin as the student's `rules` force it, and end with end-of-sequence
    unless they were cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_input_tokens: int,
        max_new_tokens: int,
        own: frozenset[str | None] | None = None,
        rules: AnswerRules = NO_RULES,
        weights: Mapping[LabelKey, float] | None = None,
    ):
        self.tokenizer, self.max_input_tokens, self.max_new_tokens = tokenizer, max_input_tokens, max_new_tokens
        self.own, self.rules, self.weights = own, rules, weights

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [row["student_input"] for row in rows]
        prompts = encode_prompts(self.tokenizer, texts, self.max_input_tokens, append_eos=self.rules.end_of_prompts)
        answers = [self.rules.complete(ids)[: self.max_new_tokens] for ids in self._answers(rows)]
        # Masks decide what counts: a tokenizer may have no padding token, or pad with end-of-sequence.
        pad = self.rules.pad_id
        batch: dict[str, Any] = {}
        for name, ids in (("input", prompts), ("answer", answers)):
            batch[f"{name}_ids"] = pad_stack([torch.tensor(i, dtype=torch.long) for i in ids], pad)
            batch[f"{name}_mask"] = length_mask([len(i) for i in ids])
        if self.weights is not None:
            batch["weights"] = torch.tensor([self.weights[label_key(row)] for row in rows])
        batch["examples"] = [_example(row, f"{i} of this batch") for i, row in enumerate(rows)]
        return batch

    def _answers(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The recorded tokens, or those of the texts: without end-of-sequence where the teacher was cut short."""
        texts = {i: row["label"] for i, row in enumerate(rows) if not self._is_own(row)}
        encoded = encode_answers(self.tokenizer, list(texts.values()), NO_LIMIT, self.rules) if texts else []
        again = dict(zip(texts, encoded, strict=True))
        answers = [again[i] if i in again else row["token_ids"] for i, row in enumerate(rows)]
        ends = (self.tokenizer.eos_token_id, *self.rules.eos_ids)
        cut = [row.get("finish_reason") == "length" and len(ids) > 1 for row, ids in zip(rows, answers, strict=True)]
        return [ids[:-1] if short and ids[-1] in ends else ids for ids, short in zip(answers, cut, strict=True)]

    def _is_own(self, row: dict[str, Any]) -> bool:
        return "token_ids" in row and (self.own is None or row.get("generation") in self.own)


def _example(row: dict[str, Any], name: str) -> Example:
    prompts = (row["teacher_input"],) if "teacher_input" in row else ()
    return Example(str(row.get("id", name)), row["student_input"], prompts)


def check_label_rows(rows: Any, what: str = "train_dataset", *, scored: bool = False) -> None:
    """Raise DataError unless every row has a text as student_input and as label; as teacher_input, too, if the teacher
    is to score the labels.
    """
    names = getattr(rows, "column_names", None)
    for name in ("student_input", "label", *(["teacher_input"] if scored else [])):
        if names is not None and name not in names:
            raise DataError(f"{what} has no column '{name}'. Found: {', '.join(names)}.")
        values = rows[name] if names is not None else (row.get(name) for row in rows)
        wrong = [(i, value) for i, value in enumerate(values) if not isinstance(value, str)]
        if wrong:
            raise DataError(
                f"{what}: '{name}' is not text in {len(wrong)} rows (first: row {wrong[0][0]}, "
                f"{wrong[0][1]!r:.40}). Convert or remove them."
            )


class SupervisedTrainer(DistillationTrainer):
    """Cross-entropy on the labels, or a divergence to the teacher at every label prefix (`objective`).

    train_dataset has columns student_input and label; token_ids (exact tokens) and teacher_input (for divergences) if
    it comes from `rlkd generate-pseudolabels`. Also trains a teacher on gold labels: teacher=None then.
    """

    args: SupervisedArguments
    objective_type = staticmethod(imitation)

    def __init__(
        self,
        student: Any,
        args: SupervisedArguments,
        *,
        tokenizer: Any,
        train_dataset: Any,
        teacher: SignalSource | None = None,
        eval_examples: Sequence[Example] | None = None,
        task_metric: TaskMetric | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_label_rows(train_dataset, scored=args.objective != "sequence" or bool(args.layer_weights))
        if not isinstance(teacher, LocalSource):
            check_readiness(args, frozenset() if teacher is None else teacher.gives)
        own = own_generations(train_dataset, tokenizer)
        weights = probability_weights(train_dataset) if args.label_weights == "probability" else None
        super().__init__(
            student,
            args,
            teacher=teacher,
            tokenizer=tokenizer,
            train_dataset=train_dataset,
            eval_examples=eval_examples,
            task_metric=task_metric,
            callbacks=callbacks,
        )
        rules = rules_of(self.policy.lm)
        self.labels = PseudoLabelCollator(tokenizer, args.max_input_tokens, args.max_new_tokens, own, rules, weights)
        self.layer_terms = LayerTerms(args, self.policy, teacher, train_dataset) if args.layer_weights else None
        self.rows_of_update = 0.0
        self.warm_up = WarmUp(self) if args.until_ready else None
        if self.warm_up is not None:
            self.callback_handler.callbacks.insert(0, self.warm_up)  # trackers close their runs when training ends

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        return self.labels(rows)

    def begin_run(self, checkpoint: Path | None) -> None:
        """As in `StudentTrainer`; says whose labels the student learns, and warns of those of another teacher."""
        super().begin_run(checkpoint)
        if self.is_world_process_zero():
            append_eos = getattr(self.teacher, "append_eos", None)
            chats = [chat_record(teacher.tokenizer).get("chat") for teacher in self.local_teachers.values()]
            announce(described(self.train_dataset), self.makers(), append_eos=append_eos, chats=chats)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.warm_up is None or kwargs.get("skip_scheduler"):
            return super()._evaluate(*args, **kwargs)
        with self.warm_up.evaluation():
            return super()._evaluate(*args, **kwargs)

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """As in `DistillationTrainer`, with whether a warm-up is done."""
        extras = super().save_extras(folder)
        if self.layer_terms is not None:
            self.layer_terms.save(folder)
        return extras if self.warm_up is None else {**extras, "saturated": self.warm_up.saturated}

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        super().load_extras(extras, folder)
        if self.layer_terms is not None:
            self.layer_terms.load(folder)
        if self.warm_up is not None:
            self.warm_up.saturated = extras.get("saturated", False)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of one update, and their label tokens over all processes: the denominator of the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum(int(batch["answer_mask"].sum()) for batch in batches)
        self.tokens_since_log += own
        rows = sum(len(batch["examples"]) for batch in batches)
        tokens, self.rows_of_update = self.sum(torch.tensor([float(own), float(rows)], device=device))
        return batches, tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the label tokens of the whole update."""
        answers = Answers(**inputs)
        evidence = self.evidence(answers)
        minibatch = Minibatch(
            answers=answers,
            signal=evidence.signal,
            annotations=self.objective.annotate(answers, evidence),
            denominator=None if num_items_in_batch is None else float(num_items_in_batch),
        )
        return super().compute_loss(model, {"minibatch": minibatch}, return_outputs)

    def layer_loss(self, minibatch: Minibatch, layers: Any) -> Tensor:
        """The weighted terms over layers: their mean over the rows of the whole update."""
        assert self.layer_terms is not None
        answers = minibatch.answers
        own = len(answers.examples)
        terms = self.layer_terms.of(answers, layers)
        self.record_tokens(
            torch.ones(own, dtype=torch.bool, device=self.args.device),
            **{name: (value / own).expand(own) for name, value in terms.items()},
        )
        weights, rows = self.args.layer_weights, own if minibatch.denominator is None else float(self.rows_of_update)
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum() / rows


class ReferenceTrainer(SupervisedTrainer):
    """Cross-entropy on one's own references, without a teacher: the rows' answers are right, and so is `label`."""

    expects_teacher = False
