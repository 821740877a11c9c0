"""The job of `rlkd evaluate`: a saved model on rows, written as a run folder that reports compare."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.evaluator import Evaluator, TaskMetric
from ..evaluation.problems import PROBLEMS
from ..evaluation.task_metrics import check_task_metric, references_of, task_metric_of
from ..io.folders import refuse_other_contents
from ..io.progress import progress
from ..models.digests import weights_digest
from ..models.footprint import count_parameters, megabytes
from ..models.loading import check_finite
from ..models.policy import Policy
from ..models.spec import paired
from ..records import Example
from ..runs.files import HELD_OUT, METRICS, RUN_FILE, append_lines, keep_first_and_last
from ..runs.record import RunRecord, describe_data, describe_templates
from ..sampling.rollouts import greedy_answers
from .class_evaluation import classified_rows_of, evaluate_classes
from .classifiers import CLASSIFIERS_ONLY, SavedClassifier, refuse_options
from .saved import LIMITS, saved_student, warn_of_training, with_lengths
from .wiring import Reading, local_teacher, row_source, teacher_spec

logger = logging.getLogger(__name__)
FILES = (RUN_FILE, METRICS, HELD_OUT, "evaluation.json")
TRAINER = "evaluate"  # in run.json, in the place of a trainer's class
# Options without effect with a classifier, and their defaults.
GENERATING_ONLY = {
    "metric": "none", "student_template": None, "teacher": None, "templates": None, "max_new_tokens": None,
    "dtype": "float32", "teacher_dtype": "float32", "input_eos": None, "src_lang": None, "tgt_lang": None,
    "column_map": None, "label_map": None, "id_column": None, "seed": 0, "teacher_chat": None,
    "teacher_system_prompt": None, "student_chat": None, "student_system_prompt": None,
}  # fmt: skip
TIMED_INPUTS = 16  # answered one by one; the median of their seconds is the latency


@dataclass(frozen=True)
class Evaluation:
    """rows, how many; numbers, by their names in `rlkd.metrics`; per_row, the scores of each row, by the same names;
    limits, the lengths that texts are cut to; speed, size and speed of the model; classes, what else there is to say of
    a classifier (`class_facts`).
    """

    rows: int
    numbers: dict[str, float]
    per_row: dict[str, list[float]]
    limits: dict[str, int]
    speed: dict[str, float]
    classes: dict[str, Any] = field(default_factory=dict)


def evaluate(request: dict[str, Any], out: Path, *, quiet: bool = False) -> Evaluation:
    """Answer every row greedily and by sampling, or classify it, score the answers, and write a run folder to `out`:
    run.json, metrics.jsonl and held_out.jsonl. Checks come in order of cost; weights load last.

    Raises ModelError, DataError or ConfigError, each before weights load.
    """
    _check_folder(request, out)
    classifier = SavedClassifier.of(request)
    warn_of_training(request)
    if classifier is not None:
        return _evaluate_classes(request, out, classifier)
    refuse_options(request, CLASSIFIERS_ONLY, "a generating model, which reads one text")
    return _evaluate_answers(with_lengths(request), out, quiet=quiet)


def _evaluate_answers(request: dict[str, Any], out: Path, *, quiet: bool) -> Evaluation:
    """As `evaluate`, of a generating model."""
    metric = _check(request)
    model = saved_student(request)
    model.check()
    model.check_lengths(request["max_input_tokens"], request["max_new_tokens"])
    teacher = teacher_spec(request) if request["teacher"] else None
    if teacher is not None and (said := paired(teacher.model, model)):
        logger.info("%s", said)
    examples = Reading.of(request, model.tokenizer).examples(row_source(request))
    if check_task_metric(request["metric"]):
        references_of(examples)

    evaluator = Evaluator(
        None if teacher is None else local_teacher(teacher, model),
        model.tokenizer,
        examples,
        request["max_input_tokens"],
        request["max_new_tokens"],
        metric,
        batch_rows=request["batch_rows"],
        seed=request["seed"],
    )
    evaluator.check(None)
    policy = Policy(model.language_model(), critic=False)
    check_finite(policy.student, "student", model.name)
    policy.eval()
    with progress(len(examples), what="evaluation", quiet=quiet) as advance:
        rows = evaluator.rows(policy, None, range(len(examples)), advance)
    found = evaluator.summarise(rows)
    numbers = {name: value for name, value in found.items() if name.removeprefix("sample_") != "kl"}  # to no reference
    models = {"student": policy.student, "teacher": None if evaluator.teacher is None else evaluator.teacher.model}
    _write(request, out, rows, numbers, models, examples)
    limits = {name: request[name] for name in LIMITS}
    return Evaluation(len(examples), numbers, evaluator.per_row, limits, _speed(policy, evaluator))


def _evaluate_classes(request: dict[str, Any], out: Path, classifier: SavedClassifier) -> Evaluation:
    """As `evaluate`, of a classifier: input_column and pair_column have the texts (or words),
    reference_column their labels."""
    refuse_options(request, GENERATING_ONLY, "a classifier")
    if request["reference_column"] is None:
        raise ConfigError("--reference-column is not set: name the column with the right label of each text.")
    rows = classified_rows_of(request, classifier)
    found = evaluate_classes(classifier, rows, request["batch_rows"])
    _write(request, out, found.rows, found.numbers, {"student": found.model, "teacher": None}, found.texts)
    score, _ = PROBLEMS[classifier.problem_type].by_row
    per_row = {score: [row[score] for row in found.rows]}
    limits = {"max_input_tokens": classifier.max_length}
    return Evaluation(len(found.rows), found.numbers, per_row, limits, found.speed, found.classes)


def _check_folder(request: dict[str, Any], out: Path) -> None:
    """Raise ConfigError for a folder of something else, or of an evaluation that is not to be replaced."""
    refuse_other_contents(out, "--out", signs=(RUN_FILE,), own=FILES)
    if (out / RUN_FILE).exists():
        record = RunRecord.read(out)
        if record is None or record.trainer != TRAINER:
            raise ConfigError(f"--out {out} holds a run that is no evaluation. Name a new folder.")
        if not request["overwrite"]:
            raise ConfigError(f"--out {out} holds an evaluation. Name a new folder, or give --overwrite to replace it.")


def _check(request: dict[str, Any]) -> TaskMetric | None:
    """The task metric. Raises ConfigError for options that contradict each other."""
    if check_task_metric(request["metric"]) and request["reference_column"] is None:
        raise ConfigError(f"--metric {request['metric']}: needs --reference-column, the answers to compare with.")
    if request["templates"] and not request["teacher"]:
        raise ConfigError("--templates are what --teacher reads: name it. The model reads --student-template.")
    for name in ("teacher_chat", "teacher_system_prompt"):
        if request[name] is not None and not request["teacher"]:
            raise ConfigError(f"--{name.replace('_', '-')} is of the prompts of --teacher: name it.")
    return task_metric_of(request["metric"])


def _speed(policy: Policy, evaluator: Evaluator) -> dict[str, float]:
    """Size, and how fast greedy answers come: tokens per second of a batch, and the median latency of single inputs."""
    limits: dict[str, Any] = {
        "max_input_tokens": evaluator.max_input_tokens,
        "max_new_tokens": evaluator.max_new_tokens,
    }

    def timed(examples: Sequence[Example]) -> tuple[float, int]:
        started = time.perf_counter()
        answers = greedy_answers(policy, evaluator.tokenizer, list(examples), **limits)
        return time.perf_counter() - started, int(answers.answer_mask.sum())

    some = evaluator.examples[: evaluator.batch_rows]
    timed(some[:1])  # warms up
    seconds, tokens = timed(some)
    return {
        "parameters": count_parameters(policy.student),
        "megabytes": megabytes(policy.student),
        "tokens_per_second": tokens / seconds,
        "milliseconds_per_input": 1000 * statistics.median(timed([one])[0] for one in some[:TIMED_INPUTS]),
    }


def _write(
    request: dict[str, Any],
    out: Path,
    rows: list[dict[str, Any]],
    numbers: dict[str, float],
    models: dict[str, Any],
    data: Any,
) -> None:
    """The three files, as a trainer's evaluation at step 0 has them. models: role -> model with its weights, or None;
    data: what was evaluated on, as `describe_data` takes it.
    """
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in request.items()}
    keep_first_and_last(out / HELD_OUT, 0, rows)
    append_lines(out / METRICS, [{"step": 0, **{f"eval_{name}": value for name, value in numbers.items()}}])
    described = describe_data(data)
    described["source"] = described["source"] or request["dataset"]
    RunRecord(
        trainer=TRAINER,
        settings=plain,
        data={"eval": described},
        templates=describe_templates(data),
        models={"student": request["model"], "teacher": request["teacher"]},
        revisions={role: None if model is None else weights_digest(model) for role, model in models.items()},
    ).write(out)
