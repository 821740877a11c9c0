"""Teachers that no local model stands behind, as settings name them: what they can teach is checked before any load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..checks import Count, Positive, check_settings
from ..errors import ConfigError, DataError
from ..labels.recorded import RecordedTeacher
from ..models.adapters import base_of
from ..models.architectures import language_model
from ..models.chat import chat_record
from ..models.other_tokenizer import SHARED_VOCABULARY, OtherTokenizer, ServedOtherTokenizer
from ..models.served import ServerTeacher
from ..models.server import Api, ServerSettings
from ..models.signals import SIGNAL, SignalSource
from ..models.spec import ModelSpec, TeacherSpec, paired
from ..models.teacher import Teacher, TemplateCombination
from ..models.vocabulary import same_vocabulary
from ..records import Example
from ..trainers.arguments import GKDArguments, OnPolicyArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from ..trainers.base_arguments import DistillationArguments, require
from ..trainers.objective import Objective
from ..trainers.on_policy import RECORDED_ONLY, check_mix
from ..trainers.ppo import PPO
from ..trainers.reinforce import Reinforce
from ..trainers.supervised import DivergenceKD, check_readiness, imitation
from .chat import TeacherChatArguments


@dataclass(kw_only=True)
class SignalArguments(TeacherChatArguments):
    """Where the teacher's probabilities come from."""

    teacher_signal: Literal["model", "recorded", "server", "base"] = field(
        default="model",
        metadata={
            "help": "Where the teacher's probabilities come from: the model; recorded, what pseudo_labels hold of them "
            "(--top-k-logprobs; no teacher is read); server, one of vLLM or SGLang (of the teacher only configuration "
            "and tokenizer are read here); base, the student's own base model with its adapter off (use_peft), which "
            "reads other prompts."
        },
    )
    server_url: str | None = field(
        default=None,
        metadata={"help": "The server's API: http://localhost:8000/v1. Its key, if any, is in RLKD_SERVER_KEY."},
    )
    server_api: Api = field(default="vllm", metadata={"help": "Whose API it is."})
    server_model: str | None = field(
        default=None, metadata={"help": "The teacher's name on the server; null: the only model there."}
    )
    server_concurrency: Count = field(default=8, metadata={"help": "Requests to the server at a time."})
    server_timeout: Positive = field(default=60.0, metadata={"help": "Seconds that one request may take."})

    def __post_init__(self) -> None:
        check_settings(self)

    def check_signal(self, combination: TemplateCombination) -> None:
        """Raise ConfigError for settings that contradict each other, or this combination of templates."""
        if self.teacher_signal in ("recorded", "server") and combination == "pool":
            raise ConfigError(
                f"template_combination = 'pool': takes the teacher's model, and teacher_signal is "
                f"{self.teacher_signal!r}: set it to average"
            )
        own = [field for field in fields(SignalArguments) if field.name.startswith("server_")]
        given = [field.name for field in own if getattr(self, field.name) != field.default]
        if given and self.teacher_signal != "server":
            raise ConfigError(f"{given[0]} is set, and teacher_signal is {self.teacher_signal!r}: set it to server")
        if self.teacher_signal == "server":
            _ = self.server
        for name in ("teacher", "teacher_revision", "teacher_dtype") if self.teacher_signal == "base" else ():
            require(
                getattr(self, name) == getattr(type(self), name),
                name,
                getattr(self, name),
                "teacher_signal is 'base', and the teacher is the student's base as it was loaded: leave it out",
            )
        for name in ("teacher_chat", "teacher_system_prompt"):
            if self.teacher_signal == "recorded" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is set, and teacher_signal is 'recorded': no teacher reads prompts, and the labels have "
                    "their own. Leave it out."
                )

    @property
    def server(self) -> ServerSettings:
        """Where the teacher is served. Raises ConfigError as `ServerSettings`, or if there is no url."""
        if self.server_url is None:
            raise ConfigError("teacher_signal = 'server': server_url is not set: name it, http://localhost:8000/v1")
        return ServerSettings(
            self.server_url, self.server_model, self.server_concurrency, self.server_timeout, self.server_api
        )


# The settings of a trainer -> its objective.
OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    GKDArguments: DivergenceKD,
    PPOArguments: PPO,
    ReinforceArguments: Reinforce,
    SupervisedArguments: imitation,
}


def teacher_spec(
    teacher: Mapping[str, Any], training: DistillationArguments, student: ModelSpec | None = None
) -> TeacherSpec:
    """The teacher that settings name. Raises ConfigError if it is to be the base of a student without an adapter."""
    chat = {"chat": teacher["teacher_chat"], "system_prompt": teacher["teacher_system_prompt"]}
    if teacher["teacher_signal"] == "base":
        assert student is not None
        require(
            student.keep_adapter, "teacher_signal", "base", "is the student without its adapter: set use_peft to true"
        )
        own = replace(student, role="teacher", device=str(training.device), **chat)
        return TeacherSpec(own, training.max_input_tokens, teacher["teacher_append_eos"])
    model = ModelSpec(
        teacher["teacher"],
        "teacher",
        revision=teacher["teacher_revision"],
        dtype=teacher["teacher_dtype"],
        device=str(training.device),
        allow_bin=teacher["allow_bin"],
        served=teacher["teacher_signal"] == "server",
        src_lang=teacher["src_lang"],
        tgt_lang=teacher["tgt_lang"],
        **chat,
    )
    return TeacherSpec(model, training.max_input_tokens, teacher["teacher_append_eos"])


def check_models(teacher: TeacherSpec | None, student: ModelSpec, training: DistillationArguments) -> str | None:
    """How teacher and student go together, in words; None if they share their vocabulary. Raises ModelError or
    ConfigError if one cannot take its role, or settings need a shared vocabulary and there is none.
    """
    for spec in (student,) if teacher is None else (teacher.model, student):
        spec.check()
        spec.check_lengths(training.max_input_tokens, training.max_new_tokens)
    if teacher is None:
        return None
    _ = teacher.append_eos
    said = paired(teacher.model, student)
    if said is None:
        return None
    check_other_vocabulary(training)
    return said


def check_other_vocabulary(training: DistillationArguments) -> None:
    """Raise ConfigError if these settings need a vocabulary that teacher and student share."""
    refuse_one_model(training, "needs a vocabulary that teacher and student share")
    check_objective(training, SIGNAL - SHARED_VOCABULARY, OtherTokenizer.lacks)


def refuse_one_model(training: DistillationArguments, why: str) -> None:
    """Raise ConfigError for settings that read a local teacher's model itself, token by token."""
    mix = getattr(training, "teacher_mix", 0.0)
    require(mix == 0, "teacher_mix", mix, f"{why}: set it to 0")
    if isinstance(training, SupervisedArguments) and training.layer_weights:
        raise ConfigError(f"{training.layer_setting}: {why}: set it to 0")


def check_objective(training: DistillationArguments, gives: frozenset[str], why: str = "") -> None:
    """Raise ConfigError if the objective of these settings needs more of the teacher than it `gives`; why, as in
    `check_signal`.
    """
    for kind, made in OBJECTIVES.items():
        if isinstance(training, kind):
            made(training).check(gives, why)


def check_recorded_signal(training: DistillationArguments) -> None:
    """Raise ConfigError if these settings need more of the teacher than label folders record."""
    if isinstance(training, OnPolicyArguments):
        raise ConfigError(RECORDED_ONLY)
    check_objective(training, RecordedTeacher.gives)
    if isinstance(training, SupervisedArguments):
        check_readiness(training, RecordedTeacher.gives)
    watched = (training.metric_for_best_model or "").removeprefix("eval_").removeprefix("sample_")
    if watched in ("regret", "logprob", "match"):
        raise ConfigError(
            f"metric_for_best_model = {training.metric_for_best_model!r}: takes the teacher's model, and "
            "teacher_signal is 'recorded': name a score of task_metric, such as exact_match"
        )


def served_teacher(
    spec: TeacherSpec, student: ModelSpec, settings: ServerSettings, training: DistillationArguments
) -> SignalSource:
    """The teacher on a server, which was asked for it, and is enough for these settings, as the student sees it.

    No weights are loaded. Raises ModelError and ServerError as `Server` does, ConfigError if they need more of the
    teacher, or a longer context window.
    """
    teacher = ServerTeacher.of(spec, settings)
    check_objective(training, teacher.gives)
    if isinstance(training, SupervisedArguments):
        check_readiness(training, teacher.gives)
    if isinstance(training, OnPolicyArguments):
        check_mix(training, local=False)
    teacher.server.check_window(training.max_input_tokens, training.max_new_tokens)
    shared = same_vocabulary(spec.tokenizer, student.tokenizer)
    return teacher if shared else ServedOtherTokenizer(teacher, student.tokenizer, student.rules)


def recorded_teacher(labels: Any, training: DistillationArguments, tokenizer: Any) -> RecordedTeacher | None:
    """The teacher of the labels, None if the objective reads the labels alone. Raises DataError as RecordedTeacher."""
    reads = any(made(training).needs for kind, made in OBJECTIVES.items() if isinstance(training, kind))
    return RecordedTeacher(labels, tokenizer) if reads else None


def check_context(examples: Sequence[Example], teacher: TeacherSpec, student: ModelSpec) -> None:
    """Raise ConfigError if a teacher that is the student's base reads the student's own prompts: it has nothing to
    teach.
    """
    if chat_record(teacher.tokenizer) != chat_record(student.tokenizer):
        return
    some = (examples[i] for i in range(min(len(examples), 100)))
    if all(example.teacher_inputs == (example.student_input,) for example in some):
        raise ConfigError(
            "teacher_signal = 'base': the base model would read the student's own prompts, and teach nothing: give it "
            "templates or a teacher_system_prompt."
        )


def base_teacher(student: Any, spec: TeacherSpec, **options: Any) -> Teacher:
    """The base of a student with an adapter as its teacher; options, further fields of `Teacher`."""
    base = base_of(student)
    if not spec.model.quantized:
        base = base.to(spec.model.device)
    reading: dict[str, Any] = {"max_input_tokens": spec.max_input_tokens, "append_eos": spec.append_eos}
    return Teacher(language_model(base, spec.tokenizer), spec.tokenizer, **reading, **options)


def refuse_other_templates(found: list[str], folder: str) -> None:
    """Raise DataError if labels were made under other templates than a run's settings name.

    found: what `labels.makers.differences` tells.
    """
    if other := [line.strip() for line in found if line.strip().startswith("templates:")]:
        raise DataError(
            f"teacher_signal = 'recorded': the labels of {folder} were made under other templates than the settings "
            f"name ({'; '.join(other)}): name the same, or label again."
        )
