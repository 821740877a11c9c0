"""What trainers of generating students share: a policy inside the Trainer, judged by the teacher on held-out inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..evaluation import Evaluator, TaskMetric
from ..inspection.recording import TOKEN_REWARDS, append_samples, evaluated_samples
from ..inspection.reward_view import Sample
from ..models.student import Policy
from ..models.teacher import Teacher
from ..records import Example
from .arguments import DistillationArguments
from .student_trainer import StudentTrainer


class DistillationTrainer(StudentTrainer):
    """transformers.Trainer around a `Policy`. Subclasses say where minibatches come from and what the loss is.

    Args: student, a loaded encoder-decoder (dropout 0); teacher, frozen; tokenizer, shared by both; train_dataset,
    what the subclass reads; eval_examples, held-out inputs; task_metric, (predictions, examples) -> scores.
    Saved models are the bare student, as AutoModelForSeq2SeqLM loads them; checkpoints add critic and state.
    """

    args: DistillationArguments

    def __init__(
        self,
        student: Any,
        args: DistillationArguments,
        *,
        teacher: Teacher | None,
        tokenizer: Any,
        train_dataset: Any,
        eval_examples: Sequence[Example] | None = None,
        task_metric: TaskMetric | None = None,
        critic: bool = False,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.policy = Policy(student, len(tokenizer), critic=critic)
        self.reference: Policy | None = None
        self.evaluator: Evaluator | None = None
        if teacher is not None and eval_examples is not None and len(eval_examples):
            self.evaluator = Evaluator(
                teacher,
                tokenizer,
                eval_examples,
                args.max_input_tokens,
                args.max_new_tokens,
                task_metric,
                batch_rows=args.per_device_eval_batch_size,
                seed=args.data_seed or args.seed,
            )
        self.trained = self.policy
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_examples,
            data_collator=data_collator or (lambda rows: rows),
            callbacks=callbacks,
        )

    def run(self) -> None:
        """A whole job, as the recipes run it: train (or resume), judge, save the student, say where it is."""
        self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        metrics = self.evaluate()
        self.save_model()
        if self.is_world_process_zero():
            shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3g}" for name, value in metrics.items())
            print(f"held-out: {shown}\nstudent and metrics.jsonl saved in {self.run_folder}")

    # Evaluation: the Evaluator replaces the Trainer's loss-only loop.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Judge the policy on the held-out inputs, split over processes. Logged as `eval_*`, see docs/metrics.md."""
        if self.evaluator is None:
            raise ValueError(
                "evaluate() needs a teacher and eval_examples: pass both to the trainer, or set eval_strategy: 'no'"
            )
        started = time.perf_counter()
        rows = self.judge_policy(self.args.eval_limit)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator.summarise(rows).items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(metrics)
        self._save_samples(rows[: self.args.sample_table_rows])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def judge_policy(self, limit: int | None) -> list[dict[str, Any]]:
        """The evaluator's record of each held-out input (the first `limit`), in order, on every process."""
        assert self.evaluator is not None
        total = len(self.evaluator.examples) if limit is None else min(limit, len(self.evaluator.examples))
        share = range(self.accelerator.process_index, total, self.accelerator.num_processes)
        self.policy.eval()
        rows = self.evaluator.rows(self.policy, self.reference, list(share))
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        return sorted(rows, key=lambda row: row["index"])

    def _save_samples(self, rows: list[dict[str, Any]]) -> None:
        if not rows or not self.is_world_process_zero():
            return
        columns = ("id", "input", "teacher", "student", "regret", "sample_student", "sample_regret")
        path = self.run_folder / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": self.state.global_step, **row}, ensure_ascii=False) + "\n")
        self._save_token_rewards(rows)
        if not self.args.disable_tqdm:
            _print_samples(self.state.global_step, columns, rows)
        if "wandb" in (self.args.report_to or ()):
            import wandb

            table = wandb.Table(columns=list(columns), data=[[row[c] for c in columns] for row in rows])
            wandb.log({"samples": table}, commit=False)

    def _save_token_rewards(self, rows: list[dict[str, Any]]) -> None:
        """The same answers token by token, and those that training has just learned from: `RewardView.from_run`."""
        assert self.evaluator is not None
        value: Any = getattr(self.args, "reward_value", "max")
        examples = [self.evaluator.examples[row["index"]] for row in rows]
        samples = evaluated_samples(self.evaluator.teacher, self.tokenizer, self.policy, examples, rows, value)
        if (self.run_folder / TOKEN_REWARDS).exists():
            # The teacher's answers never change.
            samples = [sample for sample in samples if sample.source != "teacher greedy"]
        append_samples(self.run_folder, [*samples, *self.rollout_samples()], step=self.state.global_step, value=value)

    def rollout_samples(self) -> list[Sample]:
        """The first answers of the newest rollout batch; none in trainers without rollouts."""
        return []

    def scale_to_global(self, loss: Tensor) -> Tensor:
        """Undo the averaging over processes (DDP) and accumulation steps (Trainer) of a globally normalised loss."""
        return loss * self.accelerator.num_processes * self.current_gradient_accumulation_steps

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """As in `StudentTrainer`; the critic goes beside the student."""
        self.policy.save_value_head(folder)
        return super().save_extras(folder)


def _print_samples(step: int, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"samples at step {step}", show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if "regret" in column else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(stderr=True).print(table)
