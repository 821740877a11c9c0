"""One run that labels a source: shard by shard, each committed before the next begins.

A shard holds the labels of one block of input rows. It is also the look-ahead window: its prompts are answered in order
of length and written in input order.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.flaws import FlawCounts
from ..errors import DivergenceError, InterruptedRunError, RlkdError, ServerError
from ..io.cards import CARD
from ..io.files import write_durably
from ..io.lock import Stop
from ..io.progress import progress
from ..io.redaction import redacted
from ..io.versions import VARIABLES, changed_versions, code_digest, describe_machine, variables
from ..models.chat import chat_record
from ..models.digests import tokenizer_digest
from ..models.languages import languages_of
from ..models.spec import default_device
from ..models.vocabulary import encode_prompts, vocabulary_record
from ..records import PromptedRow, PseudoLabel
from ..sampling.agreement import agreement
from ..sampling.engines.protocol import Decoding, Engine
from ..sampling.schedule import Budget
from .card import card
from .folder import BAD_BATCH, BAD_ROWS, changes, check_output, clear, refuse
from .integrity import damage, total
from .labelling import Labeller, PromptReader, StoppedError
from .manifest import FORMAT, Manifest, partial_name, shard_name
from .options import RunOptions
from .sources import Source
from .store import read_partial, summarise, write_labels

logger = logging.getLogger(__name__)

AGREEMENT_PROMPTS, AGREEMENT_TOKENS = 100, 32


@dataclass
class Run:
    """The source, the engine and the folder of a run; arguments as in `label_rows`, which has locked the folder. kind:
    of what makes a shard's labels.
    """

    teacher: PromptReader
    source: Source
    out: Path
    decoding: Decoding | None
    options: RunOptions
    engine: Engine
    reference: Callable[[], Engine] | None = None
    kind: type[Labeller] = Labeller

    def __call__(self) -> dict[str, Any]:
        """Label what the log lacks. Returns totals."""
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

    @cached_property
    def header(self) -> dict[str, Any]:
        """First line of the log."""
        options = self.options
        settings = redacted(
            {
                "source": self.source.identity(),
                "templates": template_settings(self.source.templates),
                "engine": self.engine.name,
                **self.engine.identity(),
                "tokenizer": tokenizer_digest(self.teacher.tokenizer),
                "max_input_tokens": self.teacher.max_input_tokens,
                "append_eos": self.teacher.append_eos,
                **chat_record(self.teacher.tokenizer),
                **languages_of(self.teacher.tokenizer),
                "on_long": options.on_long,
                **self._decoding_settings(),
            }
        )
        return {
            "format": FORMAT,
            "generation": digest_of(json.dumps(settings, sort_keys=True)),
            "settings": settings,
            "vocabulary": vocabulary_record(self.teacher.tokenizer),
            "rows_per_shard": max(options.shard_rows // self.labels_per_row, 1),
            "part": list(options.part) if options.part else None,
            "scan": self.source.scan,
            "packages": packages(),
            "environment": {"rlkd's code": code_digest(), **describe_machine(default_device()), **variables()},
            "request": redacted(options.request),
        }

    def _decoding_settings(self) -> dict[str, Any]:
        """Settings that the strategy does not use are null."""
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
        """Start the log, or check that the one there has these settings."""
        header = json.loads(json.dumps(self.header))
        if manifest.headers:
            old = manifest.header
            changed = changes(old["settings"], header["settings"])
            layout = [
                f"  shard_rows, templates or labels_per_input: {old['rows_per_shard']} input rows per shard -> "
                f"{header['rows_per_shard']}"
            ]
            if other := changed_versions(*(_surroundings(found) for found in (old, header))):
                logger.warning(
                    "%s was begun by other versions or another machine: %s. Labels may differ in places from those of "
                    "one run", self.out, ", ".join(other),
                )  # fmt: skip
            if old["rows_per_shard"] != header["rows_per_shard"]:
                refuse(self.out, layout + changed, "")
            if changed and not self.options.allow_config_change:
                refuse(self.out, changed, "pass --allow-config-change to continue with the new ones, ")
            if not changed:
                return
            logger.warning("%s: continuing with changed settings:\n%s", self.out, "\n".join(changed))
        if self.source.bad_rows:
            lines = [json.dumps(bad, ensure_ascii=False, default=str) + "\n" for bad in self.source.bad_rows]
            # Half a surrogate pair is escaped as JSON does it.
            write_durably(self.out / BAD_ROWS, "".join(lines).encode("utf-8", "backslashreplace"))
        if not self.engine.exact and self.reference and (measured := self._agreement(self.reference)):
            header["agreement"] = measured
        manifest.append("header", **header)

    def _agreement(self, reference: Callable[[], Engine]) -> dict[str, float] | None:
        """How closely an engine of lower precision follows the full-precision one, on the first prompts."""
        rows = next(rows for _, rows in self.source.blocks(AGREEMENT_PROMPTS, lambda k: k == 0))
        texts = [prompt.text for row in rows for prompt in row.prompts if prompt.text][:AGREEMENT_PROMPTS]
        if not texts:
            return None
        teacher = self.teacher
        prompts = encode_prompts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
        decoding = self.decoding or Decoding("greedy", AGREEMENT_TOKENS)
        measured = agreement(self.engine, reference(), prompts, decoding, Budget(self.options.batch_tokens))
        logger.warning(
            "%s approximates the teacher: of %d greedy answers, %.1f %% are the same; log-probabilities differ by %.4f "
            "nats per token on average", self.engine.name, len(prompts), 100 * measured["exact_match"],
            measured["mean_abs_delta_logprob"],
        )  # fmt: skip
        return measured

    def _drop_damaged(self, manifest: Manifest) -> None:
        if manifest.damaged:
            logger.warning(
                "%s: %d damaged lines; what they recorded will be redone", manifest.path, len(manifest.damaged)
            )
        problems = {k: problem for k, shard in manifest.shards.items() if (problem := damage(self.out, shard))}
        for problem in problems.values():
            logger.warning("%s: this shard will be regenerated", problem)
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
        """Compute and commit the shards that are not in the log."""
        i, n = self.options.part or (0, 1)
        identity = redacted(self.engine.identity())
        made = (str(identity.get("teacher")), identity.get("revision") or identity.get("teacher_weights"))
        size, expected = self.header["rows_per_shard"], self._expected()
        with Stop() as stop, progress(expected, before, quiet=self.options.quiet) as advance, _frozen_heap():
            labeller = self.kind(
                teacher=self.teacher,
                engine=self.engine,
                decoding=self.decoding,
                templates=[(name, key) for name, key, _ in self.source.templates],
                made=(*made, self.header["generation"]),
                seed=self.options.seed,
                budget=Budget(self.options.batch_tokens),
                on_long=self.options.on_long,
                advance=advance,
                stopping=lambda: stop.signum is not None,
            )
            for k, rows in self.source.blocks(size, lambda k: k % n == i and k not in manifest.shards):
                try:
                    labels = labeller.shard(rows, self._partial(manifest, k))
                except StoppedError as stopped:
                    self._keep(manifest, k, stopped.labels)
                    if stopped.__cause__ is not None:
                        raise ServerError(f"{stopped.__cause__} {self._kept(manifest)}") from stopped.__cause__
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
        flaws = FlawCounts()
        flaws.add_rows(rows, [name for name, *_ in self.source.templates])
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
            **({"flaws": counted} if (counted := flaws.to_json()) else {}),
        )
        (self.out / partial_name(k)).unlink(missing_ok=True)

    def _partial(self, manifest: Manifest, k: int) -> dict[int, PseudoLabel]:
        """Answers of this shard saved by an interrupted run, if they are intact and have these settings."""
        entry = manifest.partials.get(k)
        if not entry or entry["generation"] != self.header["generation"] or damage(self.out, entry):
            return {}
        return read_partial(self.out / entry["file"])

    def _keep(self, manifest: Manifest, k: int, labels: dict[int, PseudoLabel]) -> None:
        positions = sorted(labels)
        # Saving them only saves work: a full disk here must not hide why the run ends.
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
        signum = stop.signum or signal.SIGTERM
        raise InterruptedRunError(f"stopped by {signal.Signals(signum).name}: {self._kept(manifest)}", signum)

    def _kept(self, manifest: Manifest) -> str:
        """What a run that ends early leaves, in words."""
        kept = sum(partial["rows"] for partial in manifest.partials.values())
        return (
            f"{self._labels(manifest)} labels are committed in {self.out}, {kept} more are saved. Repeat the command "
            "to continue."
        )


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exempt loaded objects from garbage collection, which would scan them all for every few thousand rows made."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def template_settings(templates: list[tuple[str, str, str]]) -> list[list[str]]:
    """(name, id, fingerprint) of templates as the log has them."""
    return [[name, key, digest_of(text)] for name, key, text in templates]


def _surroundings(header: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(VARIABLES), **header["packages"], **header.get("environment", {})}


def packages() -> dict[str, str]:
    """Versions of the packages that decide labels."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("rlkd", "torch", "transformers", "datasets", "pyarrow")
    }


def digest_of(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
