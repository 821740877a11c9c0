"""Resumable runs: one writer, complete checkpoints, a graceful stop on signals, exact resumption."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..errors import CheckpointError, InterruptedRunError, RlkdError
from ..io.files import check_folder
from ..io.lock import Stop, writer_lock
from ..sharding import load_optimizer_state, whole_optimizer_state
from .checkpoints import (
    RESUME,
    STATE_FILE,
    UNFINISHED,
    checkpoint_path,
    clear_unfinished,
    commit,
    explained_save,
    find_checkpoint,
    log_sizes,
    read_state,
    requested,
    rewind,
)
from .trackers import survive_outages

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _GracefulStop(TrainerCallback):
    """After a signal: saves the next checkpoint that can be resumed from, then stops."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer, self.signum = trainer, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.run_folder.is_dir():
            raise RlkdError(
                f"{self.trainer.run_folder} was removed while this run was writing to it: stopped at step "
                f"{state.global_step}. Restore the folder and repeat the command with {RESUME}, or start anew."
            )
        if state.global_step % self.trainer.steps_between_checkpoints == 0:
            self.signum = self.trainer.signal_received()
            control.should_save = control.should_save or self.signum > 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signum:
            folder = checkpoint_path(self.trainer.run_folder, state.global_step)
            raise InterruptedRunError(
                f"stopped by {Signals(self.signum).name}: {folder} is saved. Continue with {RESUME}.",
                self.signum,
            )


class ResumableTrainer(Trainer):
    """transformers.Trainer with checkpoints that are complete or absent, and resumed runs equal to uninterrupted ones.

    Raises LockedError while another process writes the run folder, CheckpointError for a checkpoint that cannot be
    resumed, InterruptedRunError after SIGTERM or SIGINT (a checkpoint is saved), RlkdError when the disk is full.
    """

    # Checkpoints can only be saved at multiples of this many steps.
    steps_between_checkpoints = 1

    def __init__(self, **options: Any):
        self._stop = Stop()
        self._writing = False
        self._unfinished: Path | None = None
        check_folder(Path(str(options["args"].output_dir)))  # which the Trainer creates now
        super().__init__(**options)
        self.add_callback(_GracefulStop(self))
        survive_outages(self.callback_handler.callbacks)

    @property
    def run_folder(self) -> Path:
        """Where metrics, samples, checkpoints and the final student go."""
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. resume_from_checkpoint: a checkpoint's folder; True or "auto": the run's newest intact one, or
        a new run if it has none.
        """
        run, wanted = self.run_folder, requested(resume_from_checkpoint)
        with self.writing(), Stop() as self._stop:
            checkpoint = self.on_main(lambda: find_checkpoint(wanted, run))
            self.begin_run(checkpoint)
            self.on_main(lambda: rewind(run, checkpoint) if wanted else clear_unfinished(run))
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def begin_run(self, checkpoint: Path | None) -> None:
        """Before anything is loaded or written. Raises CheckpointError if this run cannot resume that checkpoint."""
        if checkpoint is not None:
            self.check_resumable(checkpoint)

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        # The Trainer would take one more step of a finished run, whether it reached its end or its patience was spent.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**options)

    # One writer, several processes

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run folder. Raises LockedError, on every process, if another run does."""
        if self._writing:
            yield
            return
        with ExitStack() as held:
            self.on_main(lambda: held.enter_context(writer_lock(self.run_folder / "run")))
            self._writing = True
            try:
                yield
            finally:
                self._writing = False

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns or raises on the main process, on every process."""
        if self.accelerator.num_processes == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def signal_received(self) -> int:
        """The signal that any of the processes received, 0 for none; the same on each of them."""
        signum = self._stop.signum or 0
        if self.accelerator.num_processes == 1:
            return signum
        return int(self.accelerator.gather(torch.tensor([signum], device=self.args.device)).max())

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the Trainer write to a temporary folder, then make it the checkpoint; older ones are deleted after
        that.
        """
        final = checkpoint_path(self.run_folder, self.state.global_step)
        try:
            self._write_checkpoint(model, trial, final)
        except Exception as error:
            if not self.args.should_save:
                raise
            raise explained_save(error, final, self._bytes()) from error
        if self.args.should_save:
            rotate_checkpoints(str(self.run_folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, model: Any, trial: Any, final: Path) -> None:
        if self.args.should_save:
            clear_unfinished(self.run_folder)
        self.accelerator.wait_for_everyone()
        self._unfinished = self.run_folder / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            written, self._unfinished = self._unfinished / final.name, None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / "trainer_state.json"))
            commit(written, final)
        self.accelerator.wait_for_everyone()

    def _bytes(self, *, student_only: bool = False) -> int:
        """Size of the tensors in a checkpoint, or of the student alone."""
        assert self.model is not None
        if student_only or self.optimizer is None:
            return sum(tensor.nbytes for tensor in self.model.state_dict().values())
        moments = (value for entry in self.optimizer.state_dict()["state"].values() for value in entry.values())
        tensors = [*self.model.state_dict().values(), *(value for value in moments if isinstance(value, torch.Tensor))]
        return sum(tensor.nbytes for tensor in tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Called for resumable checkpoints only, after the student was written.
        if self.is_fsdp_enabled:  # whole tensors: runs that are not sharded, or otherwise, read the same files
            state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
                torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(self.save_extras(Path(output_dir)), indent=2))

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """JSON-able state beyond weights, optimizer, scheduler and RNG; tensors go to files in `folder`."""
        return {
            "trainer": type(self).__name__,
            "processes": self.accelerator.num_processes,
            "micro_batches": self._micro_batches,
            "logs": log_sizes(self.run_folder),
        }

    # Resuming

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_optimizer_state(self.optimizer, optimizer)
        cast(Any, self.lr_scheduler).load_state_dict(scheduler)

    def check_resumable(self, checkpoint: Path) -> None:
        """Raise CheckpointError if this run cannot resume that checkpoint."""
        state, here = read_state(checkpoint), type(self).__name__
        if state["trainer"] != here:
            raise CheckpointError(
                f"{checkpoint} was written by {state['trainer']}, not by {here}: give another output_dir, or start "
                "from that checkpoint's student instead of resuming it"
            )
        then, now = state["processes"], self.accelerator.num_processes
        if then == now:
            return
        micro_batches = state.get("micro_batches")
        if micro_batches != self._micro_batches:
            steps = None if micro_batches is None or micro_batches % now else micro_batches // now
            raise CheckpointError(
                f"{checkpoint} was written by {then} processes, this run has {now}: updates would be on other rows. "
                + ("Resume" if steps is None else f"Set gradient_accumulation_steps: {steps}, or resume")
                + " with as many processes, or start a new run from its student."
            )
        if self.is_world_process_zero():
            logger.warning(
                f"{checkpoint} was written by {then} processes and goes on with {now}: the updates are on the same "
                "micro-batches, whose gradients are summed in another order, so the run is not the same bit for bit"
            )

    @property
    def _micro_batches(self) -> int:
        """Micro-batches of an update, over all processes."""
        return self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        """Restore what `save_extras` returned and wrote; the student is already loaded."""
