"""Encoder-only students, cut from a fine-tuned teacher."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ...checks import check_choice
from ...errors import ConfigError, ModelError
from ..loading import load_config, load_pretrained
from .labels import auto_class, check_problem, give_labels, label_names, name_head, problem_of

Init = Literal["mapped", "first", "pretrained", "random"]
PER_LAYER = ("attention_window",)  # lists with a value for each layer, besides those called so (layer_types)
# Families that number positions from pad_token_id + 1, so that as many of the embedding's rows are never used.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "roberta-prelayernorm")


def longest_text(config: Any) -> int | None:
    """Tokens of the longest text that the model has positions for; None: any length."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return positions


def check_length(max_length: int, config: Any, role: str) -> None:
    """Raises ConfigError if the model has fewer positions than `max_length` tokens."""
    positions = longest_text(config)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length = {max_length}: the {role} ('{config.model_type}') has {positions} positions. "
            f"Set max_length to at most {positions}; longer texts are cut."
        )


def matched_layers(student_layers: int, teacher_layers: int, layer_map: list[int] | None = None) -> list[int]:
    """I(k), the teacher's layer (from 1) that student layer k is compared with: round(k M / K), or `layer_map` itself.

    PKD-skip is the default, PKD-last is [M-K+1, ..., M]. Raises ConfigError for a map that does not fit.
    """
    K, M = student_layers, teacher_layers
    if layer_map is None:
        if K > M:
            raise ConfigError(f"the student has {K} layers, more than its teacher ({M}): choose at most {M}")
        return [int(k * M / K + 0.5) for k in range(1, K + 1)]
    if len(layer_map) != K or sorted(set(layer_map)) != layer_map or not 1 <= layer_map[0] <= layer_map[-1] <= M:
        raise ConfigError(
            f"layer_map = {layer_map}: must give {K} layers of the teacher, one for each layer of the student, "
            f"increasing, from 1 to {M}"
        )
    return list(layer_map)


def layer_lists(teacher: Any, student: Any) -> list[str]:
    """Dotted names of the lists of layers: those as long as the teacher is deep, which the student has in its own
    length. Several where a family keeps the parts of its layers apart (XLM), none where all layers share weights
    (ALBERT).
    """
    deep, shallow = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    own = {name: len(module) for name, module in student.named_modules() if isinstance(module, nn.ModuleList)}
    found: list[str] = []
    for name, module in teacher.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == deep and own.get(name) == shallow and not inside:
            found.append(name)
    return found


def student_config(
    teacher_config: Any,
    layers: int,
    init: Init = "mapped",
    *,
    hidden_size: int | None = None,
    attention_heads: int | None = None,
    intermediate_size: int | None = None,
    layer_map: list[int] | None = None,
    pretrained: str | None = None,
) -> Any:
    """Configuration of the student that `build_student` makes of these arguments. Raises ConfigError."""
    check_choice("init", init, Init)
    if layers < 1:
        raise ConfigError(f"layers = {layers}: a student needs at least 1")
    narrower = {
        name: value
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_attention_heads", attention_heads),
            ("intermediate_size", intermediate_size),
        )
        if value is not None and value != getattr(teacher_config, name)
    }
    if narrower and init != "random":
        raise ConfigError(f"init = {init!r} copies weights and needs equal widths, not {narrower}: use init: random")
    check_problem(teacher_config, "teacher")
    chosen = matched_layers(layers, teacher_config.num_hidden_layers, layer_map)
    if init == "pretrained":
        if pretrained is None:
            raise ConfigError("init = 'pretrained': name the model in pretrained (hub id or folder)")
        config = load_config(pretrained, "student")
        if layers > config.num_hidden_layers:
            raise ConfigError(
                f"a student of {layers} layers: the model '{pretrained}' has only {config.num_hidden_layers}"
            )
    else:
        config = copy.deepcopy(teacher_config)
    names = [str(teacher_config.id2label[i]) for i in range(teacher_config.num_labels)]
    give_labels(config, names, problem_of(teacher_config))
    _keep_layers(config, chosen if init == "mapped" else list(range(1, layers + 1)))
    for name, value in narrower.items():
        setattr(config, name, value)
    if (heads := getattr(config, "num_attention_heads", None)) and config.hidden_size % heads:
        raise ConfigError(
            f"attention_heads = {config.num_attention_heads}: must divide hidden_size = {config.hidden_size}"
        )
    return config


def _keep_layers(config: Any, kept: list[int]) -> None:
    """Reduce a configuration to these of its layers (from 1), with what it says of each of them (layer_types)."""
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if ("layer" in name or name in PER_LAYER) and isinstance(value, (list, tuple)) and len(value) == before:
            setattr(config, name, [value[k - 1] for k in kept])
    config.num_hidden_layers = len(kept)


def build_student(teacher: Any, layers: int, init: Init = "mapped", *, allow_bin: bool = False, **options: Any) -> Any:
    """A student of `layers` layers in the family of a fine-tuned `teacher`, as a plain classifier of its kind.

    mapped      embeddings, head and layers I(1) .. I(K) of the teacher (see `matched_layers`)
    first       embeddings, head and layers 1 .. K of the teacher
    pretrained  the first K layers of the model `pretrained` names (hub id or folder); its head is kept if it has the
                teacher's label names in the same order, and is fresh otherwise
    random      fresh weights
    options: as in `student_config`; hidden_size, attention_heads and intermediate_size make a narrower student, init
    random only. Raises ConfigError, or ModelError where layers cannot take one another's place.
    """
    name_head(teacher)
    config = student_config(teacher.config, layers, init, **options)
    if init == "pretrained":
        return pretrained_student(options["pretrained"], config, allow_bin)
    student = type(teacher)(config)
    if init != "random":
        M = teacher.config.num_hidden_layers
        mapped = matched_layers(layers, M, options.get("layer_map"))
        if init == "mapped" and options.get("layer_map") is not None and not layer_lists(teacher, student):
            raise ModelError(
                f"layer_map = {mapped}: the layers of a '{teacher.config.model_type}' model share their weights, so "
                "there are no layers to choose from. Leave layer_map out."
            )
        _copy_layers(teacher, student, mapped if init == "mapped" else list(range(1, layers + 1)))
    return student


def labelled_config(name: str, layers: int | None, labels: Sequence[str]) -> Any:
    """Configuration of a pretrained encoder's first layers (null: all) as a classifier with these labels. Raises
    ConfigError.
    """
    config = load_config(name, "student")
    give_labels(config, labels)
    return student_config(config, layers or config.num_hidden_layers, "pretrained", pretrained=name)


def pretrained_student(name: str, config: Any, allow_bin: bool = False) -> Any:
    """The classifier that a configuration describes, with the weights of a pretrained model, as far as it has them."""
    given = label_names(load_config(name, "student"))
    student = load_pretrained(
        auto_class(config),
        name,
        "student",
        config=config,
        dtype=torch.float32,
        allow_bin=allow_bin,
        needs="first layers",
    )
    if not given or given != label_names(config):  # its outputs may stand for other labels
        fresh = type(student)(config).state_dict()
        prefix = f"{student.base_model_prefix}."
        student.load_state_dict({n: fresh[n] for n in fresh if not n.startswith(prefix)}, strict=False)
    return student


def _copy_layers(teacher: Any, student: Any, chosen: list[int]) -> None:
    """Load the teacher's layers `chosen` (from 1) and everything outside its layers into the student."""
    lists = "|".join(re.escape(name) for name in layer_lists(teacher, student)) or "(?!)"
    place = {source - 1: k for k, source in enumerate(chosen)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        inside = re.match(rf"((?:{lists})\.)(\d+)(\..*)", name)
        if inside is None:
            weights[name] = tensor
        elif int(inside[2]) in place:
            weights[f"{inside[1]}{place[int(inside[2])]}{inside[3]}"] = tensor
    own = student.state_dict()
    differing = [n for n in {**own, **weights} if n not in own or n not in weights or own[n].shape != weights[n].shape]
    if differing:
        others = "first or random, or a layer_map that begins with 1" if chosen[0] > 1 else "random"
        raise ModelError(
            f"the layers of a '{teacher.config.model_type}' model are not alike: layers "
            f"{', '.join(map(str, chosen))} of the teacher do not make a student of {len(chosen)} ({differing[0]}). "
            f"Use init: {others}."
        )
    student.load_state_dict(weights)


def check_head_slices(heads: int, teacher_width: int, source: str) -> None:
    """Raises ConfigError unless the teacher's width can be cut into a slice for each head of the tree's source."""
    if teacher_width % heads:
        raise ConfigError(
            f"the tree is cut into a slice for each of the {source}'s {heads} heads, and the teacher's width "
            f"{teacher_width} is not a multiple of {heads}. Choose a student with a number of heads that divides it, "
            "or a preset without a student tree, random or all tokens (kd, pkd, teacher-tkd)."
        )
