"""Saving students, whole or as adapters, so that other programs read them as they were trained."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ..errors import ConfigError, ModelError
from ..io.files import check_folder
from .adapters import record_base
from .encoder_decoder import T5_FAMILY, output_scale
from .generation import rules_of
from .language_model import LanguageModel
from .not_applied import OF_SEARCH
from .spec import ModelSpec

# Settings of how to search: rlkd decodes greedily when it evaluates.
SEARCH = (
    "do_sample", "num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "early_stopping",
    "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "penalty_alpha", "max_length", "max_time", *OF_SEARCH,
)  # fmt: skip


def save_student(
    model: Any, folder: str | Path, generation: Any = None, weights: dict[str, Tensor] | None = None
) -> None:
    """Write what `from_pretrained` loads: the model, or its adapter with the checksums of a local base model.

    generation: the transformers.GenerationConfig to save with it, by default the model's own. weights: of the model,
    whole, if it is sharded.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = getattr(base, "generation_config", None)
    if generation is not None:
        base.generation_config = generation
    try:
        with as_weights_are(base, weights) as saved:
            model.save_pretrained(folder, **({"state_dict": saved} if base is model and saved else {}))
        if base is not model:
            config = next(iter(model.peft_config.values()))
            if base.can_generate():
                base.generation_config.save_pretrained(folder)
            record_base(Path(folder), str(config.base_model_name_or_path))
    finally:
        if generation is not None:
            base.generation_config = kept


@contextmanager
def as_weights_are(model: Any, weights: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor] | None]:
    """The configuration of a T5 model says meanwhile whether its head is tied; yields the weights to save, None for its
    own. weights: what is yielded where nothing has to be added, in place of its own.

    transformers 5 sets tie_word_embeddings to True for all of them, reads False as "no output scale", and ties by what
    the file of weights holds. transformers 4 and converters tie and scale by the field alone. So an untied, unscaled
    head is saved as False, and mT5's, which transformers 5 never scales, with a copy of its own where it is tied.
    """
    config, head = model.config, model.get_output_embeddings()
    if config.model_type not in T5_FAMILY or head is None or output_scale(config) != 1.0:
        yield weights
        return
    tied = head.weight is model.get_input_embeddings().weight
    if tied and config.model_type != "mt5":
        yield weights
        return
    kept, config.tie_word_embeddings = config.tie_word_embeddings, False
    try:
        if tied:
            own = weights or model.state_dict()
            weights = {**own, "lm_head.weight": own["lm_head.weight"].clone()}
        yield weights
    finally:
        config.tie_word_embeddings = kept


def evaluated_generation(lm: LanguageModel, max_new_tokens: int) -> Any:
    """A GenerationConfig under which plain `generate()` gives the greedy answers that rlkd evaluates: the model's own
    facts (start, end, forced and forbidden tokens), this length, and no ids beyond the tokenizer's.
    """
    generation = copy.deepcopy(lm.model.generation_config)
    beyond = range(lm.valid_vocab, lm.model.config.vocab_size)
    rules = rules_of(lm)
    ends = list(rules.eos_ids)
    facts = {
        "max_new_tokens": max_new_tokens,
        "suppress_tokens": sorted({*(generation.suppress_tokens or ()), *beyond}) or None,
        "pad_token_id": lm.pad_id,
        "eos_token_id": ends if len(ends) > 1 else lm.eos_id,
    }
    facts |= dict.fromkeys((name for name, _ in rules.ignored), None)
    if rules.start_id is not None:
        facts["decoder_start_token_id"] = rules.start_id
    defaults = GenerationConfig()
    generation.update(**{**{name: getattr(defaults, name, None) for name in SEARCH}, **facts})
    return generation


def merge_adapter(name: str, out: str | Path, *, dtype: str = "float32", allow_bin: bool = False) -> None:
    """Write an adapter's base model with the adapter merged into it, and the tokenizer, to the new folder `out`.

    Raises ModelError if `name` is not an adapter that loads, ConfigError if `out` holds something.
    """
    out = Path(out)
    check_new(out)
    spec = ModelSpec(name, "adapter", dtype=dtype, allow_bin=allow_bin)
    if spec.adapter is None:
        raise ModelError(f"adapter '{name}' is a whole model, not an adapter: there is nothing to merge.")
    spec.check()
    merged = spec.load()
    with new_folder(out) as unfinished:
        save_student(merged, unfinished)
        spec.tokenizer.save_pretrained(unfinished)


def check_new(out: Path) -> None:
    """Raise ConfigError unless `out` is empty, or can be made."""
    check_folder(out.parent)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name a new one.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all is written. Raises as `check_new`."""
    check_new(out)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    os.rename(unfinished, out)
