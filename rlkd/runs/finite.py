"""Checks for non-finite numbers before the optimizer uses them; the batch is saved.

The checks cost one synchronisation per update, whatever the number of micro-batches and checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ..errors import DivergenceError
from ..io.files import make_folder, write_text
from ..records import Batched
from ..sharding import own_part

DIVERGED_FOLDER = "diverged"
NAMED_ROWS = 5


@dataclass(frozen=True)
class Watched:
    """Checks of one micro-batch: largest magnitude of each value in each row, `peaks` [values, B]; row ids, records."""

    names: list[str]
    peaks: Tensor
    ids: list[str]
    batch: Any

    @classmethod
    def of(cls, values: Mapping[str, Tensor], ids: list[str], batch: Any) -> Watched:
        """Of values [B, ...] or scalars, which count for every row."""
        # NaN and inf survive a maximum of magnitudes.
        peaks = [v.detach().float().reshape(len(ids) if v.dim() else 1, -1).abs().amax(1) for v in values.values()]
        return cls(list(values), torch.stack([peak.expand(len(ids)) for peak in peaks]), ids, batch)

    def problem(self) -> str | None:
        """The first value that is not finite, and its rows; None if all are."""
        for name, bad in zip(self.names, ~self.peaks.isfinite(), strict=True):
            if bad.any():
                return not_finite(name, [self.ids[i] for i in bad.nonzero().flatten().tolist()])
        return None


class FiniteGuard(TrainerCallback):
    """Stops training on every process before a number that is not finite reaches weights, optimizer or checkpoint.

    Raises DivergenceError; the batch is then saved under `diverged/step-N` of the run folder.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.watched: list[Watched] = []
        self.grad_norm: Any = None  # of this update, before clipping

    def watch(self, values: Mapping[str, Tensor], ids: list[str], batch: Any) -> None:
        """Values [B, ...] or scalars that must be finite before the next update; at once outside of training."""
        self.watched.append(Watched.of(values, ids, batch))
        if not self.trainer.is_in_train:
            self._look([])

    def check(self, values: Mapping[str, Tensor], ids: list[str], batch: Any) -> None:
        """Values [B, ...] or scalars that must be finite now; every process calls this equally often."""
        found = Watched.of(values, ids, batch)
        bad = not bool(found.peaks.isfinite().all())
        self._stop_if(found.problem() if bad else None, [found])

    @contextmanager
    def together(self, ids: list[str], batch: Any) -> Iterator[None]:
        """A DivergenceError raised inside, on any process, is raised on all of them; the batch, if any, is written."""
        problem = None
        try:
            yield
        except DivergenceError as error:
            problem = str(error)
        self._stop_if(problem, [] if batch is None else [Watched([], torch.zeros(0), ids, batch)])

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watched.clear()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # A gradient scaler (float16) skips the steps whose gradients overflow, and expects some.
        self._look([] if self.trainer.accelerator.scaler is not None else [torch.as_tensor(self.grad_norm)])

    def _look(self, norms: list[Tensor]) -> None:
        watched, self.watched = self.watched, []
        numbers = [w.peaks.flatten() for w in watched] + [n.detach().float().reshape(1) for n in norms]
        problem = None
        if numbers and not torch.cat([n.to(numbers[0].device) for n in numbers]).isfinite().all():
            bad = [w for w in watched if w.problem()]
            ids = [row for w in watched for row in w.ids]
            problem = bad[0].problem() if bad else not_finite("the gradient", ids)
            watched = bad or watched
        self._stop_if(problem, watched)

    def check_weights(self, tensors: Iterable[Tensor]) -> None:
        """Refuse to save what is not finite. Every process calls this."""
        flags = [own_part(t).isfinite().all() for t in tensors if t.is_floating_point()]
        bad = bool(flags) and not bool(torch.stack([f.to(flags[0].device) for f in flags]).all())
        problem = "weights or optimizer state are not finite, and are not saved" if bad else None
        self._stop_if(problem, [])

    # Stopping

    def _stop_if(self, problem: str | None, watched: list[Watched]) -> None:
        trainer = self.trainer
        step = trainer.state.global_step
        if not trainer.anywhere(problem is not None):
            return
        if problem is None:
            raise DivergenceError(f"another process found a non-finite number at step {step}: see its message")
        problem = f"step {step}: {problem.rstrip('.')}."
        raise DivergenceError(f"{problem} {self._hint()}{self._dump(problem, watched)}")

    def _hint(self) -> str:
        args = self.trainer.args
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in self.trainer.trained.parameters()})
        remedy = "use bfloat16 or float32 (T5 overflows in float16)" if "float16" in kinds else "lower learning_rate"
        return (
            f"No weights were updated and no checkpoint contains it. The student is in {', '.join(kinds)}, "
            f"learning_rate is {args.learning_rate:g}, max_grad_norm {args.max_grad_norm:g}: {remedy}, or resume from "
            "the last checkpoint."
        )

    def _dump(self, problem: str, watched: list[Watched]) -> str:
        """Save the batches; returns where, or why not."""
        trainer = self.trainer
        folder = trainer.run_folder / DIVERGED_FOLDER / f"step-{trainer.state.global_step}"
        rank = f"-process-{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
        try:
            for i, found in enumerate(watched):
                stem = f"batch{rank}{f'-{i}' if len(watched) > 1 else ''}"
                write_batch(folder, stem, found, problem, trainer.tokenizer)
        except OSError as error:
            return f" The batch could not be written to {folder}: {error}"
        return f" The batch is in {folder}." if watched else ""


def not_finite(name: str, ids: list[str]) -> str:
    """What is wrong, with the first few row ids and how many more there are."""
    more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
    return f"{name} is not finite (rows {', '.join(ids[:NAMED_ROWS])}{more})"


def write_batch(folder: Path, stem: str, found: Watched, problem: str, tokenizer: Any) -> None:
    """`stem.safetensors` has every tensor of the batch by its dotted name, `stem.json` ids, texts and the rest."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"problem": problem, "ids": found.ids, "texts": {}}
    for name, value in _leaves("", found.batch):
        if not isinstance(value, Tensor):
            plain[name] = value
            continue
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        if name.endswith(("input_ids", "answer_ids")):
            plain["texts"][name] = tokenizer.batch_decode(value.tolist(), skip_special_tokens=True)
    make_folder(folder)
    save_file(tensors, folder / f"{stem}.safetensors")
    text = json.dumps(plain, ensure_ascii=False, indent=1, default=_plain)
    write_text(folder / f"{stem}.json", text)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of nested records and dictionaries, by dotted name; what is None is left out."""
    if isinstance(value, Batched):
        inner: Iterable[tuple[str, Any]] = ((f.name, getattr(value, f.name)) for f in fields(value))  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        inner = value.items()
    else:
        # A head, for example, is not part of the batch.
        if isinstance(value, (Tensor, list, tuple, str, int, float)):
            yield name, value
        return
    for key, item in inner:
        yield from _leaves(f"{name}.{key}" if name else str(key), item)
