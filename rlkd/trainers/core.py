"""The base of all rlkd trainers: recording of logged numbers, guards, saving the bare student."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..data.splits import shared_inputs
from ..errors import RlkdError
from ..io import bounded_yaml
from ..io.redaction import redacted
from ..io.versions import describe_machine
from ..models.chat import chat_record
from ..models.loading import check_finite
from ..models.saving import save_student
from ..runs.best import BestCheckpoint, check_best_metric, check_held_out
from ..runs.card import write_card
from ..runs.checkpoints import check_run_folder, explained_save, read_state
from ..runs.files import METRICS, RUN_FILE, append_lines
from ..runs.finite import FiniteGuard
from ..runs.guards import AlarmCallback
from ..runs.progress import TrainingProgress
from ..runs.record import RunRecord, describe_data, describe_templates, settings_of
from ..runs.resumable import ResumableTrainer
from ..sharding import tied_as, whole
from .announce import Announcement
from .base_arguments import StudentArguments
from .environment import describe_environment, warn_of_ignored
from .inputs import describe_inputs, weights_of
from .last import LastEvaluation
from .parallel import check_student, shard_with, sharding_wanted

logger = logging.getLogger(__name__)


class JsonlCallback(TrainerCallback):
    """Appends every logged record to metrics.jsonl in the run folder: the local record, independent of trackers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            append_lines(Path(args.output_dir) / METRICS, [record])


class StudentTrainer(ResumableTrainer):
    """transformers.Trainer around a wrapped student. Saved models are the bare student and its tokenizer.

    Subclasses set `trained`, `tokenizer` and `teacher` before they call this constructor. The wrapper has the plain
    model as `student` and a `load(folder)` that reads what checkpoints hold of it.
    """

    trained: Any
    tokenizer: Any
    teacher: Any
    args: StudentArguments

    # The other dataclasses the run was made from, for run.json.
    settings: Sequence[Any] = ()

    def __init__(self, *, callbacks: list[TrainerCallback] | None = None, **options: Any):
        self._recorded: dict[str, list[Tensor]] = {}
        self.run_record: RunRecord | None = None
        # Of an evaluation that is about to be logged: score -> one value per row, in the direction of the score.
        self.per_row: dict[str, list[float]] = {}
        self.inputs: dict[str, str] = {}
        self._cpu_started = time.process_time()
        self.finite, self.alarms, self.last = FiniteGuard(self), AlarmCallback(self), LastEvaluation(self)
        self.announcement = Announcement(self)
        own = [JsonlCallback(), self.finite, self.alarms, BestCheckpoint(self), self.announcement]
        check_held_out(options["args"], options.get("eval_dataset"))
        patience = options["args"].early_stopping_patience
        stopping = [EarlyStoppingCallback(patience)] if patience else []
        super().__init__(model=self.trained, callbacks=[*own, *stopping, *(callbacks or [])], **options)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(TrainingProgress())
        self.callback_handler.callbacks.insert(0, self.last)  # trackers close their runs when training ends
        check_best_metric(self.args, self.held_out_names)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; with FSDP2 where accelerate's configuration asks for it."""
        super().create_accelerator_and_postprocess()
        if sharding_wanted():
            check_student(self.trained.student)
            shard_with(self.accelerator)
            self.is_fsdp_enabled = True

    def run(self, settings: Sequence[Any] = ()) -> None:
        """A whole job, as the recipes run it: train (or resume), evaluate, save the student, print its path.

        settings: the other dataclasses the run was made from, for run.json and for comparing when it is resumed.
        """
        self.settings = settings
        self.last.wanted, self.announcement.whole_job = self.eval_dataset is not None, True
        with self.writing():
            self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
            self.save_model()
        if self.is_world_process_zero():
            metrics = {name: value for name, value in self.last.metrics.items() if name.startswith("eval_")}
            shown = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in metrics.items())
            what = "model" if self.teacher is None else "student"
            print(f"held-out: {shown or 'no rows'}\n{what} and metrics.jsonl saved in {self.run_folder}")

    def begin_run(self, checkpoint: Path | None) -> None:
        """Write run.json; if the run continues from a checkpoint, first check that it is the same run."""
        super().begin_run(checkpoint)
        self.announcement.checkpoint = checkpoint
        named = [getattr(getattr(model, "config", None), "name_or_path", None) for model in self.models().values()]
        check_run_folder(self.run_folder, named)
        sections = [*self.settings, self.args]
        data = {**self.training_data(), "eval": self.eval_dataset}
        described = {role: describe_data(rows) for role, rows in data.items() if rows is not None}
        if shared := self.shared_inputs():
            described["eval"]["also_in_training"] = shared
        models = {role: model for role, model in self.models().items() if model is not None}
        for role, model in models.items():
            check_finite(model, role, str(getattr(model.config, "name_or_path", None) or "in memory"))
        if not self.inputs:  # of the first call: a later one finds a student that has been trained
            self.inputs = self.on_main(lambda: describe_inputs(self))
        record = RunRecord(
            trainer=type(self).__name__,
            settings=settings_of(sections),
            data=described,
            templates=describe_templates(*data.values()),
            models={
                **({"teacher": elsewhere} if (elsewhere := getattr(self.teacher, "name", None)) else {}),
                **{role: getattr(model.config, "name_or_path", None) or None for role, model in models.items()},
            },
            revisions={
                role: getattr(model.config, "_commit_hash", None) or self.inputs[weights_of(role)]
                for role, model in models.items()
            },
            inputs=self.inputs,
            environment=describe_environment(self.accelerator),
            machine=describe_machine(str(self.accelerator.device)),
            processes=self.accelerator.num_processes,
        )
        if checkpoint is not None:
            record.resume(checkpoint, sections, allow_change=self.args.allow_config_change)
            self.last.distrust_if(bool(record.resumed and record.resumed[-1]["changed"]), checkpoint)
        self.run_record = record
        if self.is_world_process_zero():
            warn_of_ignored(self.args)
            record.write(self.run_folder)

    def training_data(self) -> dict[str, Any]:
        """Role in run.json -> rows that are learned from."""
        return {"train": self.train_dataset}

    def shared_inputs(self) -> int:
        """The number of held-out inputs that are training inputs, too, said in a warning."""
        held_out: Any = self.eval_dataset
        learnt = [] if held_out is None else self.training_data().values()
        shared = sorted({i for rows in learnt for i in shared_inputs(rows, held_out)})
        if shared and self.is_world_process_zero():
            logger.warning(
                f"{len(shared)} of {len(held_out)} held-out inputs are also training inputs (the first is held-out row "
                f"{shared[0]}): scores, alarms and early stopping are not about new inputs. Remove them from one of "
                "the two, or name no held-out data to have a share of the inputs split off."
            )
        return len(shared)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # `eval_on_start`: a resumed run has been evaluated at its start.
        if kwargs.get("skip_scheduler") and self.state.global_step > 0:
            return {}
        return super()._evaluate(*args, **kwargs)

    def refresh_held_out(self) -> None:
        """Write the held-out rows of the student as it is now to held_out.jsonl, in trainers that have one; nothing is
        logged.
        """

    def describe_run(self, steps: int, epochs: float) -> str:
        """One line: what an update is, and how much a run of so many updates and epochs sees."""
        rows, args = len(self.train_dataset), self.args  # type: ignore[arg-type]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return (
            f"an update is on {batch} rows; this run of {steps} updates sees {round(epochs * rows)} rows, "
            f"{epochs:.3g} epochs of {rows}"
        )

    def models(self) -> dict[str, Any]:
        """Role -> plain model, None for a role without a model."""
        return {"teacher": self.teacher, "student": self.trained.student}

    # Logging: losses record detached values; a log line holds their means over all tokens, micro-batches and processes,
    # so it does not depend on how the batch was split.

    def record(self, **values: Tensor | float) -> None:
        """Add numbers to the means written at the next log line; of names ending in `_max`, the largest is written."""
        for name, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float64, device=self.args.device).detach()
            self._recorded.setdefault(name, []).append(torch.stack([number, torch.ones_like(number)]))

    def record_tokens(self, mask: Tensor, **values: Tensor) -> None:
        """Add every token [B, R] of `mask` to the means written at the next log line, as `record` adds numbers."""
        for name, value in values.items():
            if name.endswith("_max"):
                self.record(**{name: value.detach().masked_fill(~mask, 0.0).amax()})
                continue
            pair = torch.stack([(value.detach() * mask).double().sum(), mask.double().sum()])
            self._recorded.setdefault(name, []).append(pair)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._recorded:
            logs.update(self.recorded())
            self._recorded.clear()
        if "train_runtime" in logs:
            logs["train_cpu_seconds"] = time.process_time() - self._cpu_started
        if self.per_row:
            self.alarms.compare(logs, self.per_row)
            self.per_row = {}
        self.alarms.observe(logs)
        super().log(logs, start_time)

    def recorded(self) -> dict[str, float]:
        """What was recorded since the last log line, over all processes; every process must call it."""
        logs = {}
        for name in sorted(self._recorded):
            total, count = torch.stack(self._recorded[name]).T
            if name.endswith("_max"):
                logs[name] = float(self.accelerator.gather(total.max()).max())
            else:
                sums = self.accelerator.reduce(torch.stack([total.sum(), count.sum()]), reduction="sum")
                logs[name] = float(sums[0] / sums[1].clamp(min=1))
        return logs

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """transformers ignores `optim_args` for Adafactor. Here `optim_args: scale_parameter=True` gives steps in
        proportion to each weight matrix, T5's own rule: from random weights AdamW is far slower.
        """
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim == "adafactor" and args.optim_args:
            given = dict(pair.split("=", 1) for pair in args.optim_args.replace(" ", "").split(","))
            kwargs |= {name: bounded_yaml.load(value) for name, value in given.items()}
        return optimizer, kwargs

    # Guards: `finite` stops on non-finite numbers, `alarms` checks the logged numbers.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. Raises DivergenceError for numbers that are not finite, and after an alarm that stops."""
        result = super().train(*args, **kwargs)
        self.alarms.raise_if_stopped()
        return result

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; every process must call it."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), reduction="sum") > 0)

    @contextmanager
    def errors_on_all(self) -> Iterator[None]:
        """An RlkdError raised inside, on any process, is raised on all of them: its own, or the first of the others'.
        Every process must enter.
        """
        error = None
        try:
            yield
        except RlkdError as caught:
            error = caught
        found = [error] if self.accelerator.num_processes == 1 else gather_object([error])
        if raised := [one for one in (error, *found) if one is not None]:
            raise raised[0]

    def held_out_names(self) -> list[str] | None:
        """Names of the numbers an evaluation yields, without `eval_`; None if they are unknown before it runs."""
        return None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.finite.grad_norm = whole(super()._get_grad_norm(model, grad_norm))
        return self.finite.grad_norm

    # Saving: the bare student and, in checkpoints only, the state needed to resume (`resumable.py`).

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer. Raises DivergenceError, and writes nothing, if weights or optimizer state are not finite."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        held = (t for state in states for t in state.values() if isinstance(t, Tensor))
        self.finite.check_weights(chain(self.trained.state_dict().values(), held))
        if _internal_call:  # part of a checkpoint, whose errors are explained where it is written
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir) if output_dir else self.run_folder
        try:
            super().save_model(output_dir, _internal_call)
        except Exception as error:
            raise explained_save(error, folder, self._bytes(student_only=True), checkpoint=False) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # the Trainer calls this on every process
            return
        folder = Path(output_dir) if output_dir else self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        # Of a sharded student the Trainer has gathered the weights here; names of one parameter have one tensor again.
        weights = None if state_dict is None else tied_as(self.trained, state_dict)
        self._save_weights(folder, weights)
        self.tokenizer.save_pretrained(folder)
        self.write_card(folder)

    def _save_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        own = weights and {n.removeprefix("student."): t for n, t in weights.items() if n.startswith("student.")}
        save_student(self.trained.student, folder, self.generation_config(), own)

    def generation_config(self) -> Any:
        """The GenerationConfig to save with the student; None for its own."""
        return None

    def write_card(self, folder: Path) -> None:
        """README.md: the model card of the student as it is now."""
        record = asdict(self.run_record) if self.run_record else {"trainer": type(self).__name__}
        problem = getattr(self.trained.student.config, "problem_type", None)
        write_card(
            folder,
            redacted(record) | chat_record(self.tokenizer) | {"problem_type": problem},
            architecture=type(self.trained.student).__name__,
            scores=self.last.newest(),
            rows=self.held_out_rows,
            step=self.state.global_step,
        )

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Keep our model card, which the Trainer would replace when it pushes to the hub."""
        if self.is_world_process_zero():
            self.write_card(self.run_folder)

    @property
    def held_out_rows(self) -> int | None:
        """Number of evaluated rows; None without held-out rows."""
        return None if self.eval_dataset is None else len(self.eval_dataset)  # type: ignore[arg-type]

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """As in `ResumableTrainer`; run.json is saved next to the student."""
        shutil.copy(self.run_folder / RUN_FILE, folder)
        extras, best = super().save_extras(folder), self.alarms.best_rows
        return extras | {"best_rows": best.state()} if best.evaluations else extras

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.trained.load(folder)
        extras = read_state(folder)
        if "best_rows" in extras:
            self.alarms.best_rows.load_state(extras["best_rows"])
        self.load_extras(extras, folder)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.trained.load(self.state.best_model_checkpoint)
        self.last.best_step = self.state.best_global_step
