"""The model that a job trains, from TRL's settings: named, checked without weights, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import set_seed

from ..errors import ConfigError
from ..models.adapters import add_adapter, check_same_settings, without_dropout
from ..models.architectures import architecture_of
from ..models.spec import ModelSpec
from ..settings.trl_compat import ModelConfig, get_peft_config, get_quantization_config


def student_spec(student: ModelConfig, settings: Mapping[str, Any]) -> ModelSpec:
    """The model that TRL's settings name. It stays where it loads: the trainer places it. With use_peft an adapter is
    trained further, otherwise merged. settings: allow_bin, src_lang, tgt_lang and, where there are such settings,
    student_chat, student_system_prompt and random_weights. Raises ConfigError if none is named.
    """
    if not student.model_name_or_path:
        raise ConfigError("model_name_or_path is not set: name the student, e.g. google-t5/t5-base")
    spec = ModelSpec(
        student.model_name_or_path,
        "student",
        revision=student.model_revision,
        dtype=student.dtype if student.dtype not in (None, "auto") else "float32",
        attention=student.attn_implementation,
        quantization=get_quantization_config(student),
        allow_bin=settings["allow_bin"],
        keep_adapter=student.use_peft,
        random_weights=settings.get("random_weights", False),
        src_lang=settings["src_lang"],
        tgt_lang=settings["tgt_lang"],
        chat=settings.get("student_chat"),
        system_prompt=settings.get("student_system_prompt"),
    )
    if student.use_peft:
        student.lora_task_type = architecture_of(spec.config, "student", spec.name).lora_task_type
    return spec


def check_adapter_settings(spec: ModelSpec, student: ModelConfig) -> None:
    """Raise ConfigError if an adapter that is trained further has other settings than these."""
    if student.use_peft and spec.adapter:
        check_same_settings(spec.adapter, _peft_config(student))


def load_student(spec: ModelSpec, student: ModelConfig, seed: int) -> Any:
    """The model with its weights, with use_peft as an adapter; what starts at random is a function of the seed. Raises
    as `ModelSpec.load` does.
    """
    if spec.random_weights:
        set_seed(seed)
    model = spec.load()
    if student.use_peft and not spec.adapter:
        set_seed(seed)
        model = add_adapter(model, _peft_config(student))
    return without_dropout(model) if student.use_peft else model


def _peft_config(student: ModelConfig) -> Any:
    """PEFT's configuration. TRL turns a list of one module into a string, which PEFT would match as a whole path."""
    config: Any = get_peft_config(student)
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}
    return config
