"""The job of `rlkd predict`: a saved student's answers, or a classifier's classes, written as labels are.

A request is the options of the command as JSON-able values; it is kept in the manifest.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..labels.classes import ClassifierEngine, ClassifierReader, ClassLabeller
from ..labels.folder import check_output
from ..labels.options import RunOptions
from ..labels.pseudolabels import label_rows
from ..models.spec import ModelSpec, TeacherSpec, default_device
from ..runs.record import RunRecord
from ..sampling.engines.protocol import Decoding, EngineSettings
from ..sampling.engines.registry import choose_engine
from .classifiers import CLASSIFIERS_ONLY, SavedClassifier, refuse_options
from .wiring import Reading, row_source

logger = logging.getLogger(__name__)
MAX_INPUT_TOKENS, MAX_NEW_TOKENS = 512, 64
# Options without effect with a classifier, and their defaults.
GENERATING_ONLY = {"max_new_tokens": None, "engine": "auto", "dtype": "float32", "src_lang": None, "tgt_lang": None,
                   "student_chat": None, "student_system_prompt": None}  # fmt: skip


def predict(request: dict[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    """Answer or classify every row; the model's kind decides. Checks come in order of cost; weights load last.

    how: overwrite, allow_config_change, quiet, as in `RunOptions`. Returns: totals. Raises: what `label_rows` raises;
    ModelError, DataError or ConfigError before weights load.
    """
    manifest = check_output(out, overwrite=how.get("overwrite", False))
    classifier = SavedClassifier.of(request)
    if classifier is not None:
        refuse_options(request, GENERATING_ONLY, "a classifier")
    spec = None if classifier is not None else _generating(request)
    tokenizer = (classifier or spec).tokenizer  # type: ignore[union-attr]
    _warn_of_training(request)
    source = Reading.of({**request, "templates": []}, tokenizer).prompted_rows(
        row_source(request), earlier=manifest.header["scan"] if manifest.headers else None
    )
    settings: dict[str, Any] = {name: request[name] for name in ("seed", "batch_tokens", "shard_rows")}
    options = RunOptions(**settings, **how, request=request)
    if classifier is not None:
        found = classifier
        return label_rows(
            ClassifierReader(tokenizer, found.max_length, pairs=request["pair_column"] is not None),
            source,
            out=out,
            decoding=None,
            options=options,
            make_engine=lambda: ClassifierEngine(found.load(), found.classes),
            kind=ClassLabeller,
        )
    assert spec is not None
    decoding = Decoding("greedy", request["max_new_tokens"] or MAX_NEW_TOKENS)
    choice = choose_engine(EngineSettings(request["engine"]), spec.model, decoding)
    return label_rows(
        spec,
        source,
        out=out,
        decoding=decoding,
        options=options,
        make_engine=choice.make,
        reference=choice.reference,
    )


def _generating(request: dict[str, Any]) -> TeacherSpec:
    """The generating model; it reads prompts as a student does. Raises ModelError or ConfigError."""
    refuse_options(request, CLASSIFIERS_ONLY, "a generating model, which reads one text")
    model = ModelSpec(
        request["model"],
        "student",
        dtype=request["dtype"],
        device=default_device(),
        allow_bin=bool(request["allow_bin"]),
        src_lang=request["src_lang"],
        tgt_lang=request["tgt_lang"],
        chat=request["student_chat"],
        system_prompt=request["student_system_prompt"],
    )
    model.check()
    longest = request["max_input_tokens"] or MAX_INPUT_TOKENS
    model.check_lengths(longest, request["max_new_tokens"] or MAX_NEW_TOKENS)
    return TeacherSpec(model, longest)


def _warn_of_training(request: dict[str, Any]) -> None:
    """Say where the run that made the model gave it other inputs, or longer ones, than it is to read now."""
    record = RunRecord.read(Path(request["model"]))
    if record is None:
        return
    limits = {"max_input_tokens": MAX_INPUT_TOKENS, "max_new_tokens": MAX_NEW_TOKENS}
    pairs = {name: (record.settings.get(name), request[name] or limits[name]) for name in limits}
    pairs = {name: (then, now) for name, (then, now) in pairs.items() if then is not None}
    if "student_template" in record.settings:
        pairs["student_template"] = (record.settings["student_template"], request["student_template"])
    if "pair_column" in record.settings:
        pairs["pair_column"] = (record.settings["pair_column"], request["pair_column"])
    changed = [f"{name} {then} (now {now})" for name, (then, now) in pairs.items() if then != now]
    if changed:
        logger.warning("'%s' was trained with %s", request["model"], ", ".join(changed))
