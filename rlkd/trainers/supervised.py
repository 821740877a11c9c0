"""Supervised distillation on pseudo-labels: SeqKD (Kim & Rush 2016), or a token-level divergence on their prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..evaluation.evaluator import TaskMetric
from ..models.teacher import Teacher
from ..models.vocabulary import encode_texts
from ..objectives.divergences import DIVERGENCES
from ..objectives.policy import reduce_tokens, token_statistics
from ..records import Example
from ..tensors import length_mask, pad_stack
from .arguments import SupervisedArguments
from .base import DistillationTrainer


class PseudoLabelCollator:
    """Rows with `student_input` and `label` (and the exact `token_ids`, if recorded) to padded tensors.

    Returns input_ids, input_mask [B, P], answer_ids, answer_mask [B, R]; labels end with end-of-sequence unless they
    were cut. `teacher_inputs` (texts, for divergences) and `row_ids` (for errors) are passed through.
    """

    def __init__(self, tokenizer: Any, max_input_tokens: int, max_new_tokens: int):
        self.tokenizer, self.max_input_tokens, self.max_new_tokens = tokenizer, max_input_tokens, max_new_tokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = encode_texts(self.tokenizer, [row["student_input"] for row in rows], self.max_input_tokens)
        if "token_ids" in rows[0]:
            answers = [row["token_ids"][: self.max_new_tokens] for row in rows]
        else:
            answers = encode_texts(self.tokenizer, [row["label"] for row in rows], self.max_new_tokens)
        pad = self.tokenizer.pad_token_id
        batch: dict[str, Any] = {}
        for name, ids in (("input", prompts), ("answer", answers)):
            batch[f"{name}_ids"] = pad_stack([torch.tensor(i, dtype=torch.long) for i in ids], pad)
            batch[f"{name}_mask"] = length_mask([len(i) for i in ids])
        if "id" in rows[0]:
            batch["row_ids"] = [str(row["id"]) for row in rows]
        if "teacher_input" in rows[0]:
            batch["teacher_inputs"] = [(row["teacher_input"],) for row in rows]
        return batch


class SupervisedTrainer(DistillationTrainer):
    """Cross-entropy on the labels, or a divergence to the teacher at every label prefix (`objective`).

    train_dataset has columns student_input and label; token_ids (exact tokens) and teacher_input (for divergences) if
    it comes from `rlkd generate-pseudolabels`. Also trains a teacher on gold labels: teacher=None then.
    """

    args: SupervisedArguments

    def __init__(
        self,
        student: Any,
        args: SupervisedArguments,
        *,
        tokenizer: Any,
        train_dataset: Any,
        teacher: Teacher | None = None,
        eval_examples: Sequence[Example] | None = None,
        task_metric: TaskMetric | None = None,
        settings: Sequence[Any] = (),
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.objective != "sequence" and teacher is None:
            raise ConfigError(
                f"objective = {args.objective!r} compares with a teacher: give one, or objective: sequence"
            )
        super().__init__(
            student,
            args,
            teacher=teacher,
            tokenizer=tokenizer,
            train_dataset=train_dataset,
            eval_examples=eval_examples,
            task_metric=task_metric,
            data_collator=PseudoLabelCollator(tokenizer, args.max_input_tokens, args.max_new_tokens),
            settings=settings,
            callbacks=callbacks,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of one update, and their label tokens over all processes: the denominator of the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum(int(batch["answer_mask"].sum()) for batch in batches)
        self.tokens_since_log += own
        return batches, self.accelerator.reduce(torch.tensor(float(own), device=device), reduction="sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of -log pi(label token), or of the divergence, over the tokens of the whole update."""
        mask = inputs["answer_mask"]
        ids = inputs.get("row_ids") or [f"{i} of this batch" for i in range(len(mask))]
        given = (inputs["input_ids"], inputs["input_mask"], inputs["answer_ids"], mask)
        if self.args.objective == "sequence":
            (logps, entropy), _ = model(*given)
            token_loss = -logps
        else:
            assert self.teacher is not None
            with self.finite.together(ids, inputs):
                scores = self.teacher.score(
                    inputs["teacher_inputs"], inputs["answer_ids"], mask, with_hidden=True, ids=ids
                )
            divergence, head = DIVERGENCES[self.args.objective], self.teacher.lm.head()

            def statistics(logits: Tensor, ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
                return *token_statistics(logits, ids), divergence(logits, head.logits(hidden))

            (_, entropy, token_loss), _ = model(*given, statistics, (scores.hidden,))
        tokens = None if num_items_in_batch is None else float(num_items_in_batch)
        loss = reduce_tokens(token_loss, mask, "token_mean", tokens)
        self.finite.watch({"the loss": torch.where(mask, token_loss, 0.0), "the summed loss": loss}, ids, inputs)
        self.record_tokens(mask, entropy=entropy)
        return loss if tokens is None else self.scale_to_global(loss)
