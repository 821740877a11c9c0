"""Teacher answers on disk: parquet shards in input order, and a manifest written last.

A shard is also the look-ahead window: its rows are decoded in order of prompt length and written in input order. Shards
of an interrupted run are kept if the settings and their rows are the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, DivergenceError
from ..models.teacher import Teacher
from ..models.vocabulary import encode_texts
from ..records import Example, PseudoLabel
from .decode import row_seed
from .engines import Answer, Decoding, Engine, Strategy, TorchEngine
from .label_store import (
    Job,
    check_output,
    holds,
    load_pseudolabels,
    open_folder,
    sha256,
    write_manifest,
    write_shard,
)

__all__ = ["generate_pseudolabels", "load_pseudolabels"]

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


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
    batch_size: int = 16,
    shard_rows: int = 5000,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Label every input under every template: `labels-*.parquet` (rows: PseudoLabel), then manifest.json, in `out`.

    Args: template_names, one per teacher input of an example; labels_per_input, samples, or the best hypotheses of
    beam search; num_beams is for beam search, temperature for sampling; batch_size, answers decoded together, which
    does not change them. sum_logprob is always at temperature 1.
    Returns: the manifest. Raises: ConfigError for settings that contradict each other, DataError if `out` is taken,
    DivergenceError if the teacher's log-probabilities are not finite.
    """
    decoding = Decoding(strategy, max_new_tokens, labels_per_input, num_beams, temperature)
    check_output(out, overwrite=overwrite)
    if len(examples) == 0:
        raise DataError("there are no examples to label.")
    engine = TorchEngine(teacher.adapter, teacher.batch_tokens)
    settings = _settings(teacher, engine, template_names, decoding, seed) | {
        "inputs": len(examples),
        "shard_rows": shard_rows,
    }
    open_folder(out, settings)
    jobs = _jobs(examples, template_names, labels_per_input)
    # The labels of one prompt are made together.
    window = max(shard_rows // labels_per_input, 1) * labels_per_input
    shards: list[dict[str, Any]] = []
    started = time.monotonic()
    with _progress(len(examples) * len(template_names) * labels_per_input) as advance:
        while batch := list(islice(jobs, window)):
            path = out / f"labels-{len(shards):05d}.parquet"
            if holds(path, batch):
                advance(len(batch), 0)
            else:
                write_shard(path, _label(teacher, engine, batch, decoding, batch_size, seed, advance))
            shards.append({"file": path.name, "rows": len(batch), "sha256": sha256(path)})
    return write_manifest(out, shards, settings, seconds=round(time.monotonic() - started, 1))


def _settings(
    teacher: Teacher, engine: Engine, template_names: list[str], decoding: Decoding, seed: int
) -> dict[str, Any]:
    """All that decides the labels of given inputs; None for what the strategy does not use."""
    strategy = decoding.strategy
    return {
        "engine": engine.name,
        **engine.identity(),
        "max_input_tokens": teacher.max_input_tokens,
        "append_eos": teacher.append_eos,
        "templates": template_names,
        **asdict(decoding),
        "num_beams": decoding.num_beams if strategy == "beam" else None,
        "temperature": decoding.temperature if strategy == "sample" else None,
        "seed": seed if strategy == "sample" else None,
    }


def _jobs(examples: Sequence[Example], template_names: list[str], labels_per_input: int) -> Iterator[Job]:
    for i in range(len(examples)):
        example = examples[i]
        for name, text in zip(template_names, example.teacher_inputs, strict=True):
            for sample in range(labels_per_input):
                yield Job(example.id, name, text, example.student_input, list(example.references), sample)


def _label(
    teacher: Teacher,
    engine: Engine,
    jobs: list[Job],
    decoding: Decoding,
    batch_size: int,
    seed: int,
    advance: Callable[[int, int], None],
) -> list[PseudoLabel]:
    """Answers to all jobs, made in order of prompt length, returned in the given order."""
    n = decoding.labels_per_input
    groups = [jobs[i : i + n] for i in range(0, len(jobs), n)]
    texts = [group[0].teacher_input for group in groups]
    prompts = encode_texts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
    order = sorted(range(len(groups)), key=lambda i: len(prompts[i]), reverse=True)
    size = max(batch_size // n, 1)
    labels: list[list[PseudoLabel]] = [[] for _ in groups]
    for start in range(0, len(groups), size):
        rows = order[start : start + size]
        seeds = [[row_seed(seed, job.id, job.template, job.sample) for job in groups[i]] for i in rows]
        answers = engine.answer([prompts[i] for i in rows], seeds, decoding)
        _check_finite(teacher, [groups[i][0].id for i in rows], answers)
        for i, made in zip(rows, answers, strict=True):
            for job, answer in zip(groups[i], made, strict=True):
                text = teacher.tokenizer.decode(
                    answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                labels[i].append(
                    PseudoLabel(
                        **asdict(job),
                        label=text,
                        token_ids=answer.ids,
                        sum_logprob=math.fsum(answer.logps),
                        finished=answer.finished,
                    )
                )
        advance(len(rows) * n, sum(len(answer.ids) for made in answers for answer in made))
    return [label for group in labels for label in group]


def _check_finite(teacher: Teacher, ids: list[str], answers: list[list[Answer]]) -> None:
    bad = [i for i, made in zip(ids, answers, strict=True) if not all(math.isfinite(sum(a.logps)) for a in made)]
    if bad:
        raise DivergenceError(
            f"the teacher's log-probabilities are not finite for {len(bad)} of {len(ids)} inputs: "
            f"{', '.join(bad[:5])}. Its weights are {teacher.adapter.model.dtype}: use bfloat16 or float32 "
            "for T5 models. No label was written for them."
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A function of (rows, tokens) made: a bar on a terminal, a log line every 30 s elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}  left"), TimeRemainingColumn())
    with Progress("labels", *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("labels", total=total, rate="")
        rows = tokens = made = 0
        started = logged = time.monotonic()

        def advance(new_rows: int, new_tokens: int) -> None:
            nonlocal rows, tokens, made, logged
            rows, tokens, made = rows + new_rows, tokens + new_tokens, made + (new_rows if new_tokens else 0)
            now = time.monotonic()
            seconds = max(now - started, 1e-9)
            rate = f"{made / seconds:.1f} rows/s  {tokens / seconds:.0f} tokens/s"
            bar.update(task, advance=new_rows, rate=rate)
            if bar.disable and (now - logged >= LOG_SECONDS or rows == total):
                left = (total - rows) * seconds / max(made, 1)
                logger.info("labels %d/%d  %s  %.0f s left", rows, total, rate, left)
                logged = now

        yield advance
