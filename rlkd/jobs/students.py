"""The student of TRL's settings: its name and how to load it, then the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import set_seed

from ..models.adapters import add_adapter, without_dropout
from ..models.spec import ModelSpec
from ..settings.trl_compat import ModelConfig, get_peft_config, get_quantization_config

if TYPE_CHECKING:
    from .setup import DataArguments, TeacherArguments


def student_spec(data: DataArguments, student: ModelConfig, teacher: TeacherArguments) -> ModelSpec:
    """The student of TRL's settings. It stays where it loads: the trainer places it. With use_peft an adapter is
    trained further, otherwise merged.
    """
    return ModelSpec(
        str(student.model_name_or_path),
        "student",
        revision=student.model_revision,
        dtype=student.dtype if student.dtype not in (None, "auto") else "float32",
        attention=student.attn_implementation,
        quantization=get_quantization_config(student),
        allow_bin=teacher.allow_bin,
        keep_adapter=student.use_peft,
        src_lang=teacher.src_lang,
        tgt_lang=teacher.tgt_lang,
        chat=data.student_chat,
        system_prompt=data.student_system_prompt,
    )


def peft_config(student: ModelConfig) -> Any:
    """PEFT's configuration. TRL turns a list of one module into a string, which PEFT would match as a whole path."""
    config: Any = get_peft_config(student)
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}
    return config


def load_student(spec: ModelSpec, student: ModelConfig, seed: int) -> Any:
    """The model, with use_peft as PEFT's, of which a new adapter starts at random. Raises as `ModelSpec.load` and
    `add_adapter` do.
    """
    model = spec.load()
    if not student.use_peft:
        return model
    if not spec.adapter:
        set_seed(seed)
        model = add_adapter(model, peft_config(student))
    return without_dropout(model)
