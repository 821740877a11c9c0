"""Teacher answers on disk: a run that can be killed at any moment and loses nothing.

A shard holds the labels of one block of input rows. It is also the look-ahead window: its prompts are answered in order
of length and written in input order. `docs/pseudolabels.md` tells the format.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import DivergenceError, InterruptedRunError, RlkdError
from ..io.cards import CARD
from ..io.files import write_durably
from ..io.lock import Stop, writer_lock
from ..io.progress import progress
from ..models.teacher import Teacher
from ..models.vocabulary import encode_texts
from ..records import Example, PromptedRow, PseudoLabel
from ..sampling.agreement import agreement
from ..sampling.engines.protocol import Decoding, Engine, Strategy
from ..sampling.engines.torch_engine import TorchEngine
from ..sampling.schedule import Budget
from .card import card
from .folder import BAD_ROWS, changes, check_output, clear, refuse
from .labelling import Labeller, OnLong, StoppedError
from .manifest import FORMAT, Manifest, manifest_name
from .sources import ListedExamples, Source
from .store import (
    damage,
    labels_finished,
    load_pseudolabels,
    partial_name,
    read_partial,
    shard_name,
    summarise,
    total,
    write_labels,
)

__all__ = ["RunOptions", "generate_pseudolabels", "label_rows", "labels_finished", "load_pseudolabels"]

logger = logging.getLogger(__name__)

BATCH_TOKENS = Budget().tokens
BAD_BATCH = "not_finite.jsonl"
AGREEMENT_PROMPTS, AGREEMENT_TOKENS = 100, 32


@dataclass(frozen=True)
class RunOptions:
    """How a run is done; none of this but seed and on_long decides a label.

    part                 (i, n): only shards k with k % n == i, for arrays of processes
    allow_config_change  go on with changed settings in an unfinished folder
    request              the command, for `rlkd data repair`
    """

    seed: int = 0
    on_long: OnLong = "truncate"
    batch_tokens: int = BATCH_TOKENS
    shard_rows: int = 5000
    part: tuple[int, int] | None = None
    overwrite: bool = False
    allow_config_change: bool = False
    quiet: bool = False
    request: dict[str, Any] | None = None


def generate_pseudolabels(
    teacher: Teacher,
    examples: Sequence[Example],
    *,
    out: Path,
    strategy: Strategy,
    template_names: list[str],
    max_new_tokens: int,
    labels_per_input: int = 1,
    num_beams: int = 4,
    temperature: float = 1.0,
    top_k_logprobs: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    shard_rows: int = 5000,
    seed: int = 0,
    overwrite: bool = False,
    on_long: OnLong = "truncate",
    engine: Engine | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Label every input under every template: `labels-*.parquet` (rows: PseudoLabel), manifest and data card in `out`.

    Args: template_names, one per teacher input of an example; labels_per_input, samples, or the best hypotheses of
    beam search; num_beams is for beam search, temperature for sampling; batch_tokens, padded tokens of prompts
    and answers decoded together, which changes no answer; top_k_logprobs, how many of the teacher's best tokens to keep
    at each position; engine, by default the teacher in PyTorch. sum_logprob is always at temperature 1.
    Returns: totals (rows, counts by status, template and reason). Raises: as `label_rows`; ConfigError for settings
    that contradict each other.
    """
    decoding = Decoding(strategy, max_new_tokens, labels_per_input, num_beams, temperature, top_k_logprobs)
    check_output(out, overwrite=overwrite)
    options = RunOptions(seed, on_long, batch_tokens, shard_rows, overwrite=overwrite, quiet=quiet)
    source = ListedExamples(examples, template_names)
    return label_rows(teacher, source, out=out, decoding=decoding, options=options, engine=engine)


def label_rows(
    teacher: Teacher,
    source: Source,
    *,
    out: Path,
    decoding: Decoding | None,
    options: RunOptions,
    engine: Engine | None = None,
    reference: Callable[[], Engine] | None = None,
    lock: Path | None = None,
) -> dict[str, Any]:
    """Label all rows of a source, or the rest of them if `out` holds an unfinished run of the same settings.

    decoding: None to rank the answer choices that the source's prompts carry.
    reference: makes the full-precision engine that an approximate one is compared with; by default the teacher itself
    in PyTorch.
    lock: what `writer_lock` gave, if the caller holds the lock of this output already.
    Returns: totals. Raises: DataError if `out` is taken or its settings differ, LockedError if another process writes
    there, DivergenceError if log-probabilities are not finite, InterruptedRunError after a signal, RlkdError if the
    disk is full. What was committed stays in all these cases.
    """
    engine = engine or TorchEngine(teacher.lm, teacher.batch_tokens)
    reference = reference or (lambda: TorchEngine(teacher.lm, teacher.batch_tokens))
    run = _Run(teacher, source, Path(out), decoding, options, engine, reference)
    with writer_lock(run.log) if lock is None else nullcontext():
        return run()


@dataclass
class _Run:
    teacher: Teacher
    source: Source
    out: Path
    decoding: Decoding | None
    options: RunOptions
    engine: Engine
    reference: Callable[[], Engine]

    def __call__(self) -> dict[str, Any]:
        part = self.options.part
        manifest = check_output(self.out, overwrite=self.options.overwrite, part=part)
        if self.options.overwrite:
            clear(self.out, part)
        self._open(manifest)
        self._drop_damaged(manifest)
        started, before = time.monotonic(), self._labels(manifest)
        self._make(manifest, before)
        totals = total(list(manifest.shards.values())) | {"bad_rows": len(self.header["scan"].get("bad", []))}
        write_durably(self.out / CARD, card(manifest.header, totals).encode())
        manifest.append("finished", **totals)
        seconds = round(time.monotonic() - started, 1)
        return totals | {"made": totals["rows"] - before, "seconds": seconds, "settings": self.header["settings"]}

    @property
    def log(self) -> Path:
        return self.out / manifest_name(self.options.part)

    @cached_property
    def header(self) -> dict[str, Any]:
        """First line of the log."""
        options = self.options
        settings = {
            "source": self.source.identity(),
            "templates": [[name, key, _digest(text)] for name, key, text in self.source.templates],
            "engine": self.engine.name,
            **self.engine.identity(),
            "max_input_tokens": self.teacher.max_input_tokens,
            "append_eos": self.teacher.append_eos,
            "on_long": options.on_long,
            **self._decoding_settings(),
        }
        return {
            "format": FORMAT,
            "generation": _digest(json.dumps(settings, sort_keys=True)),
            "settings": settings,
            "rows_per_shard": max(options.shard_rows // self.labels_per_row, 1),
            "part": list(options.part) if options.part else None,
            "scan": self.source.scan,
            "packages": packages(),
            "request": options.request,
        }

    def _decoding_settings(self) -> dict[str, Any]:
        """Null for what the strategy does not use."""
        if self.decoding is None:
            return {"strategy": "rank"}
        strategy = self.decoding.strategy
        return asdict(self.decoding) | {
            "num_beams": self.decoding.num_beams if strategy == "beam" else None,
            "temperature": self.decoding.temperature if strategy == "sample" else None,
            "seed": self.options.seed if strategy == "sample" else None,
        }

    @property
    def labels_per_row(self) -> int:
        return len(self.source.templates) * (self.decoding.labels_per_input if self.decoding else 1)

    @property
    def top_k(self) -> bool:
        return self.decoding is not None and self.decoding.top_k_logprobs > 0

    def _open(self, manifest: Manifest) -> None:
        """Start the log, or make sure that it is of these settings."""
        header = json.loads(json.dumps(self.header))
        if manifest.headers:
            old = manifest.header
            changed = changes(old["settings"], header["settings"])
            layout = [
                f"  shard_rows, templates or labels_per_input: {old['rows_per_shard']} input rows in a shard -> "
                f"{header['rows_per_shard']}"
            ]
            if old["rows_per_shard"] != header["rows_per_shard"]:
                refuse(self.out, layout + changed, "")
            if changed and not self.options.allow_config_change:
                refuse(self.out, changed, "pass --allow-config-change to go on with the new ones, ")
            if not changed:
                return
            logger.warning("%s: goes on with changed settings:\n%s", self.out, "\n".join(changed))
        if self.source.bad_rows:
            lines = [json.dumps(bad, ensure_ascii=False) + "\n" for bad in self.source.bad_rows]
            write_durably(self.out / BAD_ROWS, "".join(lines).encode())
        if not self.engine.exact and (measured := self._agreement()):
            header["agreement"] = measured
        manifest.append("header", **header)

    def _agreement(self) -> dict[str, float] | None:
        """How closely an engine of lower precision follows the teacher, on the first prompts."""
        rows = next(rows for _, rows in self.source.blocks(AGREEMENT_PROMPTS, lambda k: k == 0))
        texts = [prompt.text for row in rows for prompt in row.prompts if prompt.text][:AGREEMENT_PROMPTS]
        if not texts:
            return None
        teacher = self.teacher
        prompts = encode_texts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
        decoding = self.decoding or Decoding("greedy", AGREEMENT_TOKENS)
        measured = agreement(self.engine, self.reference(), prompts, decoding, Budget(self.options.batch_tokens))
        logger.warning(
            "%s is an approximation of the teacher: of %d greedy answers %.1f %% are the same, log-probabilities "
            "differ by %.4f nats per token", self.engine.name, len(prompts), 100 * measured["exact_match"],
            measured["mean_abs_delta_logprob"],
        )  # fmt: skip
        return measured

    def _drop_damaged(self, manifest: Manifest) -> None:
        if manifest.damaged:
            logger.warning("%s: %d damaged lines; what they said is done again", manifest.path, len(manifest.damaged))
        problems = {k: problem for k, shard in manifest.shards.items() if (problem := damage(self.out, shard))}
        for problem in problems.values():
            logger.warning("%s: this shard is made again", problem)
        if problems:
            manifest.append("dropped", shards=list(problems))

    def _labels(self, manifest: Manifest) -> int:
        return sum(shard["rows"] for shard in manifest.shards.values())

    def _expected(self) -> int | None:
        """Label rows of this part."""
        if self.source.total is None:
            return None
        size, (i, n) = self.header["rows_per_shard"], self.options.part or (0, 1)
        blocks = range(i * size, self.source.total, n * size)
        return sum(min(size, self.source.total - first) for first in blocks) * self.labels_per_row

    def _make(self, manifest: Manifest, before: int) -> None:
        """Make and commit the shards that the log lacks."""
        i, n = self.options.part or (0, 1)
        identity = self.engine.identity()
        made = (str(identity.get("teacher")), identity.get("revision") or identity.get("teacher_weights"))
        size, expected = self.header["rows_per_shard"], self._expected()
        with Stop() as stop, progress(expected, before, quiet=self.options.quiet) as advance, _frozen_heap():
            labeller = Labeller(
                self.teacher,
                self.engine,
                self.decoding,
                [(name, key) for name, key, _ in self.source.templates],
                (*made, self.header["generation"]),
                self.options.seed,
                Budget(self.options.batch_tokens),
                self.options.on_long,
                advance,
                lambda: stop.signum is not None,
            )
            for k, rows in self.source.blocks(size, lambda k: k % n == i and k not in manifest.shards):
                try:
                    labels = labeller.shard(rows, self._partial(manifest, k))
                except StoppedError as stopped:
                    self._keep(manifest, k, stopped.labels)
                    self._end(stop, manifest)
                except DivergenceError as error:
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in error.batch]
                    write_durably(self.out / BAD_BATCH, "".join(lines).encode())
                    raise DivergenceError(f"{error} The batch is in {self.out / BAD_BATCH}.") from error
                self._commit(manifest, k, rows, labels)
                if stop.signum is not None:
                    self._end(stop, manifest)

    def _commit(self, manifest: Manifest, k: int, rows: list[PromptedRow], labels: list[PseudoLabel]) -> None:
        checksum = write_labels(self.out / shard_name(k), labels, top_k=self.top_k)
        manifest.append(
            "shard",
            shard=k,
            file=shard_name(k),
            first_row=rows[0].number,
            inputs=len(rows),
            rows=len(labels),
            sha256=checksum,
            generation=self.header["generation"],
            **summarise(labels),
        )
        (self.out / partial_name(k)).unlink(missing_ok=True)

    def _partial(self, manifest: Manifest, k: int) -> dict[int, PseudoLabel]:
        """Answers that an interrupted run kept of this shard, if they are whole and of these settings."""
        entry = manifest.partials.get(k)
        if not entry or entry["generation"] != self.header["generation"] or damage(self.out, entry):
            return {}
        return read_partial(self.out / entry["file"])

    def _keep(self, manifest: Manifest, k: int, labels: dict[int, PseudoLabel]) -> None:
        positions = sorted(labels)
        # The answers in hand are a saving, not a promise: a disk that is full must not hide why the run ends.
        with suppress(RlkdError):
            checksum = write_labels(
                self.out / partial_name(k),
                [labels[position] for position in positions],
                positions=positions,
                top_k=self.top_k,
            )
            manifest.append(
                "partial",
                shard=k,
                file=partial_name(k),
                rows=len(labels),
                sha256=checksum,
                generation=self.header["generation"],
            )

    def _end(self, stop: Stop, manifest: Manifest) -> None:
        kept = sum(partial["rows"] for partial in manifest.partials.values())
        signum = stop.signum or signal.SIGTERM
        raise InterruptedRunError(
            f"stopped by {signal.Signals(signum).name}: {self._labels(manifest)} labels are committed in {self.out}, "
            f"{kept} more are kept. Repeat the command to go on.",
            signum,
        )


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """What is loaded stays: the garbage collector would look through all of it for every few thousand rows made."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def packages() -> dict[str, str]:
    """Versions of what made the labels."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("rlkd", "torch", "transformers", "datasets", "pyarrow")
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
