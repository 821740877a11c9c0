"""Several teachers from settings: which read what is checked before weights load, and each is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..data.examples import Examples
from ..errors import ConfigError, DataError, nearest, shown
from ..models.several import AveragedTeachers, RoutedTeachers, SeveralTeachers
from ..models.signals import LocalSource
from ..models.spec import ModelSpec, TeacherSpec
from ..trainers.base_arguments import DistillationArguments, require
from .teachers import base_teacher, check_models, refuse_one_model, teacher_spec
from .wiring import local_teacher

if TYPE_CHECKING:
    from .setup import TeacherArguments

# What one of `teachers` may say, and its type.
ENTRY: dict[str, Any] = {
    "teacher": str, "teacher_revision": str, "teacher_dtype": str, "teacher_append_eos": bool, "teacher_chat": bool,
    "teacher_system_prompt": str, "weight": (int, float),
    "templates": list, "values": list,
}  # fmt: skip
WAYS = {
    "weight": "rewards are averaged", "templates": "each reads its templates", "values": "each row has one teacher",
}  # fmt: skip


@dataclass(kw_only=True)
class SeveralArguments:
    """Several teachers in place of one."""

    teachers: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={
            "help": "Several teachers in place of `teacher`, in the file: mappings with teacher, what differs from "
            "teacher_dtype, teacher_append_eos, teacher_chat and teacher_system_prompt, teacher_revision, and weight "
            "(of its rewards), templates (names of those that it reads) or values (of teacher_column)."
        },
    )
    teacher_column: str | None = field(
        default=None, metadata={"help": "Column whose values say which of `teachers` a row has."}
    )

    def check_teachers(self, teacher: str, default: str) -> None:
        """Raise ConfigError for `teachers` that contradict themselves, or `teacher`."""
        if not self.teachers:
            require(self.teacher_column is None, "teacher_column", self.teacher_column, "there are no `teachers`")
            return
        require(teacher == default, "teacher", teacher, "`teachers` name the teachers: leave one of the two out")
        require(len(self.teachers) > 1, "teachers", self.teachers, "name at least 2, or use `teacher`")
        for i, entry in enumerate(self.teachers, start=1):
            _check_entry(i, entry)
        names = [entry["teacher"] for entry in self.teachers]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, "teachers", twice, "is named twice: give it all of its templates or values at once")
        ways = [way for way in WAYS if any(way in entry for entry in self.teachers)]
        require(len(ways) < 2, "teachers", ways, "give one of these, the same for all")
        for way in ways:
            lacking = next((entry["teacher"] for entry in self.teachers if not entry.get(way)), None)
            require(lacking is None, "teachers", lacking, f"has no {way}, and others have ({WAYS[way]}): give it one")
        require(
            (self.teacher_column is None) == (ways != ["values"]),
            "teacher_column",
            self.teacher_column,
            "goes with `values` of every one of `teachers`: give both or neither",
        )


def _check_entry(number: int, entry: dict[str, Any]) -> None:
    where = f"teachers, number {number}"
    for key, value in entry.items():
        if key not in ENTRY:
            raise ConfigError(f"{where}: {shown(key)} is not a setting of one teacher.{nearest(str(key), list(ENTRY))}")
        if not isinstance(value, ENTRY[key]) or (key == "weight" and (isinstance(value, bool) or value <= 0)):
            kind = ENTRY[key]
            wanted = "a number above 0" if key == "weight" else {str: "text", bool: "true or false"}.get(kind, "a list")
            raise ConfigError(f"{where}: {key} = {shown(value)}: must be {wanted}")
    if "teacher" not in entry:
        raise ConfigError(f"{where}: names no teacher")


@dataclass
class TeacherPlan:
    """Which teachers there are, and what each reads; made before weights load.

    specs     by name;  template_names, those of the run, in order
    routes    digest of an input's prompts -> the name of its teacher; None if inputs are not divided
    """

    entries: list[dict[str, Any]]
    specs: dict[str, TeacherSpec]
    column: str | None = None
    combination: str = "average"
    reads: list[tuple[int, ...]] | None = None
    routes: dict[bytes, str] | None = None

    @classmethod
    def of(cls, settings: TeacherArguments, training: DistillationArguments) -> TeacherPlan | None:
        """The plan of the teachers that settings name, None for one."""
        shared = {**vars(settings), "teacher_revision": None}
        specs = {entry["teacher"]: teacher_spec({**shared, **entry}, training) for entry in settings.teachers}
        return cls(settings.teachers, specs, settings.teacher_column, settings.template_combination) if specs else None

    def check(self, student: ModelSpec, training: DistillationArguments) -> list[str]:
        """How they go together with the student, in words. Raises as `check_models` does."""
        refuse_one_model(training, "takes one teacher, and `teachers` are several")
        return [said for spec in self.specs.values() if (said := check_models(spec, student, training))]

    def divide(self, *data: Examples) -> None:
        """Decide who reads what of these rows. Raises ConfigError for templates that do not fit, DataError for rows
        whose value of the column no teacher names, or prompts with two teachers.
        """
        if any("templates" in entry for entry in self.entries):
            self.reads = _reads(self.entries, data[0].template_names)
            alone = all(len(own) == 1 for own in self.reads)
            require(
                self.combination == "average" or not alone,
                "template_combination",
                self.combination,
                "each teacher reads one template, of which nothing is pooled: set it to average",
            )
        if self.column is None:
            return
        teacher_of = {str(value): entry["teacher"] for entry in self.entries for value in entry["values"]}
        self.routes = {}
        for rows in data:
            values = list(map(str, rows.column(self.column)))
            if unknown := [value for value in values if value not in teacher_of]:
                raise DataError(
                    f"{rows.source}: {len(unknown)} of {len(rows)} rows have a {self.column} that no teacher names, "
                    f"first {shown(unknown[0])}: known are {', '.join(map(repr, teacher_of))}. Add it to `values`."
                )
            for example, value in zip(rows, values, strict=True):
                name, key = teacher_of[value], _key(example.teacher_inputs)
                if self.routes.setdefault(key, name) != name:
                    raise DataError(
                        f"{rows.source}: row {example.id} has the prompts of another row, but another teacher "
                        f"({self.column} = {shown(value)}). Teachers are told apart by prompts: put {self.column} "
                        "into the templates, or remove one of the two."
                    )

    def load(self, student: ModelSpec, **options: Any) -> SeveralTeachers:
        """The teachers with their weights; options, further fields of `Teacher`. Raises as `local_teacher` does."""
        sources = {name: local_teacher(spec, student, **options) for name, spec in self.specs.items()}
        if self.routes is not None:
            digest = sha256(repr(sorted(self.routes.items())).encode()).hexdigest()[:16]
            return RoutedTeachers(sources, self._route, f"column {self.column} (digest {digest})")
        if self.reads is not None:
            return AveragedTeachers(sources, [len(own) for own in self.reads], self.reads)
        weights = [float(entry["weight"]) for entry in self.entries] if "weight" in self.entries[0] else None
        return AveragedTeachers(sources, weights)

    def _route(self, texts: tuple[str, ...]) -> str:
        assert self.routes is not None
        name = self.routes.get(_key(texts))
        if name is None:
            raise DataError(
                f"prompts of no training or held-out row, so their teacher is not known: {shown(texts[0])}. With "
                "teacher_column, labels that the teacher scores must be of the run's own rows and templates."
            )
        return name


def tokenizers_of(spec: TeacherPlan | TeacherSpec | None) -> list[Any]:
    """The tokenizers of the teacher, or of all teachers."""
    if isinstance(spec, TeacherPlan):
        return [own.tokenizer for own in spec.specs.values()]
    return [] if spec is None else [spec.tokenizer]


def load_local(
    spec: TeacherPlan | TeacherSpec | None, student: ModelSpec, settings: TeacherArguments, model: Any
) -> LocalSource | None:
    """The teacher, or teachers, with their weights; None without any. model: the student, whose base may be the
    teacher. Raises as `local_teacher` does.
    """
    options = {"combination": settings.template_combination, "cache_bytes": settings.teacher_cache_mb * 2**20}
    if isinstance(spec, TeacherPlan):
        return spec.load(student, **options)
    if spec is not None and settings.teacher_signal == "base":
        return base_teacher(model, spec, **options)
    return None if spec is None else local_teacher(spec, student, **options)


def _key(texts: tuple[str, ...]) -> bytes:
    return sha256("\x1f".join(texts).encode(errors="surrogatepass")).digest()[:16]


def _reads(entries: Sequence[dict[str, Any]], names: list[str]) -> list[tuple[int, ...]]:
    """Numbers of the templates that each teacher reads. Raises ConfigError unless each template has one teacher."""
    readers = {name: [entry["teacher"] for entry in entries if name in entry["templates"]] for name in names}
    if unknown := [name for entry in entries for name in entry["templates"] if name not in names]:
        raise ConfigError(
            f"teachers: there is no template {unknown[0]!r}: allowed are {', '.join(map(repr, names))}."
            f"{nearest(str(unknown[0]), names)}"
        )
    for name, own in readers.items():
        require(len(own) == 1, "teachers", own, f"template {name!r} must have exactly one teacher that reads it")
    return [tuple(k for k, name in enumerate(names) if name in entry["templates"]) for entry in entries]
