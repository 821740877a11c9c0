"""The job of `rlkd generate-pseudolabels`, from a request: its options as JSON-able values, kept in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..labels.folder import check_output
from ..labels.maintenance import part_of
from ..labels.options import RunOptions
from ..labels.pseudolabels import label_rows
from ..models.server import ServerSettings
from ..models.spec import TeacherSpec
from ..sampling.engines.protocol import Decoding, EngineSettings
from ..sampling.engines.registry import choose_engine
from ..sampling.ranking import choice_problem
from ..templates.template import Template
from .wiring import Reading, row_source, teacher_spec


def label(
    request: dict[str, Any],
    out: Path,
    *,
    overwrite: bool = False,
    allow_config_change: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Label as requested. Checks come in order of cost: settings and folder; the teacher's configuration, tokenizer and
    engine; templates; rows. Weights load last.

    Returns: totals. Raises: what `label_rows` raises; ModelError, DataError or ConfigError before weights load.
    """
    decoding = _decoding(request)
    part = part_of(request["shard"]) if request["shard"] else None
    manifest = check_output(out, overwrite=overwrite, part=part)
    server = _server(request)
    teacher = teacher_spec(request)
    engine = EngineSettings(request["engine"], request["compute_type"] or None, server=server)
    choice = choose_engine(engine, teacher.model, decoding)
    source = Reading.of(request, teacher.tokenizer).prompted_rows(
        row_source(request),
        with_choices=decoding is None,
        earlier=manifest.header["scan"] if manifest.headers else None,
    )
    if decoding is None:
        _check_choices(source.render.templates, teacher)
    options = RunOptions(
        seed=request["seed"],
        on_long=request["on_long"],
        batch_tokens=request["batch_tokens"],
        shard_rows=request["shard_rows"],
        part=part,
        overwrite=overwrite,
        allow_config_change=allow_config_change,
        quiet=quiet,
        request=request,
    )
    return label_rows(
        teacher,
        source,
        out=out,
        decoding=decoding,
        options=options,
        make_engine=choice.make,
        reference=choice.reference,
    )


def _server(request: dict[str, Any]) -> ServerSettings | None:
    """Where the teacher is served, None without a URL. Raises ConfigError for its settings with another engine."""
    names = ("server_url", "server_api", "server_model", "server_concurrency", "server_timeout")
    given = {name: request[name] for name in names if request.get(name) is not None}
    if given and request["engine"] != "openai":
        raise ConfigError(f"{next(iter(given))} is set, and engine is '{request['engine']}': set engine to openai.")
    if "server_url" not in given:
        return None
    return ServerSettings(**{name.removeprefix("server_"): value for name, value in given.items()})


def _check_choices(templates: Sequence[Template], teacher: TeacherSpec) -> None:
    """Raise ConfigError for a template whose answer choices, the same for all rows, have the same tokens or none."""
    for template in templates:
        choices = template.fixed_choices
        if choices is not None and (problem := choice_problem(teacher.tokenizer, choices, rules=teacher.rules)):
            raise ConfigError(
                f"strategy = 'rank': {template}: {problem}, so no answer can be chosen. Change its answer_choices."
            )


def _decoding(request: dict[str, Any]) -> Decoding | None:
    """How answers are decoded; None if choices are ranked."""
    settings = {name: request[name] for name in ("labels_per_input", "num_beams", "temperature", "top_k_logprobs")}
    if request["strategy"] != "rank":
        return Decoding(request["strategy"], request["max_new_tokens"], **settings)
    if settings["labels_per_input"] > 1 or settings["top_k_logprobs"]:
        raise ConfigError(
            "strategy = 'rank' gives one label and its choices' scores: leave out labels_per_input and top_k_logprobs."
        )
    return None
