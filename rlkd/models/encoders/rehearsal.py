"""A trial of teacher and student without weights: what a configuration alone decides is found out before training."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ...errors import ConfigError, ModelError
from ..loading import load_config
from .attention import prepare_attention
from .classifiers import build_student, run_encoder, student_config, width_of

RANDOM_FILLS = {"uniform_", "normal_", "trunc_normal_", "random_", "bernoulli_", "exponential_"}


def is_encoder(config: Any) -> bool:
    """Whether a family reads texts in both directions: not those that only continue texts, nor encoder-decoders."""
    continues = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return not continues and not getattr(config, "is_encoder_decoder", False)


def rehearse(
    teacher_config: Any,
    options: dict[str, Any],
    *,
    states: bool = False,
    trees: Collection[str] = (),
    token_types: Mapping[str, Sequence[int]] = MappingProxyType({}),
    gradient_checkpointing: bool = False,
) -> Any:
    """The configuration of the student that `build_student` will make with `options` of a model of `teacher_config`.

    Both are built, without weights: the student must take the teacher's layers, be the same model when its
    configuration is saved and read again, and give logits [B, C]. states: also hidden states [B, L, D] of every layer;
    trees: the roles ("teacher", "student") whose attention must be readable; token_types: the token_type_ids that a
    role's tokenizer gives, at most 4, none where it gives no such input. Raises ConfigError or ModelError.
    """
    with _naming("student", teacher_config):
        own = student_config(teacher_config, **options)
    with torch.device("meta"):
        with _naming("teacher", teacher_config):
            teacher = _model(teacher_config)
        with _naming("student", own):
            pretrained = options.get("init") == "pretrained"
            student = _model(own) if pretrained else build_student(teacher, **options)
            _check_saved(student)
    for role, model in (("teacher", teacher), ("student", student)):
        if gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ModelError(
                f"gradient_checkpointing: the {role}, a '{model.config.model_type}' model, has none. Leave it out."
            )
        with _naming(role, model.config):
            with _no_random_numbers():
                model = _model(model.config)
            if role in trees:
                prepare_attention(model, role)
            _check_outputs(model, role, states, token_types.get(role, ()))
    return own


def check_states(model: Any, role: str) -> None:
    """Raises ModelError unless the model gives hidden states [B, L, D] of every layer."""
    with _naming(role, model.config):
        _check_outputs(model, role, states=True)


def _model(config: Any) -> Any:
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), dtype=torch.float32)


def _check_saved(student: Any) -> None:
    """The configuration, saved and read again, describes the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        student.config.save_pretrained(folder)
        again = _shapes(_model(load_config(folder, "student")))
    if again != _shapes(student):
        changed = sorted(name for name in {*again, *_shapes(student)} if again.get(name) != _shapes(student).get(name))
        raise ModelError(
            f"student: a '{student.config.model_type}' model of {student.config.num_hidden_layers} layers would be "
            f"another when it is loaded again ({changed[0]}). Choose another student."
        )


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_outputs(model: Any, role: str, states: bool, token_types: Sequence[int] = ()) -> None:
    config, device = model.config, next(model.parameters()).device
    ids = torch.ones(2, 4, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)}
    if token_types:
        row = [*token_types, *[token_types[-1]] * 4][:4]
        inputs["token_type_ids"] = torch.tensor([row, row], device=device)
    training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for mode in (True, False):  # some families take other texts in training
                out = run_encoder(model.train(mode), inputs, hidden=states)
    finally:
        model.train(training)
    if out.logits.shape != (2, config.num_labels):
        raise ModelError(
            f"{role}: a '{config.model_type}' model gives logits of shape {tuple(out.logits.shape)} for 2 texts and "
            f"{config.num_labels} labels. Choose a model of the BERT family."
        )
    found, wanted = [tuple(h.shape) for h in out.hidden], [(2, 4, width_of(config))] * config.num_hidden_layers
    if states and found != wanted:
        raise ModelError(
            f"{role}: a '{config.model_type}' model of {config.num_hidden_layers} layers gives {len(found)} hidden "
            f"states, which cannot be compared token by token, layer by layer ({found[-1:]} of 2 texts of 4 tokens). "
            "Use preset: kd, or a model of the BERT family."
        )


@contextmanager
def _naming(role: str, config: Any) -> Iterator[None]:
    """What a family raises about itself becomes a ModelError that names it."""
    try:
        yield
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # families raise anything, from ImportError to AssertionError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{role}: a '{config.model_type}' model cannot be distilled here: {reason}. Choose a model of the BERT "
            "family."
        ) from error


class _NoRandomNumbers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM_FILLS and args:
            with torch.no_grad():
                return args[0].zero_()  # a value: truncated distributions are drawn until they fit
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Random weights of models built inside are 0, which takes a fraction of the time."""
    with _NoRandomNumbers():
        yield
