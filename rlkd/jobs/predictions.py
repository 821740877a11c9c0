"""The job of `rlkd predict`: a saved student's answers, or a classifier's classes, written as labels are.

A request is the options of the command as JSON-able values; it is kept in the manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ..labels.classes import ClassifierEngine, ClassifierReader, ClassLabeller
from ..labels.folder import check_output
from ..labels.options import RunOptions
from ..labels.pseudolabels import label_rows
from ..models.encoders.labels import check_problem
from ..models.spec import TeacherSpec
from ..sampling.engines.protocol import Decoding, Engine, EngineSettings
from ..sampling.engines.registry import choose_engine
from .classifiers import CLASSIFIERS_ONLY, SavedClassifier, refuse_options
from .saved import saved_student, warn_of_training, with_lengths
from .wiring import Reading, row_source

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
        check_problem(classifier.config, "model", "single_label_classification", classifier.name)
    spec = None if classifier is not None else _generating(request)
    tokenizer = (classifier or spec).tokenizer  # type: ignore[union-attr]
    warn_of_training(request)
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
            make_engine=lambda: cast(Engine, ClassifierEngine(found.load(), found.classes)),
            kind=ClassLabeller,
        )
    assert spec is not None
    decoding = Decoding("greedy", with_lengths(request)["max_new_tokens"])
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
    model = saved_student(request)
    model.check()
    lengths = with_lengths(request)
    model.check_lengths(lengths["max_input_tokens"], lengths["max_new_tokens"])
    return TeacherSpec(model, lengths["max_input_tokens"])
