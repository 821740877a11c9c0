"""Models by name: checks that need no weights, then the weights.

Imports torch only when something is read, so that the command line can show the choices at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from .adapters import Adapter
    from .generation import AnswerRules
    from .language_model import LanguageModel
    from .positions import Positions
    from .teacher import Teacher

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]


class ModelSource(Protocol):
    """A language model, loaded or not. All but `language_model` is known before the weights load.

    config      transformers' configuration
    dtype       precision of the weights, as `float32`
    device      where it computes: `cpu`, `cuda`, `cuda:1` ...; None: the CPU
    valid_vocab  V, the number of ids that are tokens
    quantized   whether bitsandbytes has rounded, or will round, its weights
    adapted     whether it has PEFT adapters
    rules       what its checkpoint says of answers
    """

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def valid_vocab(self) -> int: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def adapted(self) -> bool: ...
    @property
    def rules(self) -> AnswerRules: ...

    def language_model(self, device: str | None = None) -> LanguageModel:
        """The model with its weights; `device`, where weights that are not loaded yet go instead of `self.device`."""
        ...

    def full_precision(self) -> ModelSource:
        """The same model without the quantization that loading would apply."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how to load it. Configuration and tokenizer are read once, on first use.

    name          local folder or hub id
    role          what it is in errors: teacher, student ...
    revision      branch, tag or commit of a hub id
    dtype         precision of the weights
    quantization  bitsandbytes' settings (`models.loading.quantization_config`), or None
    attention     transformers' name of the attention implementation; None: its default
    device        where the weights go; None: where they load. bitsandbytes places quantized weights itself
    allow_bin     load pickled weights (.bin) where there are no safetensors
    keep_adapter  an adapter is trained further, not merged into its base
    served        a server has the weights: none need be here
    random_weights  of its configuration and size, with weights from torch's random numbers: none need be here
    src_lang, tgt_lang    languages of prompts and answers, for models that translate; None: the checkpoint's
    chat          prompts stand in the tokenizer's chat template, after `system_prompt` if there is one; None: as the
                  tokenizer was saved
    """

    name: str
    role: str
    revision: str | None = None
    dtype: str = "float32"
    quantization: Any = None
    attention: str | None = None
    device: str | None = None
    allow_bin: bool = False
    keep_adapter: bool = False
    served: bool = False
    random_weights: bool = False
    src_lang: str | None = None
    tgt_lang: str | None = None
    chat: bool | None = None
    system_prompt: str | None = None

    @cached_property
    def config(self) -> Any:
        """The configuration. Raises ModelError if there is none, if such a model cannot take the role, or if its files
        are damaged.
        """
        from .loading import check_config, check_saved_weights, load_config, resolve_dtype

        config = load_config(self.name, self.role, self.revision)
        check_config(config, self.role, self.name, resolve_dtype(self.dtype, f"{self.role}_dtype"))
        if not (self.served or self.random_weights):
            check_saved_weights(self.name, self.role, self.revision, allow_bin=self.allow_bin)
        return config

    @cached_property
    def adapter(self) -> Adapter | None:
        """The adapter that it is, None for a whole model. Raises ModelError if its base is gone or has changed."""
        from .adapters import adapter_of

        return adapter_of(self.name, self.role, self.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, set to its chat template if asked for. Raises ModelError if there is
        none, and as `chat.as_asked`.
        """
        from .chat import as_asked
        from .vocabulary import load_tokenizer

        tokenizer = load_tokenizer(self.name, self.role, self.revision)
        return as_asked(tokenizer, self.chat, self.system_prompt, self.role, self.name)

    @cached_property
    def valid_vocab(self) -> int:
        """V, the number of ids that are tokens. Raises ModelError if the model has no embedding for all of them."""
        from .vocabulary import check_ends, fitted_vocab

        config = self.config
        check_ends(self.tokenizer, self.role, self.name)
        return fitted_vocab(self.tokenizer, config, self.role, self.name)

    @cached_property
    def rules(self) -> AnswerRules:
        """What the checkpoint says of answers, in the language asked for. Raises ModelError if that cannot be read or
        applied.
        """
        from .architectures import architecture_of
        from .chat import end_turns
        from .generation import load_generation_config
        from .languages import in_languages
        from .not_applied import check_supported, say_ignored

        generation = load_generation_config(self.name, self.role, self.revision)
        check_supported(generation, self.role, self.name)
        end_turns(generation, self.config, self.tokenizer)
        read_rules = architecture_of(self.config, self.role, self.name).rules
        rules = read_rules(self.config, generation, self.role, self.name, self.config.vocab_size)
        rules = rules.within(self.valid_vocab)
        say_ignored(rules.ignored, self.role, self.name)
        return in_languages(rules, self.tokenizer, self.src_lang, self.tgt_lang, self.role, self.name)

    def check(self) -> None:
        """Checks everything that needs no weights. Raises ModelError."""
        _ = self.config, self.valid_vocab, self.rules

    @property
    def positions(self) -> Positions:
        """How long prompts and answers may be."""
        from .architectures import architecture_of

        return architecture_of(self.config, self.role, self.name).positions(self.config)

    def check_lengths(self, max_input_tokens: int, max_new_tokens: int | None = None) -> None:
        """Raises ConfigError if the model has fewer positions than prompts or answers of these lengths need, or its
        chat template alone fills the prompts.
        """
        from .chat import chat_of

        whose = f"{self.role} '{self.name}' ('{self.config.model_type}')"
        self.positions.check_settings(max_input_tokens, max_new_tokens, whose)
        if (chat := chat_of(self.tokenizer)) is not None:
            chat.check_room(max_input_tokens, whose)

    @property
    def quantized(self) -> bool:
        return self.quantization is not None or getattr(self.config, "quantization_config", None) is not None

    @property
    def adapted(self) -> bool:
        return self.adapter is not None and (self.keep_adapter or self.quantized)

    def load(self, device: str | None = None) -> Any:
        """The transformers model. Raises ModelError if the checkpoint lacks weights, and as `config` does."""
        from . import loading

        how: dict[str, Any] = {"dtype": self.dtype, "revision": self.revision, "attention": self.attention}
        if self.random_weights:
            model = loading.random_model(self.name, self.role, **how)
        else:
            model = loading.load_model(
                self.name,
                self.role,
                quantization=self.quantization,
                allow_bin=self.allow_bin,
                keep_adapter=self.keep_adapter,
                **how,
            )
        if self.tgt_lang is not None:  # a saved student keeps it
            model.generation_config.forced_bos_token_id = self.rules.first
            model.generation_config.decoder_start_token_id = self.rules.start_id
        where = device or self.device
        return model if where is None or self.quantized else model.to(where)

    def language_model(self, device: str | None = None) -> LanguageModel:
        """The model as rlkd's algorithms use it. Raises as `load` and `valid_vocab` do."""
        from .architectures import language_model

        self.check()
        return language_model(self.load(device), self.tokenizer)

    def full_precision(self) -> ModelSpec:
        return self if self.quantization is None else replace(self, quantization=None)


@dataclass(frozen=True)
class LoadedModel:
    """A language model in memory as a `ModelSource`."""

    lm: LanguageModel

    @property
    def config(self) -> Any:
        return self.lm.model.config

    @property
    def dtype(self) -> str:
        return str(self.lm.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.lm.device)

    @property
    def valid_vocab(self) -> int:
        return self.lm.valid_vocab

    @property
    def quantized(self) -> bool:
        return getattr(self.lm.model, "is_quantized", False)

    @property
    def adapted(self) -> bool:
        return hasattr(self.lm.model, "get_base_model")

    @property
    def rules(self) -> AnswerRules:
        from .generation import rules_of

        return rules_of(self.lm)

    def language_model(self, device: str | None = None) -> LanguageModel:
        return self.lm

    def full_precision(self) -> LoadedModel:
        return self


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher by name; fields as in `Teacher`. The engine that decodes its labels may never load it in PyTorch.

    input_eos  `Teacher.append_eos` as it was asked for
    """

    model: ModelSpec
    max_input_tokens: int = 512
    input_eos: bool | None = None

    @cached_property
    def append_eos(self) -> bool:
        """Whether its prompts end with end-of-sequence. Raises ConfigError as `Teacher` does."""
        from .vocabulary import end_of_prompts

        return end_of_prompts(self.input_eos, self.rules, self.tokenizer)

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def rules(self) -> AnswerRules:
        return self.model.rules

    @property
    def longest_answer(self) -> int | None:
        """Tokens of the longest answer that the model has positions for; None: any length."""
        return self.model.positions.longest_answer(self.max_input_tokens)

    def load(self, **options: Any) -> Teacher:
        """The teacher in PyTorch; options, further fields. Raises as `ModelSpec.language_model` does."""
        from .teacher import Teacher

        return Teacher(
            self.model.language_model(),
            self.tokenizer,
            max_input_tokens=self.max_input_tokens,
            append_eos=self.append_eos,
            **options,
        )


def check_pair(teacher: ModelSpec, student: ModelSpec) -> int:
    """V of two models with the same vocabulary, whose answers begin and end alike. Raises ModelError unless they do, or
    if one cannot take its role.
    """
    from ..errors import ModelError
    from .generation import check_same_format
    from .vocabulary import check_same_vocabulary

    _ = teacher.config, student.config
    check_same_vocabulary(teacher.tokenizer, student.tokenizer, teacher.name, student.name)
    size = teacher.valid_vocab
    if size != student.valid_vocab:
        raise ModelError(
            f"teacher '{teacher.name}' has embeddings for {size:,} of the tokens that they share, and student "
            f"'{student.name}' for {student.valid_vocab:,}. Choose a student of the teacher's family."
        )
    check_same_format(teacher.rules, student.rules, (teacher.name, student.name))
    return size


def paired(teacher: ModelSpec, student: ModelSpec) -> str | None:
    """What is done for two models with different vocabularies, in words; None for a shared one. Raises as `check_pair`
    does then.
    """
    from .vocabulary import same_vocabulary

    if same_vocabulary(teacher.tokenizer, student.tokenizer):
        check_pair(teacher, student)
        return None
    sizes = " and ".join(f"{len(spec.tokenizer.get_vocab()):,}" for spec in (teacher, student))
    return (
        f"teacher '{teacher.name}' and student '{student.name}' have different vocabularies ({sizes} tokens): answers "
        "are scored as text in the teacher's tokens, and each token of the student gets its share by characters"
    )


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
