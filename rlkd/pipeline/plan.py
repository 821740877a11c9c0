"""The stages of `rlkd distill`: which commands, with which settings. The rules for what nobody set are here alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import ConfigError, RlkdError
from ..jobs.teachers import check_other_vocabulary
from ..jobs.training import TRAINING_JOBS
from ..settings.parsing import parse_config
from .arguments import SMALL, DistillArguments
from .models import Pair, encoder_length, teacher_dtype
from .rows import PROMPT_FILE, Rows, choices_of, first_template, templates_of

# The recommended method after the warm-up, and its settings (recipes/studies, docs/method.md).
RL = "ppo"
RL_SETTINGS = {
    "reward_value": "max", "one_step": "exact", "lam": 0.2, "kl_coef": 0.05, "baseline": "leave_one_out",
    "rollouts_per_prompt": 2, "epochs_per_rollout": 2, "minibatches_per_rollout": 2,
}  # fmt: skip
OTHER_VOCABULARY = {"one_step": "sampled"}  # the exact term reads the teacher's whole distribution
UPDATES_PER_ROLLOUT, PROMPTS_PER_ROLLOUT = 4, 32
# Learning rates are inversely proportional to the width of the student: of T5-base, 768, they are 3.3e-4, 6.5e-5 and,
# of encoders, 5.2e-5.
WARM_UP_RATE, RL_RATE, ENCODER_RATE = 0.25, 0.05, 0.04
ROWS, ACCUMULATED = 16, 2  # of one forward and backward; of one update
NEGATED = ("input_eos", "teacher_chat", "student_chat")  # flags whose default is neither
TRAINING = ("warm-up", "rl", "training")


@dataclass(frozen=True)
class Stage:
    """One step, whose results are the folder of its name below `out`.

    command   words of the command, without its settings; () for what only distill does
    settings  of that command by name; paths below `out` are Path objects
    depends   what else its results depend on
    """

    name: str
    command: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    depends: Mapping[str, Any] = field(default_factory=dict)

    def words(self, out: Path) -> list[str]:
        """The arguments of `rlkd`; `write_settings` has written the file that they may name."""
        if self.command[0] == "train":
            return [*self.command, "--config", str(self.settings_file(out))]
        return [*self.command, *(word for name, value in self.settings.items() for word in _flag(name, value))]

    def settings_file(self, out: Path) -> Path:
        return out / f"{self.name}.yaml"

    def write_settings(self, out: Path) -> None:
        """The YAML file of a training stage."""
        if self.command and self.command[0] == "train":
            plain = {name: _plain(value) for name, value in self.settings.items()}
            text = (
                f"# Made by rlkd distill. By hand: rlkd {' '.join(self.command)} --config {self.settings_file(out)}\n"
            )
            self.settings_file(out).write_text(text + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def record(self, out: Path) -> dict[str, Any]:
        """What its results depend on, as JSON; the same wherever `out` is."""
        return {name: _plain(value, out) for name, value in {**self.settings, **self.depends}.items()}


def _flag(name: str, value: Any) -> Iterator[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        if value or name in NEGATED:
            yield option if value else option.replace("--", "--no-", 1)
    elif isinstance(value, (list, tuple)):
        yield from (f"{option}={one}" for one in value)
    elif value is not None:
        yield f"{option}={value}"


def _plain(value: Any, out: Path | None = None) -> Any:
    """A value without paths, those below `out` as they are seen from there."""
    if isinstance(value, Path):
        return str(value.relative_to(out)) if out is not None and value.is_relative_to(out) else str(value)
    return [_plain(one, out) for one in value] if isinstance(value, (list, tuple)) else value


def stages(args: DistillArguments, pair: Pair, rows: Rows, digests: Mapping[str, Any]) -> list[Stage]:
    """All stages in their order. digests: of what the names in the settings stand for.

    Raises ConfigError for settings of a training stage that cannot work.
    """
    own = {
        name: getattr(args, name)
        for name in ("data", "prompt", "answer_choices", "templates", "student_template", "input_column",
                     "reference_column", "column_map", "test_data", "eval_fraction", "eval_rows", "limit", "on_bad_row",
                     "delimiter", "encoding", "columns", "seed")
    }  # fmt: skip
    found = [Stage("data", settings=own, depends={k: v for k, v in digests.items() if "model" not in k})]
    if args.student == SMALL:
        found.append(Stage("start", settings={"student": SMALL}, depends={"teacher model": digests["teacher model"]}))
    found += (_encoder_stages if pair.encoder else _stages)(args, pair, rows, digests)
    for stage in found:
        if stage.name in TRAINING:
            check_training(stage, pair)
    return found


def _stages(args: DistillArguments, pair: Pair, rows: Rows, digests: Mapping[str, Any]) -> Iterator[Stage]:
    """Of a generating student."""
    out = Path(args.out)
    student: Any = out / "start" if args.student == SMALL else args.student
    depends = {"student model": digests["student model"]}
    labels = {**_labels(args, out), "dataset": out / "data/train.parquet", "strategy": "greedy", "out": out / "labels"}
    labels |= {"reference_column": rows.reference_column, "max_new_tokens": args.max_new_tokens}
    yield Stage("labels", ("generate-pseudolabels",), labels, {"teacher model": digests["teacher model"]})
    shared = {**_training(args, out), "reference_column": rows.reference_column}
    shared["task_metric"] = args.task_metric if rows.reference_column else "none"
    steps = max(-(-len(rows.train) // (ROWS * ACCUMULATED)), 1)  # of an epoch
    every = min(max(steps, 50), 200)
    warm_up = {
        **shared,
        "model_name_or_path": student,
        "pseudo_labels": out / "labels",
        "output_dir": out / "warm-up",
        "until_ready": True,
        "metric_for_best_model": "sample_regret",  # what the start check measures
        "learning_rate": round(WARM_UP_RATE / pair.width, 7),
        "max_steps": max(20 * steps, 2000),
        "eval_steps": every,
        "save_steps": every,
    }
    yield Stage("warm-up", ("train", "seqkd"), _with(warm_up, "warm_up", args.warm_up), depends)
    updates = min(max(UPDATES_PER_ROLLOUT * len(rows.train) // PROMPTS_PER_ROLLOUT, 100), 2000)
    every = max(updates // 10 // UPDATES_PER_ROLLOUT, 5) * UPDATES_PER_ROLLOUT
    rl = {
        **shared,
        "model_name_or_path": out / "warm-up",
        "output_dir": out / "rl",
        **RL_SETTINGS,
        **({} if pair.said is None else OTHER_VOCABULARY),
        "learning_rate": round(RL_RATE / pair.width, 8),
        "warmup_steps": UPDATES_PER_ROLLOUT,
        "max_steps": updates // UPDATES_PER_ROLLOUT * UPDATES_PER_ROLLOUT,
        "eval_steps": every,
        "save_steps": every,
        "eval_on_start": True,
        "weak_start": "warn",
    }
    yield Stage("rl", ("train", RL), _with(rl, "rl", args.rl))
    for role in ("teacher", "warm-up", "rl"):
        yield _evaluation(role, args, out)
    yield Stage("student", settings={"weak_start": args.weak_start})


def _evaluation(role: str, args: DistillArguments, out: Path) -> Stage:
    """The evaluation of the teacher, the student after the warm-up or after RL, on the test rows. As the model that is
    evaluated, the teacher reads its own first prompt.
    """
    settings = {
        "dataset": out / "data/test.parquet",
        "input_column": args.input_column,
        "student_template": args.student_template,
        "metric": args.task_metric,
        "reference_column": args.reference_column,
        "max_input_tokens": args.max_input_tokens,
        "max_new_tokens": args.max_new_tokens,
        "allow_bin": args.allow_bin,
        "seed": args.seed,
        "out": out / "evaluation" / role,
        "overwrite": True,
        "quiet": True,
    }
    if role == "teacher":
        own = {
            "student_template": first_template(args, out / "data"),
            "student_chat": args.teacher_chat,
            "student_system_prompt": args.teacher_system_prompt,
            "dtype": teacher_dtype(args),
        }
        return Stage(f"evaluation/{role}", ("evaluate", args.teacher), {**settings, **own})
    scored: dict[str, Any] = {
        "teacher": args.teacher,
        "teacher_dtype": teacher_dtype(args),
        "input_eos": args.input_eos,
        "templates": _templates(args, out),
        **_chat(args, "teacher"),
        **_chat(args, "student"),
    }
    return Stage(f"evaluation/{role}", ("evaluate", str(out / role)), {**settings, **scored})


def _encoder_stages(args: DistillArguments, pair: Pair, rows: Rows, digests: Mapping[str, Any]) -> Iterator[Stage]:
    """Of an encoder: the teacher ranks the answer choices for every row, and their probabilities are soft targets."""
    out = Path(args.out)
    for part in ("train", "validation", "test"):
        name = "labels" if part == "train" else f"labels-{part}"
        ranked = {**_labels(args, out), "dataset": out / f"data/{part}.parquet", "strategy": "rank", "out": out / name}
        # The student learns from the teacher alone.
        ranked["reference_column"] = {"validation": rows.reference_column, "test": args.reference_column}.get(part)
        yield Stage(name, ("generate-pseudolabels",), ranked, {"teacher model": digests["teacher model"]})
    yield Stage("held-out")
    steps = max(-(-len(rows.train) // ROWS), 1)
    training = {
        "pseudo_labels": out / "labels",
        "dev_file": out / "held-out/validation.parquet",
        "test_files": [out / "held-out/test.parquet"],
        "labels": choices_of(templates_of(args)),
        "student_init": "pretrained",
        "student_pretrained": args.student,
        "allow_bin": args.allow_bin,
        "preset": "kd",
        "w_ce": 0.0,
        "w_kd": 1.0,
        "temperature": 1.0,
        "max_length": encoder_length(args, pair.config),
        "output_dir": out / "training",
        "resume_from_checkpoint": "auto",
        "num_train_epochs": max(10, -(-1000 // steps)),
        "learning_rate": round(ENCODER_RATE / pair.width, 7),
        "warmup_steps": 0.06,
        "per_device_train_batch_size": ROWS,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "early_stopping_patience": 3,
        "logging_steps": 50,
        "seed": args.seed,
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
    }
    depends = {"student model": digests["student model"]}
    yield Stage("training", ("train", "tkd"), _with(training, "warm_up", args.warm_up), depends)
    yield Stage("student")


def _templates(args: DistillArguments, out: Path) -> list[Any]:
    return [out / "data" / PROMPT_FILE] if args.prompt is not None else list(args.templates)


def _labels(args: DistillArguments, out: Path) -> dict[str, Any]:
    return {
        "teacher": args.teacher,
        "teacher_dtype": teacher_dtype(args),
        "input_column": args.input_column,
        "templates": _templates(args, out),
        "student_template": args.student_template,
        "max_input_tokens": args.max_input_tokens,
        "input_eos": args.input_eos,
        **_chat(args, "teacher"),
        "allow_bin": args.allow_bin,
        "seed": args.seed,
    }


def _chat(args: DistillArguments, role: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (f"{role}_chat", f"{role}_system_prompt")}


def _training(args: DistillArguments, out: Path) -> dict[str, Any]:
    """What the warm-up and RL share."""
    return {
        "teacher": args.teacher,
        "teacher_dtype": teacher_dtype(args),
        "teacher_append_eos": args.input_eos,
        **_chat(args, "teacher"),
        **_chat(args, "student"),
        "allow_bin": args.allow_bin,
        "dataset": out / "data/train.parquet",
        "eval_dataset": out / "data/validation.parquet",
        "input_column": args.input_column,
        "student_template": args.student_template,
        "templates": _templates(args, out),
        "max_input_tokens": args.max_input_tokens,
        "max_new_tokens": args.max_new_tokens,
        "resume_from_checkpoint": "auto",
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATED,
        "eval_strategy": "steps",
        "eval_limit": None,
        "save_total_limit": 2,
        "logging_steps": 10,
        "seed": args.seed,
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
    }


def _with(settings: dict[str, Any], name: str, more: Any) -> dict[str, Any]:
    """`settings` with those that the user gave for the stage. Raises ConfigError for what distill sets from its own."""
    ours = {
        key for key, value in settings.items()
        if isinstance(value, (Path, list)) or key in {field.name for field in fields(DistillArguments)}
        or key in ("task_metric", "teacher_append_eos", "resume_from_checkpoint")
    }  # fmt: skip
    if taken := [key for key in more if key in ours]:
        raise ConfigError(f"{name}: {taken[0]} is set by distill for all stages alike: leave it out there")
    return {**settings, **more}


def check_training(stage: Stage, pair: Pair) -> None:
    """Raise ConfigError for settings that the training command would refuse."""
    job = TRAINING_JOBS[stage.command[1]]
    with tempfile.TemporaryDirectory() as folder:
        stage.write_settings(Path(folder))
        try:
            built = parse_config(job.settings, ["--config", str(stage.settings_file(Path(folder)))], preset=job.preset)
            if pair.said is not None:
                check_other_vocabulary(built[-1])
        except RlkdError as error:
            said, own = str(error).replace(f"{folder}/", ""), f"{stage.name}.yaml: "
            raise ConfigError(said if own in said else f"{own}{said}") from None
