"""Teacher answers on disk: a run that can be killed at any moment and loses nothing.

`docs/pseudolabels.md` describes the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..io.lock import writer_lock
from ..models.spec import LoadedModel, ModelSource, TeacherSpec
from ..models.teacher import Teacher
from ..records import Example
from ..sampling.engines.protocol import Decoding, Engine, EngineSettings
from ..sampling.engines.registry import EngineChoice, choose_engine
from .folder import check_output
from .labelling import Labeller, PromptReader
from .manifest import manifest_name
from .options import RunOptions
from .run import Run
from .sources import ListedExamples, Source


def generate_pseudolabels(
    teacher: Teacher | TeacherSpec,
    examples: Sequence[Example],
    *,
    out: str | Path,
    template_names: list[str],
    decoding: Decoding,
    engine: EngineSettings | Engine | None = None,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Label every input under every template: `labels-*.parquet` (rows: PseudoLabel), manifest and data card in `out`.

    Args:
        teacher: in memory, or by name: then the engine loads what it needs.
        template_names: one per teacher input of an example.
        decoding: how answers are decoded. sum_logprob of a label is at temperature 1 whatever the decoding.
        engine: which of `ENGINES`, or one in memory; by default PyTorch.
    Returns: totals (rows, counts by status, template and reason). Raises: as `label_rows`; before any weights load,
    ModelError if the teacher cannot take its role, and ConfigError if the engine cannot do what is asked.
    """
    out, options = Path(out), options or RunOptions()
    check_output(out, overwrite=options.overwrite, part=options.part)
    source = ListedExamples(examples, template_names)
    if isinstance(teacher, TeacherSpec):
        teacher.model.check()
        teacher.model.check_lengths(teacher.max_input_tokens, decoding.max_new_tokens)
        model: ModelSource = teacher.model
        torch = EngineSettings("torch")
    else:
        model, torch = LoadedModel(teacher.lm), EngineSettings("torch", batch_tokens=teacher.batch_tokens)
    if engine is None or isinstance(engine, EngineSettings):
        choice = choose_engine(engine or torch, model, decoding)
        make: Callable[[], Engine] = choice.make
    else:
        choice, make = EngineChoice("torch", model, torch), lambda: engine
    return label_rows(
        teacher, source, out=out, decoding=decoding, options=options, make_engine=make, reference=choice.reference
    )


def label_rows(
    teacher: PromptReader,
    source: Source,
    *,
    out: Path,
    decoding: Decoding | None,
    options: RunOptions,
    make_engine: Callable[[], Engine],
    reference: Callable[[], Engine] | None = None,
    kind: type[Labeller] = Labeller,
) -> dict[str, Any]:
    """Label all rows of a source, or the rest of them if `out` holds an unfinished run of the same settings.

    Args:
        teacher: how prompts become token ids.
        decoding: None to rank the answer choices that the source's prompts carry.
        make_engine: called once the folder is locked, so that a second writer is refused before it loads weights.
        reference: makes the full-precision engine that one of lower precision is compared with.
        kind: what makes the labels of a shard.
    Returns: totals. Raises: DataError if `out` is taken or its settings differ, LockedError if another process writes
    there, DivergenceError if log-probabilities are not finite, InterruptedRunError after a signal, RlkdError if the
    disk is full. Committed shards are kept in all these cases.
    """
    with writer_lock(out / manifest_name(options.part)):
        return Run(teacher, source, out, decoding, options, make_engine(), reference, kind)()
