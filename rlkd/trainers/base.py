"""What trainers of generating students share: a policy inside the Trainer, judged by the teacher on held-out inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..evaluation.evaluator import Evaluator, TaskMetric
from ..evaluation.recording import append_samples, evaluated_samples
from ..evaluation.samples import Sample
from ..io.progress import progress
from ..models.policy import Policy
from ..models.teacher import Teacher
from ..models.vocabulary import valid_vocab
from ..records import Example
from ..runs.files import HELD_OUT, SAMPLES, TOKEN_REWARDS, append_lines, keep_first_and_last
from ..runs.sample_tables import TEXTS, SampleTables
from .arguments import DistillationArguments
from .student_trainer import StudentTrainer


class DistillationTrainer(StudentTrainer):
    """transformers.Trainer around a `Policy`. Subclasses say where minibatches come from and what the loss is.

    Args: student, a loaded encoder-decoder (dropout 0); teacher, frozen; tokenizer, shared by both; train_dataset,
    what the subclass reads; eval_examples, held-out inputs; task_metric, (predictions, examples) -> scores; settings,
    other dataclasses of settings, for run.json.
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
        settings: Sequence[Any] = (),
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.policy = Policy(student, valid_vocab(tokenizer), critic=critic)
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
        self.sample_tables = SampleTables(args.report_to or ())
        self.tokens_since_log, self.last_log = 0, time.perf_counter()
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_examples,
            data_collator=data_collator or (lambda rows: rows),
            settings=settings,
            callbacks=callbacks,
        )

    def run(self) -> None:
        """A whole job, as the recipes run it: train (or resume), judge, save the student, say where it is."""
        with self.writing():
            self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
            metrics = self.evaluate()
            self.save_model()
        if self.is_world_process_zero():
            shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3g}" for name, value in metrics.items())
            print(f"held-out: {shown}\nstudent and metrics.jsonl saved in {self.run_folder}")

    def models(self) -> dict[str, Any]:
        return {"teacher": self.teacher and self.teacher.lm.model, "student": self.policy.student}

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
        rows = self.evaluate_policy(self.args.eval_limit)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator.summarise(rows).items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(metrics)
        if self.is_world_process_zero():
            keep_first_and_last(self.run_folder / HELD_OUT, self.state.global_step, rows)
            self._save_samples(rows[: self.args.sample_table_rows])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_names(self) -> list[str] | None:
        """As in `StudentTrainer`."""
        return None if self.evaluator is None else self.evaluator.names()

    @property
    def held_out_rows(self) -> int | None:
        """As in `StudentTrainer`, of the first `eval_limit`."""
        rows = super().held_out_rows
        return rows if rows is None or self.args.eval_limit is None else min(rows, self.args.eval_limit)

    def evaluate_policy(self, limit: int | None) -> list[dict[str, Any]]:
        """The evaluator's record of each held-out input (the first `limit`), in order, on every process."""
        assert self.evaluator is not None
        total = len(self.evaluator.examples) if limit is None else min(limit, len(self.evaluator.examples))
        share = range(self.accelerator.process_index, total, self.accelerator.num_processes)
        self.policy.eval()
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        with self.finite.together([], None), progress(len(share), what="evaluation", quiet=quiet) as advance:
            rows = self.evaluator.rows(self.policy, self.reference, list(share), advance)
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        return sorted(rows, key=lambda row: row["index"])

    def _save_samples(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        append_lines(self.run_folder / SAMPLES, [{"step": self.state.global_step, **row} for row in rows])
        self._save_token_rewards(rows)
        if not self.args.disable_tqdm:
            _print_samples(self.state.global_step, rows)
        self.sample_tables.log(self.state.global_step, rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:
            seconds = time.perf_counter() - self.last_log
            tokens = self.tokens_since_log * self.accelerator.num_processes
            if "loss" in logs:
                self.record(tokens=tokens, tokens_per_second=tokens / seconds)
            else:
                logs["tokens"] = tokens
            self.tokens_since_log, self.last_log = 0, time.perf_counter()
        super().log(logs, start_time)

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


def _print_samples(step: int, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"samples at step {step}", show_lines=True)
    for column in TEXTS:
        table.add_column(column, overflow="fold", justify="right" if "regret" in column else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in TEXTS))
    Console(stderr=True).print(table)
