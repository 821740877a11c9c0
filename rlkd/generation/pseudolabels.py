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
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, DivergenceError
from ..models.teacher import Teacher
from ..models.vocabulary import encode_texts
from ..records import Example, PseudoLabel
from ..tensors import length_mask, pad_stack
from .decode import decode, greedy, row_seed, sampler
from .label_store import (
    Job,
    check_output,
    holds,
    load_pseudolabels,
    open_folder,
    sha256,
    weights_digest,
    write_manifest,
    write_shard,
)

__all__ = ["Strategy", "check_settings", "generate_pseudolabels", "load_pseudolabels"]

logger = logging.getLogger(__name__)

Strategy = Literal["greedy", "beam", "sample"]
LOG_SECONDS = 30.0
# token ids (end-of-sequence included), their log-probability under the teacher, and whether the answer is complete
Answer = tuple[list[int], float, bool]


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
    beam search; num_beams is for beam search, temperature for sampling; batch_size, answers decoded together (inputs
    for beam search), which does not change them. sum_logprob is always at temperature 1.
    Returns: the manifest. Raises: ConfigError for settings that contradict each other, DataError if `out` is taken,
    DivergenceError if the teacher's log-probabilities are not finite.
    """
    check_settings(strategy, labels_per_input, num_beams, temperature)
    check_output(out, overwrite=overwrite)
    if len(examples) == 0:
        raise DataError("there are no examples to label.")
    settings = _settings(
        teacher, strategy, template_names, labels_per_input, num_beams, temperature, max_new_tokens, seed
    ) | {"inputs": len(examples), "shard_rows": shard_rows}
    open_folder(out, settings)

    def answer(jobs: list[Job]) -> list[Answer]:
        if strategy == "beam":
            return _beam(teacher, jobs, labels_per_input, num_beams, max_new_tokens)
        return _decode(teacher, jobs, strategy, temperature, max_new_tokens, seed)

    # Beam search makes all labels of an input at once, so a batch counts inputs.
    group = labels_per_input if strategy == "beam" else 1
    jobs = _jobs(examples, template_names, labels_per_input)
    window = max(shard_rows // group, 1) * group
    shards: list[dict[str, Any]] = []
    started = time.monotonic()
    with _progress(len(examples) * len(template_names) * labels_per_input) as advance:
        while batch := list(islice(jobs, window)):
            path = out / f"labels-{len(shards):05d}.parquet"
            if holds(path, batch):
                advance(len(batch), 0)
            else:
                write_shard(path, _label(teacher, batch, answer, batch_size * group, group, advance))
            shards.append({"file": path.name, "rows": len(batch), "sha256": sha256(path)})
    return write_manifest(out, shards, settings, seconds=round(time.monotonic() - started, 1))


def check_settings(strategy: str, labels_per_input: int, num_beams: int, temperature: float) -> None:
    """Raise ConfigError for settings that contradict each other; needs no model."""
    if strategy not in get_args(Strategy):
        raise ConfigError(f"strategy = '{strategy}': allowed are {', '.join(get_args(Strategy))}.")
    if labels_per_input < 1 or (strategy == "greedy" and labels_per_input > 1):
        raise ConfigError(
            f"labels_per_input = {labels_per_input} with strategy = '{strategy}': greedy decoding has one answer. "
            "Use 1, or strategy sample or beam."
        )
    if strategy == "beam" and not 1 < num_beams >= labels_per_input:
        raise ConfigError(
            f"num_beams = {num_beams} with labels_per_input = {labels_per_input}: beam search needs "
            "at least 2 beams and no fewer beams than labels. Raise num_beams."
        )
    if temperature <= 0 or (strategy != "sample" and temperature != 1.0):
        raise ConfigError(
            f"temperature = {temperature} with strategy = '{strategy}': it must be above 0 and only sampling uses it. "
            "Leave it at 1, or use strategy sample."
        )


def _settings(
    teacher: Teacher,
    strategy: Strategy,
    template_names: list[str],
    labels_per_input: int,
    num_beams: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """All that decides the labels of given inputs; None for what the strategy does not use."""
    model = teacher.adapter.model
    return {
        "teacher": model.name_or_path,
        "teacher_weights": weights_digest(model),
        "dtype": str(model.dtype),
        "max_input_tokens": teacher.max_input_tokens,
        "append_eos": teacher.append_eos,
        "templates": template_names,
        "strategy": strategy,
        "labels_per_input": labels_per_input,
        "num_beams": num_beams if strategy == "beam" else None,
        "temperature": temperature if strategy == "sample" else None,
        "max_new_tokens": max_new_tokens,
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
    jobs: list[Job],
    answer: Callable[[list[Job]], list[Answer]],
    batch_size: int,
    group: int,
    advance: Callable[[int, int], None],
) -> list[PseudoLabel]:
    """Answers to all jobs, made in order of prompt length, returned in the given order."""
    texts = [job.teacher_input for job in jobs]
    prompts = encode_texts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
    # Groups (the labels of one input) are adjacent and of one length: sorting by (length, group) keeps them whole.
    order = sorted(range(len(jobs)), key=lambda i: (len(prompts[i]), i // group, i), reverse=True)
    labels: list[PseudoLabel | None] = [None] * len(jobs)
    for start in range(0, len(jobs), batch_size):
        rows = order[start : start + batch_size]
        rows.sort()
        answers = answer([jobs[i] for i in rows])
        bad = [jobs[i].id for i, (_, logprob, _) in zip(rows, answers, strict=True) if not math.isfinite(logprob)]
        if bad:
            raise DivergenceError(
                f"the teacher's log-probabilities are not finite for {len(bad)} of {len(rows)} answers: "
                f"{', '.join(bad[:5])}. Its weights are {teacher.adapter.model.dtype}: use bfloat16 or float32 "
                "for T5 models. No label was written for them."
            )
        for i, (ids, logprob, finished) in zip(rows, answers, strict=True):
            text = teacher.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            labels[i] = PseudoLabel(
                **asdict(jobs[i]), label=text, token_ids=ids, sum_logprob=logprob, finished=finished
            )
        advance(len(rows), sum(len(ids) for ids, _, _ in answers))
    return labels  # type: ignore[return-value]


def _decode(
    teacher: Teacher, jobs: list[Job], strategy: Strategy, temperature: float, max_new_tokens: int, seed: int
) -> list[Answer]:
    seeds = [row_seed(seed, job.id, job.template, job.sample) for job in jobs]
    choose = greedy if strategy == "greedy" else sampler(seeds, max_new_tokens, teacher.adapter.device)
    states = teacher.encode([job.teacher_input for job in jobs])
    decoded = decode(teacher.adapter, states, choose, max_new_tokens=max_new_tokens, temperature=temperature)
    logps = decoded.logps.double() if temperature == 1.0 else _token_logps(teacher, jobs, decoded.ids, decoded.mask)
    ids = [row[mask].tolist() for row, mask in zip(decoded.ids, decoded.mask, strict=True)]
    return list(zip(ids, logps.sum(1).tolist(), decoded.finished.tolist(), strict=True))


@torch.no_grad()
def _beam(
    teacher: Teacher, jobs: list[Job], labels_per_input: int, num_beams: int, max_new_tokens: int
) -> list[Answer]:
    """The best `labels_per_input` hypotheses of each input, best first; labels of one input are adjacent jobs."""
    from transformers import GenerationConfig

    adapter = teacher.adapter
    texts = [job.teacher_input for job in jobs[::labels_per_input]]
    prompts = encode_texts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
    input_ids, mask = adapter.pad_prompts(prompts)
    with _own_generation_config(adapter.model):
        sequences = adapter.model.generate(
            input_ids=input_ids,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(
                num_beams=num_beams,
                num_return_sequences=labels_per_input,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                decoder_start_token_id=adapter.start_id,
                eos_token_id=adapter.eos_id,
                pad_token_id=adapter.pad_id,
                # Rows beyond the tokenizer (T5 pads its embedding) are no tokens.
                suppress_tokens=list(range(adapter.valid_vocab, adapter.config.vocab_size)) or None,
            ),
        )
    rows, finished = [], []
    for row in sequences[:, 1:].tolist():
        finished.append(adapter.eos_id in row)
        rows.append(row[: row.index(adapter.eos_id) + 1] if finished[-1] else row)
    ids = pad_stack([torch.tensor(row) for row in rows], adapter.pad_id).to(adapter.device)
    answer_mask = length_mask([len(row) for row in rows]).to(adapter.device)
    logps = _token_logps(teacher, jobs, ids, answer_mask)
    return list(zip(rows, logps.sum(1).tolist(), finished, strict=True))


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation defaults (BART's n-gram ban ...), which would merge into ours."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _token_logps(teacher: Teacher, jobs: list[Job], ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability [B, R] of each given token under the teacher at temperature 1, float64, 0 at padding."""
    scores = teacher.score([(job.teacher_input,) for job in jobs], ids, mask, ids=[job.id for job in jobs])
    return scores.chosen.double() - scores.logsumexp.double()


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
