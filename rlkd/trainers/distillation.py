"""The base of trainers of generating students: a policy inside the Trainer, optimised for an `Objective`, evaluated by
the teacher on held-out inputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..evaluation.evaluator import Evaluator, TaskMetric
from ..evaluation.recording import append_samples, evaluated_samples
from ..evaluation.samples import Sample
from ..io.progress import progress
from ..models.architectures import language_model
from ..models.generation import rules_of
from ..models.heads import RowLoss
from ..models.policy import Policy
from ..models.saving import evaluated_generation
from ..models.signals import LocalSource, SignalSource
from ..models.teacher import Teacher
from ..models.vocabulary import check_same_vocabulary
from ..objectives.policy import reduce_tokens, reduction_count
from ..records import Answers, Example, Imitation, Minibatch, TeacherSignal, select_rows
from ..runs.files import HELD_OUT, SAMPLES, TOKEN_REWARDS, append_lines, keep_first_and_last
from ..runs.sample_tables import SampleTables, print_samples
from ..sharding import unsharded
from .base_arguments import DistillationArguments
from .core import StudentTrainer
from .cut_answers import ending_signal
from .environment import check_half_precision
from .inputs import weights_of
from .objective import Evidence, Objective, StudentTokens

logger = logging.getLogger(__name__)


class TrainerInputs(TypedDict):
    """What trainers of generating students take besides student, settings and training data."""

    teacher: SignalSource
    tokenizer: Any
    eval_examples: NotRequired[Sequence[Example] | None]
    task_metric: NotRequired[TaskMetric | None]
    callbacks: NotRequired[list[TrainerCallback] | None]


class DistillationTrainer(StudentTrainer):
    """transformers.Trainer around a `Policy`. Subclasses choose the objective and the source of answers.

    Args: student, a loaded model (dropout 0); teacher, frozen; tokenizer, shared by both; train_dataset, what the
    subclass reads; eval_examples, held-out inputs; task_metric, (predictions, examples) -> scores.
    Saved models are the bare student, as transformers loads them; checkpoints add critic and state.
    Raises ConfigError if the teacher cannot provide what the objective needs.
    """

    args: DistillationArguments
    objective: Objective
    objective_type: Callable[[Any], Objective]
    expects_teacher = True  # to score held-out answers

    def __init__(
        self,
        student: Any,
        args: DistillationArguments,
        *,
        teacher: SignalSource | None,
        tokenizer: Any,
        train_dataset: Any,
        eval_examples: Sequence[Example] | None = None,
        task_metric: TaskMetric | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.objective = type(self).objective_type(args)
        self.check_teacher()
        self.policy = Policy(language_model(student, tokenizer), critic=self.objective.critic)
        self.reference: Policy | None = None
        self.evaluator: Evaluator | None = None
        eval_examples = eval_examples if eval_examples is not None and len(eval_examples) else None
        if eval_examples is not None:
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
            self.evaluator.check(args.eval_limit)
        self.trained = self.policy
        self.sample_tables = SampleTables(args.report_to or ())
        self.tokens_since_log, self.last_log = 0, time.perf_counter()
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_examples,
            data_collator=self.collate,
            callbacks=callbacks,
        )
        check_half_precision(self.accelerator.mixed_precision, setting=args.fp16)  # fp8 becomes fp16 on some devices

    def check_teacher(self) -> None:
        """Raises ConfigError if the teacher cannot provide what the objective needs."""
        objective = self.objective
        if objective.needs and self.teacher is None:
            raise ConfigError(f"{objective.what} needs a teacher: give one, or {objective.remedy}")
        if isinstance(self.teacher, LocalSource):
            check_same_vocabulary(self.teacher.tokenizer, self.tokenizer, "in memory", "in memory")
        if self.teacher is not None:
            objective.check(self.teacher.gives, getattr(self.teacher, "lacks", ""))

    def begin_run(self, checkpoint: Path | None) -> None:
        """As in `StudentTrainer`; says what evaluations lack without a local teacher."""
        super().begin_run(checkpoint)
        told = isinstance(self.teacher, LocalSource) or not self.expects_teacher
        if self.evaluator is not None and not told and self.is_world_process_zero():
            missing = ", ".join([*self.evaluator.missing, "token rewards"])
            logger.warning(
                f"held-out answers have no {missing}: that takes the teacher's model"
                + ("" if self.evaluator.task_metric or self.evaluator.scores else "; name a task_metric to score them")
            )

    def collate(self, rows: list[Any]) -> Any:
        """A batch of the training data; as it is unless a subclass reads rows."""
        return rows

    def models(self) -> dict[str, Any]:
        local = {role: teacher.model for role, teacher in self.local_teachers.items()}
        return {**(local or {"teacher": self.teacher and self.teacher.model}), "student": self.policy.student}

    @property
    def local_teachers(self) -> Mapping[str, Teacher]:
        """The teachers whose models are here, by their role."""
        return self.teacher.teachers if isinstance(self.teacher, LocalSource) else {}

    def makers(self) -> list[tuple[Any, str | None]]:
        """The teachers' models with the digests of their weights, to compare with those that made labels."""
        models = {role: model for role, model in self.models().items() if role != "student" and model is not None}
        return [(model, self.inputs.get(weights_of(role))) for role, model in models.items()]

    # Evaluation: the Evaluator replaces the Trainer's loss-only loop.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the policy on the held-out inputs, split over processes. Logged as `eval_*`, see docs/metrics.md."""
        if self.evaluator is None:
            raise ValueError("evaluate() needs eval_examples: pass them to the trainer, or set eval_strategy: 'no'")
        started = time.perf_counter()
        with unsharded(self.policy):
            rows = self.evaluate_policy(self.args.eval_limit)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator.summarise(rows).items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        if metric_key_prefix == "eval":
            self.per_row = self.evaluator.per_row
        self.log(metrics)
        with unsharded(self.policy):
            if self.is_world_process_zero():
                keep_first_and_last(self.run_folder / HELD_OUT, self.last.step, rows)
                self._save_samples(rows[: self.args.sample_table_rows])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def refresh_held_out(self) -> None:
        """As in `StudentTrainer`."""
        assert self.evaluator is not None
        with unsharded(self.policy):
            rows = self.evaluate_policy(self.args.eval_limit)
        self.evaluator.summarise(rows)
        if self.is_world_process_zero():
            keep_first_and_last(self.run_folder / HELD_OUT, self.last.step, rows)

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
        shown = progress(len(share), what="evaluation", quiet=quiet)
        with self.errors_on_all(), self.finite.together([], None), shown as advance:
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
            print_samples(self.state.global_step, rows)
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
        """The same answers token by token, and those that training has just learned from: `RewardView.from_run`. Only
        a local teacher gives all that it shows.
        """
        assert self.evaluator is not None
        if not isinstance(self.teacher, LocalSource):
            return
        value: Any = getattr(self.args, "reward_value", "max")
        examples = [self.evaluator.examples[row["index"]] for row in rows]
        samples = evaluated_samples(self.teacher, self.tokenizer, self.policy, examples, rows, value)
        if (self.run_folder / TOKEN_REWARDS).exists():
            # The teacher's answers never change.
            samples = [sample for sample in samples if sample.source != "teacher greedy"]
        append_samples(self.run_folder, [*samples, *self.rollout_samples()], step=self.state.global_step, value=value)

    def rollout_samples(self) -> list[Sample]:
        """The first answers of the newest rollout batch; none in trainers without rollouts."""
        return []

    # The objective

    @torch.no_grad()
    def evidence(self, answers: Answers) -> Evidence:
        """What the objective reads before the first update on these answers; `objective.needs` and `reads` define
        it.
        """
        needs, reads = self.objective.needs, self.objective.reads
        signal = self.score(answers, distribution="distribution" in needs) if needs else None
        reference_logps, reference, entropy, extra = None, None, None, ()
        # In the precision of the loss, of which they are differences; the teacher keeps its own (`teacher_dtype`).
        with self.accelerator.autocast():
            if reads & {"reference_logps", "reference"}:
                assert self.reference is not None
                reference_logps, reference = self.reference.score(*answers.policy_inputs)
            if "expected" in reads:
                (_, entropy, *extra), _ = self.policy(*answers.policy_inputs, *self.objective.token_function(signal))
            values = self.policy.values(*answers.policy_inputs) if "values" in reads else None
        return Evidence(
            signal=signal,
            reference_logps=reference_logps,
            reference=reference if "reference" in reads else None,
            values=values,
            entropy=entropy,
            ending=self.ending(answers) if "ending" in reads else None,
            extra=tuple(extra),
        )

    def ending(self, answers: Answers) -> TeacherSignal | None:
        """As `ending_signal`. An error on one process is raised on all."""
        assert self.teacher is not None
        with self.errors_on_all(), self.finite.together(answers.ids, answers):
            return ending_signal(self.teacher, answers, rules_of(self.policy.lm).eos_ids)

    def score(self, answers: Answers, *, distribution: bool) -> TeacherSignal:
        """The teacher's signal for the answers. An error on one process is raised on all."""
        assert self.teacher is not None
        with self.errors_on_all(), self.finite.together(answers.ids, answers):
            prompts = [example.teacher_inputs for example in answers.examples]
            return self.teacher.score(
                prompts, answers.answer_ids, answers.answer_mask, distribution=distribution, ids=answers.ids
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's token losses, reduced over the global minibatch `inputs["minibatch"]`."""
        minibatch: Minibatch = inputs["minibatch"]
        answers, mask = minibatch.answers, minibatch.answers.answer_mask
        function, token_args = self.objective.token_function(minibatch.signal, minibatch.annotations)
        labels = None if minibatch.imitation is None else minibatch.imitation.labels.policy_inputs
        loss_of = self.row_loss(minibatch)
        with self.accelerator.autocast():  # which accelerate leaves to FSDP2, and does itself in a DDP model
            total, parts, *beside = model(*answers.policy_inputs, function, token_args, labels, loss_of)
        tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss, logps = tokens.pop("loss"), tokens.pop("logps")
        if minibatch.imitation is not None:
            total = total + self.imitation_loss(minibatch.imitation, *beside)
        elif beside:
            total = total + self.layer_loss(minibatch, *beside)
        watched = {"the loss": torch.where(mask, loss, 0.0), "the summed loss": total}
        if answers.own_logps is not None:
            log_ratio = (logps - answers.own_logps) * mask
            watched = {"the log-ratio": log_ratio, **watched}
            ratio = log_ratio.exp()
            self.record_tokens(mask, ratio_mean=ratio)
            self.record(ratio_max=ratio.max())
        self.finite.watch(watched, answers.ids, minibatch)
        self.record_tokens(mask, **tokens)
        return total if minibatch.denominator is None else self.scale_to_global(total)

    def row_loss(self, minibatch: Minibatch) -> RowLoss:
        """The loss of some rows of a minibatch, its share of the whole, and their numbers per token, [b, R] each."""
        objective, mask = self.objective, minibatch.answers.answer_mask
        reduction, denominator = objective.loss_reduction, minibatch.denominator
        if denominator is None:
            denominator = reduction_count(mask, reduction)
        own = replace(minibatch, imitation=None)  # labels have rows of their own

        def of_rows(rows: slice, statistics: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logps, entropy, *extra = statistics
            student = StudentTokens(logps=logps, entropy=entropy, values=values.to(logps.dtype), extra=tuple(extra))
            loss, logged = objective.token_loss(student, select_rows(own, torch.arange(len(mask))[rows]))
            total = reduce_tokens(loss, mask[rows], reduction, denominator)
            tokens = {"loss": loss, "logps": logps, "entropy": entropy, **logged}
            return total, {name: value.detach() for name, value in tokens.items()}

        return of_rows

    def imitation_loss(self, imitation: Imitation, logps: Tensor) -> Tensor:
        """coef * -log pi(label), a scalar: the mean over all label tokens of the update, of which these are a part."""
        mask = imitation.labels.answer_mask
        self.record_tokens(mask, imitation_loss=-logps)
        self.finite.watch({"the imitation loss": logps}, imitation.labels.ids, imitation.labels)
        return imitation.coef * reduce_tokens(-logps, mask, "token_mean", imitation.tokens)

    def layer_loss(self, minibatch: Minibatch, layers: Any) -> Tensor:
        """What is added for the student's layers, a scalar: 0 but in trainers that compare them."""
        return torch.zeros((), device=self.args.device)

    def scale_to_global(self, loss: Tensor) -> Tensor:
        """Undo the averaging over processes (DDP) and accumulation steps (Trainer) of a globally normalised loss."""
        return loss * self.accelerator.num_processes * self.current_gradient_accumulation_steps

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def gather(self, x: Tensor) -> Tensor:
        """The rows [B, ...] of every process, padded with 0 to the longest answer."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def generation_config(self) -> Any:
        """As in `StudentTrainer`: plain `generate()` of the saved student gives the answers that are evaluated here."""
        return evaluated_generation(self.policy.lm, self.args.max_new_tokens)

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """As in `StudentTrainer`, with the objective's state."""
        return {**super().save_extras(folder), **self.objective.state()}

    def _save_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        super()._save_weights(folder, weights)
        if self._unfinished is not None:  # the critic goes next to the student, in checkpoints only
            self.policy.save_value_head(folder, weights)

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        super().load_extras(extras, folder)
        self.objective.load_state(extras)
