"""What every rlkd trainer shares: recording what is logged, stopping at what is not finite, saving the bare student."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..errors import DivergenceError
from ..generation.files import append_text
from .checkpoints import read_state
from .resumable import ResumableTrainer


class JsonlCallback(TrainerCallback):
    """Appends every logged record to metrics.jsonl in the run folder: the local truth, whatever tracker is used."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            append_text(Path(args.output_dir) / "metrics.jsonl", json.dumps(record) + "\n")


class _FiniteGradient(TrainerCallback):
    """Stops before an optimizer step with a gradient that is not finite."""

    def __init__(self, trainer: StudentTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        norms = [p.grad.norm() for p in self.trainer.trained.parameters() if p.grad is not None]
        self.trainer.check_finite("the gradient", torch.stack(norms), ["of this update"])


class StudentTrainer(ResumableTrainer):
    """transformers.Trainer around a wrapped student. Saved models are the bare student and its tokenizer.

    Subclasses set `trained` and `tokenizer` before they call this constructor. The wrapper has the plain model as
    `student` and a `load(folder)` that reads what checkpoints hold of it.
    """

    trained: Any
    tokenizer: Any

    def __init__(self, *, callbacks: list[TrainerCallback] | None = None, **options: Any):
        self._recorded: dict[str, list[Tensor]] = {}
        own = [JsonlCallback(), _FiniteGradient(self)]
        super().__init__(model=self.trained, callbacks=[*own, *(callbacks or [])], **options)

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

    def check_finite(self, name: str, value: Tensor, ids: list[str]) -> None:
        """Raise DivergenceError before a non-finite number reaches the weights."""
        if not torch.isfinite(value).all():
            raise DivergenceError(
                f"{name} is not finite at step {self.state.global_step} (rows {', '.join(ids[:5])}). Nothing was "
                "updated with it. Lower learning_rate, or resume from the last checkpoint."
            )

    # Saving: the bare student; beside it, in checkpoints only, what resuming needs (`resumable.py`).

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir) if output_dir else self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.trained.student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.trained.load(folder)
        self.load_extras(read_state(folder), folder)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.trained.load(self.state.best_model_checkpoint)
