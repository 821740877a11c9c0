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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ...errors import ConfigError, ModelError
from ...objectives.neighbours import input_gradient
from ..loading import load_config
from .attention import AttentionSource, prepare_attention
from .classifiers import build_student, student_config
from .labels import OF_WORDS, auto_class, head_of
from .outputs import ATTENTION_NEEDS, EncoderOutputs, run_encoder, width_of

RANDOM_FILLS = {"uniform_", "normal_", "trunc_normal_", "random_", "bernoulli_", "exponential_"}


def is_encoder(config: Any) -> bool:
    """Whether a family reads texts in both directions: not those that only continue texts, nor encoder-decoders."""
    continues = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return not continues and not getattr(config, "is_encoder_decoder", False)


def rehearse(
    teacher_config: Any,
    options: dict[str, Any],
    *,
    needs: Mapping[str, Collection[str]] = MappingProxyType({}),
    token_types: Mapping[str, Sequence[int]] = MappingProxyType({}),
    gradient_checkpointing: bool = False,
) -> Any:
    """The configuration of the student that `build_student` will make with `options` of a model of `teacher_config`.

    Both are built, without weights: the student must take the teacher's layers, be the same model when its
    configuration is saved and read again, and give logits [B, C], of words [B, L, C]. needs: what else a role
    ("teacher", "student") must give (`outputs.Need`); token_types: the token_type_ids that its tokenizer gives, at most
    4, none where it gives no
    such input. Raises ConfigError or ModelError.
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
            check_outputs(model, role, needs.get(role, ()), token_types.get(role, ()))
    return own


def check_outputs(
    model: Any, role: str, needs: Collection[str], token_types: Sequence[int] = ()
) -> AttentionSource | None:
    """Prepare a model to give logits [B, C] and what is needed of it (`outputs.Need`), and try it on two texts.

    Returns: how its attention is read, None if it is not. Raises ModelError if it does not give all of this.
    """
    with _naming(role, model.config):
        source = None
        if ATTENTION_NEEDS.intersection(needs):
            source = prepare_attention(model, role, vectors="relations" in needs)
        training = model.training
        try:
            with torch.random.fork_rng():
                for mode in (True, False):  # some families take other texts in training
                    out = run_encoder(model.train(mode), _two_texts(model, token_types), needs, source)
                    _check_shapes(model, role, needs, out)
        finally:
            model.train(training)
    return source


def _model(config: Any) -> Any:
    return auto_class(config).from_config(copy.deepcopy(config), dtype=torch.float32)


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


def _two_texts(model: Any, token_types: Sequence[int]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    ids = torch.ones(2, 4, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)}
    if token_types:
        row = [*token_types, *[token_types[-1]] * 4][:4]
        inputs["token_type_ids"] = torch.tensor([row, row], device=device)
    return inputs


def _check_shapes(model: Any, role: str, needs: Collection[str], out: EncoderOutputs) -> None:
    config = model.config
    layers, kind = config.num_hidden_layers, f"{role}: a '{config.model_type}' model"
    expected = (2, 4, config.num_labels) if head_of(config) == OF_WORDS else (2, config.num_labels)
    if out.logits.shape != expected:
        raise ModelError(
            f"{kind} gives logits of shape {tuple(out.logits.shape)} for 2 texts of 4 tokens and {config.num_labels} "
            "labels. Choose a model of the BERT family."
        )
    states = [*out.embeddings, *out.hidden]
    found = [tuple(h.shape) for h in states]
    wanted = [(2, 4, width_of(config))] * (len(out.embeddings) + layers)
    if {"cls", "hidden", "embeddings"}.intersection(needs) and found != wanted:
        raise ModelError(
            f"{kind} of {layers} layers gives {len(found)} hidden states, which cannot be compared token by token, "
            f"layer by layer ({found[-1:]} of 2 texts of 4 tokens). Use preset: kd, or a model of the BERT family."
        )
    if "neurons" in needs and len(out.neurons) != layers:
        raise ModelError(
            f"{kind} has {len(out.neurons)} plain feed-forward networks for {layers} layers, and the term boundaries "
            "reads one in each (gated ones have no such neurons). Choose another preset, or a BERT-like model."
        )
    if "gradient" in needs:  # twice differentiable, or it raises
        (words,) = out.inputs
        gradient = input_gradient(out.logits, out.logits.argmax(-1), words, differentiable=role == "student")
        if role == "student":
            torch.autograd.grad(gradient.sum(), words)


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
