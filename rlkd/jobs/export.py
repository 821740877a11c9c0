"""The job of `rlkd export`: a generating student for CTranslate2, its agreement, size and speed beside PyTorch's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..io.cards import CARD
from ..io.files import write_text
from ..models.conversion import GENERATORS, TRANSLATORS, objection
from ..models.footprint import megabytes
from ..models.generation import rules_of
from ..models.language_model import LanguageModel
from ..models.loading import check_finite, load_config
from ..models.saving import check_new, new_folder
from ..models.spec import ModelSpec, TeacherSpec
from ..models.vocabulary import encode_prompts
from ..records import Example
from ..runs.files import HELD_OUT
from ..runs.record import RunRecord
from ..sampling.engines.protocol import Answer, Decoding
from ..sampling.engines.torch_engine import TorchEngine
from ..sampling.exported import equal_shares, without_end, write_exported
from ..sampling.schedule import Budget, answer_all
from .export_card import export_card
from .saved import EXPORT_RECORD, with_lengths
from .wiring import Reading, row_source, teacher_spec

TEACHER_INPUTS = 32  # how many a teacher answers: its speed is all that is asked for
# How rows are read, but for what the command asks.
PLAIN_ROWS: dict[str, Any] = {
    "subset": None, "templates_dir": None, "all_templates": False, "gold_input": False, "truncation": "none",
    "strict_compat": False, "column_map": None, "label_map": None, "reference_column": None, "input_eos": None,
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A form of a model: its size, and tokens per wall-clock second on this machine's CPU. Of the export also the
    shares of answers and of tokens that are those of the student in PyTorch.
    """

    name: str
    megabytes: float
    tokens_per_second: float
    equal_answers: float | None = None
    equal_tokens: float | None = None


def export(request: Mapping[str, Any], out: Path) -> list[Form]:
    """Write `out`: the student as CTranslate2 reads it, its tokenizer, export.json and a card with what was measured;
    an adapter is merged. The forms come as they are in the card: the export, the student, the teacher if one is named.

    Raises ConfigError, DataError or ModelError, before weights load unless weights are at fault.
    """
    check_new(out)
    settings = _settings(request)
    student = ModelSpec(settings["model"], "student", device="cpu", allow_bin=settings["allow_bin"])
    kinds = load_config(student.name, "student").architectures or ()
    if any(kind.endswith("Classification") for kind in kinds):
        raise ConfigError(f"--to ctranslate2: '{student.name}' is a classifier. Use --to onnx.")
    student.check()
    loaders = TRANSLATORS | GENERATORS
    if reason := objection(student, settings["quantization"], torch.device("cpu"), loaders, "student"):
        raise ConfigError(f"--to ctranslate2: {reason}")
    student.check_lengths(settings["max_input_tokens"], settings["max_new_tokens"])
    teacher = None
    if settings["teacher"]:
        named = teacher_spec(settings)
        teacher = replace(named, model=replace(named.model, device="cpu"))
    examples = _examples(settings, student.tokenizer)

    lm = student.language_model()
    check_finite(lm.model, "student", student.name)
    texts = [example.student_input for example in examples]
    most, end = settings["max_input_tokens"], rules_of(lm).end_of_prompts
    prompts = encode_prompts(student.tokenizer, texts, most, append_eos=end)
    with new_folder(out) as folder:
        theirs, plain = _in_pytorch("student, PyTorch float32", lm, prompts, settings["max_new_tokens"])
        exported = write_exported(lm, student.tokenizer, folder, settings["quantization"], prompts, theirs)
        model = exported.load(torch.get_num_threads())
        ours, seconds = _timed(lambda some: exported.answer(model, some, settings["max_new_tokens"]), prompts)
        shares = equal_shares(ours, [without_end(answer.ids, exported.rules) for answer in theirs])
        speed = sum(map(len, ours)) / seconds
        forms = [Form(f"CTranslate2 {settings['quantization']}", exported.megabytes, speed, *shares), plain]
        if teacher is not None:
            forms.append(_teacher_form(teacher, examples, settings))
        record = {"forms": [asdict(form) for form in forms], "inputs": len(prompts), "settings": _plain(settings)}
        write_text(folder / EXPORT_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / CARD, export_card(exported, student, forms, settings, len(prompts)))
    return forms


def _settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with what it leaves open as the student's run had it. Raises ConfigError for options that contradict
    each other.
    """
    if request["templates"] and not request["teacher"]:
        raise ConfigError("--templates are what --teacher reads: name it. The student reads --student-template.")
    if (request["dataset"] is None) != (request["input_column"] is None):
        raise ConfigError("--dataset and --input-column say together on what to compare: give both, or neither.")
    run = RunRecord.read(Path(request["model"]))
    trained = {} if run is None else run.settings
    template = request["student_template"] or trained.get("student_template")
    return {**PLAIN_ROWS, **with_lengths(request), "student_template": template}


def _examples(settings: dict[str, Any], tokenizer: Any) -> list[Example]:
    """The rows to compare on: those given, or the held-out ones of the student's run."""
    if settings["dataset"] is not None:
        return list(Reading.of(settings, tokenizer).examples(row_source(settings)))
    path = Path(settings["model"]) / HELD_OUT
    if not path.is_file():
        raise ConfigError(
            f"nothing to compare the export on: '{settings['model']}' has no {HELD_OUT}, as a run leaves it. Give "
            "--dataset and --input-column."
        )
    inputs: dict[str, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            inputs[json.loads(line)["input"]] = None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: no row of a run with an input ({error!r}). Give --dataset.") from error
    texts = list(inputs)[: settings["limit"]]
    return [Example(str(i), text, (text,)) for i, text in enumerate(texts)]


def _in_pytorch(name: str, lm: LanguageModel, prompts: list[list[int]], most: int) -> tuple[list[Answer], Form]:
    """Greedy answers of a model in PyTorch, and its size and speed."""
    engine = TorchEngine(lm)
    greedy = Decoding("greedy", most)

    def answer(some: list[list[int]]) -> list[Answer]:
        return [row[0] for row in answer_all(engine, some, [[0]] * len(some), greedy, Budget())]

    answers, seconds = _timed(answer, prompts)
    tokens = sum(len(without_end(answer.ids, rules_of(lm))) for answer in answers)
    return answers, Form(name, megabytes(lm.model), tokens / seconds)


def _teacher_form(teacher: TeacherSpec, examples: list[Example], settings: dict[str, Any]) -> Form:
    loaded = teacher.load()
    texts = [example.teacher_inputs[0] for example in examples[:TEACHER_INPUTS]]
    prompts = encode_prompts(teacher.tokenizer, texts, settings["max_input_tokens"], append_eos=teacher.append_eos)
    name = f"teacher, PyTorch {settings['teacher_dtype']}"
    return _in_pytorch(name, loaded.lm, prompts, settings["max_new_tokens"])[1]


def _timed(answer: Callable[[list[list[int]]], list[Any]], prompts: list[list[int]]) -> tuple[list[Any], float]:
    """The answers to all prompts and the wall-clock seconds they took, after one to warm up."""
    answer(prompts[:1])
    started = time.perf_counter()
    return answer(prompts), time.perf_counter() - started


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("quantization", "max_input_tokens", "max_new_tokens", "student_template", "templates")
    return {name: settings[name] for name in kept}
