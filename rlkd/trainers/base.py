"""What all rlkd trainers share: a policy inside transformers' Trainer; saving, judging and logging the bare student."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..errors import DivergenceError
from ..evaluation import Evaluator, TaskMetric
from ..models.student import Policy
from ..models.teacher import Teacher
from ..records import Example
from .arguments import DistillationArguments

STATE_FILE = "rlkd_state.json"


class JsonlCallback(TrainerCallback):
    """Appends every logged record to metrics.jsonl in the run folder: the local truth, whatever tracker is used."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}) + "\n")


class _FiniteGradient(TrainerCallback):
    """Stops before an optimizer step with a gradient that is not finite."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        norms = [p.grad.norm() for p in self.trainer.policy.parameters() if p.grad is not None]
        self.trainer.check_finite("the gradient", torch.stack(norms), ["of this update"])


class DistillationTrainer(Trainer):
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
        self._recorded: dict[str, list[Tensor]] = {}
        super().__init__(
            model=self.policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_examples,
            data_collator=data_collator or (lambda rows: rows),
            callbacks=[JsonlCallback(), _FiniteGradient(self), *(callbacks or [])],
        )

    @property
    def run_folder(self) -> Path:
        """Where metrics, samples, checkpoints and the final student go."""
        return Path(str(self.args.output_dir))

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
        if not self.args.disable_tqdm:
            _print_samples(self.state.global_step, columns, rows)
        if "wandb" in (self.args.report_to or ()):
            import wandb

            table = wandb.Table(columns=list(columns), data=[[row[c] for c in columns] for row in rows])
            wandb.log({"samples": table}, commit=False)

    # Logging: losses record detached values; a log line holds their means over all tokens, micro-batches and processes,
    # so it does not depend on how the batch was split.

    def record(self, **values: Tensor | float) -> None:
        """Add numbers to the means written at the next log line; of names ending in `_max`, the largest is written."""
        for name, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float64, device=self.args.device).detach()
            self._recorded.setdefault(name, []).append(torch.stack([number, torch.ones_like(number)]))

    def record_tokens(self, mask: Tensor, **values: Tensor) -> None:
        """Add every token [B, R] of `mask` to the means written at the next log line."""
        for name, value in values.items():
            pair = torch.stack([(value.detach() * mask).double().sum(), mask.double().sum()])
            self._recorded.setdefault(name, []).append(pair)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._recorded:
            for name in sorted(self._recorded):
                total, count = torch.stack(self._recorded[name]).T
                if name.endswith("_max"):
                    logs[name] = float(self.accelerator.gather(total.max()).max())
                else:
                    sums = self.accelerator.reduce(torch.stack([total.sum(), count.sum()]), reduction="sum")
                    logs[name] = float(sums[0] / sums[1].clamp(min=1))
            self._recorded.clear()
        super().log(logs, start_time)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """transformers ignores `optim_args` for Adafactor. Here `optim_args: scale_parameter=True` gives steps in
        proportion to each weight matrix, T5's own rule: from random weights AdamW is far slower.
        """
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim == "adafactor" and args.optim_args:
            given = dict(pair.split("=", 1) for pair in args.optim_args.replace(" ", "").split(","))
            kwargs |= {name: yaml.safe_load(value) for name, value in given.items()}
        return optimizer, kwargs

    def scale_to_global(self, loss: Tensor) -> Tensor:
        """Undo the averaging over processes (DDP) and accumulation steps (Trainer) of a globally normalised loss."""
        return loss * self.accelerator.num_processes * self.current_gradient_accumulation_steps

    def check_finite(self, name: str, value: Tensor, ids: list[str]) -> None:
        """Raise DivergenceError before a non-finite number reaches the weights."""
        if not torch.isfinite(value).all():
            raise DivergenceError(
                f"{name} is not finite at step {self.state.global_step} (rows {', '.join(ids[:5])}). Nothing was "
                "updated with it. Lower learning_rate, or resume from the last checkpoint."
            )

    # Saving: the bare student; beside it, in checkpoints only, what resuming needs.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir) if output_dir else self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder)
        self.tokenizer.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Called for resumable checkpoints only, after the student was written.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.policy.save_value_head(output_dir)
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(self.save_extras(Path(output_dir)), indent=2))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        extras = json.loads((folder / STATE_FILE).read_text())
        if extras["trainer"] != type(self).__name__:
            raise ValueError(
                f"{folder} was written by {extras['trainer']}, not by {type(self).__name__}: give another output_dir, "
                "or start from that checkpoint's student instead of resuming it"
            )
        self.policy.load(folder)
        self.load_extras(extras, folder)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.policy.load(self.state.best_model_checkpoint)

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """JSON-able state beyond weights, optimizer, scheduler and RNG; tensors go to files in `folder`."""
        return {"trainer": type(self).__name__}

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        """Restore what `save_extras` returned and wrote; the student is already loaded."""


def _print_samples(step: int, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"samples at step {step}", show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if "regret" in column else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(stderr=True).print(table)
