"""Teacher and student of `rlkd distill`, checked against each other before any weights load."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from hashlib import sha256 as digest
from math import prod
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..io.files import sha256
from ..models.adapters import adapter_of
from ..models.cut_layers import cut_config
from ..models.encoder_decoder import separate_head
from ..models.encoders.classifiers import longest_text
from ..models.encoders.rehearsal import is_encoder
from ..models.folders import check_place, saved_shapes, weights_files
from ..models.footprint import count_parameters
from ..models.loading import check_saved_weights, load_config
from ..models.spec import ModelSpec, TeacherSpec, default_device, paired
from ..models.vocabulary import load_tokenizer
from ..runs.files import RUN_FILE, SUMMARY_FILE
from .arguments import SMALL, DistillArguments

NOT_MODEL = (RUN_FILE, SUMMARY_FILE, "evaluation.json")


@dataclass(frozen=True)
class Pair:
    """Teacher and student by name.

    config, tokenizer  of the student as it will be
    student    its name; None of one that is made of the teacher
    encoder            whether the student is an encoder, which becomes a classifier
    said               how the two go together, in words; None if they share their vocabulary
    """

    teacher: TeacherSpec
    config: Any
    tokenizer: Any
    encoder: bool
    student: str | None = None
    said: str | None = None

    @classmethod
    def of(cls, args: DistillArguments) -> Pair:
        """The models that settings name. Raises ModelError or ConfigError if one cannot take its role."""
        answer = args.max_new_tokens
        own: dict[str, Any] = {"chat": args.student_chat, "system_prompt": args.student_system_prompt}
        plain = ModelSpec(
            args.teacher, "teacher", dtype=teacher_dtype(args), device=default_device(), allow_bin=args.allow_bin
        )
        spec = replace(plain, chat=args.teacher_chat, system_prompt=args.teacher_system_prompt)
        spec.check()
        teacher = TeacherSpec(spec, args.max_input_tokens, args.input_eos)
        _ = teacher.append_eos
        if args.student == SMALL:
            config = cut_config(spec.config)
            spec.check_lengths(args.max_input_tokens, answer)
            small = replace(plain, role="student", **own)
            small.check()
            return cls(teacher, config, small.tokenizer, encoder=False)
        config = load_config(args.student, "student")
        if is_encoder(config):
            if set(own.values()) != {None}:
                raise ConfigError(
                    f"student '{args.student}' is an encoder, which reads no chats: leave student_chat out"
                )
            return cls(teacher, config, _encoder_tokenizer(args, spec, config), True, args.student)
        student = ModelSpec(args.student, "student", allow_bin=args.allow_bin, **own)
        student.check()
        for model in (spec, student):
            model.check_lengths(args.max_input_tokens, answer)
        return cls(teacher, student.config, student.tokenizer, False, args.student, paired(spec, student))

    @property
    def width(self) -> int:
        """Width of the student's layers."""
        sizes = [getattr(part, "hidden_size", None) for part in (self.config, *_parts(self.config))]
        return next(size for size in sizes if size)

    def sizes(self) -> dict[str, int]:
        """Parameters of the teacher and the student, from their configurations."""
        teacher = parameters(self.teacher.model.config, self.teacher.model.name)
        return {"teacher": teacher, "student": parameters(self.config, self.student)}


def teacher_dtype(args: DistillArguments) -> str:
    return args.teacher_dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


def parameters(config: Any, name: str | None) -> int:
    """Parameters of a model: those in the files of a local one, else those that its configuration makes. No weights are
    loaded.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = None if name is None else check_place(name, "model")
    if folder is not None and (shapes := saved_shapes(folder)) and adapter_of(str(name), "model") is None:
        return sum(prod(shape) for shape in shapes.values())
    kind: Any = AutoModel if is_encoder(config) else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else kind
    with torch.device("meta"):
        model = kind.from_config(config)
        if kind is AutoModelForSeq2SeqLM:
            separate_head(model)
    return count_parameters(model)


def contents(name: str, role: str) -> str:
    """A digest of the files of a local model; of a name on the hub the name."""
    folder = check_place(name, role)
    if folder is None:
        return name
    files = [
        path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model") and path.name not in NOT_MODEL
    ]
    found = {path.name: sha256(path) for path in files} | weights_files(folder)
    return digest(json.dumps(found).encode()).hexdigest()[:16]


def _encoder_tokenizer(args: DistillArguments, teacher: ModelSpec, config: Any) -> Any:
    """The tokenizer of an encoder that can become a classifier. Raises ModelError or ConfigError."""
    teacher.check_lengths(args.max_input_tokens)
    if args.prompt is not None and not args.answer_choices:
        raise ConfigError(
            f"student '{args.student}' is an encoder, which chooses among answers: name them, answer_choices = "
            "'yes ||| no'"
        )
    tokenizer = load_tokenizer(args.student, "student")
    begins = tokenizer.cls_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    if not begins or tokenizer.pad_token_id is None:
        raise ModelError(
            f"student '{args.student}' is a '{config.model_type}' model whose texts do not begin with a [CLS] token. "
            "Choose one of the BERT family, or a language model."
        )
    check_saved_weights(args.student, "student", allow_bin=args.allow_bin)
    return tokenizer


def encoder_length(args: DistillArguments, config: Any) -> int:
    """Tokens that texts of an encoder are cut to: its positions are the limit that it was trained with."""
    limit = longest_text(config)
    return args.max_input_tokens if limit is None else min(args.max_input_tokens, limit)


def _parts(config: Any) -> list[Any]:
    return [getattr(config, name) for name in config.sub_configs]
