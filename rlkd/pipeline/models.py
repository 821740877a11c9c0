"""Teacher and student of `rlkd distill`, checked against each other before any weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..io.files import sha256
from ..models.cut_layers import cut_config
from ..models.encoders.classifiers import longest
from ..models.encoders.rehearsal import is_encoder
from ..models.folders import check_place
from ..models.loading import check_saved_weights, load_config
from ..models.spec import ModelSpec, TeacherSpec, default_device, paired
from ..models.vocabulary import load_tokenizer
from .arguments import SMALL, DistillArguments


@dataclass(frozen=True)
class Pair:
    """Teacher and student by name.

    config, tokenizer  of the student as it will be
    encoder            whether the student is an encoder, which becomes a classifier
    said               how the two go together, in words; None if they share their vocabulary
    """

    teacher: TeacherSpec
    config: Any
    tokenizer: Any
    encoder: bool
    said: str | None = None

    @classmethod
    def of(cls, args: DistillArguments) -> Pair:
        """The models that settings name. Raises ModelError or ConfigError if one cannot take its role."""
        answer = args.max_new_tokens
        spec = ModelSpec(
            args.teacher, "teacher", dtype=teacher_dtype(args), device=default_device(), allow_bin=args.allow_bin
        )
        spec.check()
        teacher = TeacherSpec(spec, args.max_input_tokens, args.input_eos)
        _ = teacher.append_eos
        if args.student == SMALL:
            config = cut_config(spec.config)
            spec.check_lengths(args.max_input_tokens, answer)
            return cls(teacher, config, spec.tokenizer, encoder=False)
        config = load_config(args.student, "student")
        if is_encoder(config):
            return cls(teacher, config, _encoder_tokenizer(args, spec, config), encoder=True)
        student = ModelSpec(args.student, "student", allow_bin=args.allow_bin)
        student.check()
        for model in (spec, student):
            model.check_lengths(args.max_input_tokens, answer)
        return cls(teacher, student.config, student.tokenizer, encoder=False, said=paired(spec, student))

    @property
    def width(self) -> int:
        """Width of the student's layers."""
        sizes = [getattr(part, "hidden_size", None) for part in (self.config, *_parts(self.config))]
        return next(size for size in sizes if size)

    def sizes(self) -> dict[str, int]:
        """Parameters of the teacher and the student, from their configurations."""
        return {"teacher": parameters(self.teacher.model.config), "student": parameters(self.config)}


def teacher_dtype(args: DistillArguments) -> str:
    return args.teacher_dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


def parameters(config: Any) -> int:
    """Parameters of a model with this configuration; no weights are made."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModel if is_encoder(config) else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else kind
    with torch.device("meta"):
        model = kind.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def contents(name: str, role: str) -> str:
    """A digest of the files of a local model; of a name on the hub the name."""
    folder = check_place(name, role)
    if folder is None:
        return name
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".model"))
    own = {path.name: sha256(path) for path in files if path.name not in ("run.json", "distill.json")}
    return _digest(own)


def _digest(named: Mapping[str, str]) -> str:
    from hashlib import sha256 as digest

    return digest(repr(sorted(named.items())).encode()).hexdigest()[:16]


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
    limit = longest(config)
    return args.max_input_tokens if limit is None else min(args.max_input_tokens, limit)


def _parts(config: Any) -> list[Any]:
    return [getattr(config, name) for name in config.sub_configs]
