"""Tiny random decoder-only models of every family, with whatever a family has that others lack."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlkd.models.decoder_only import NOISE

EOS, OTHER_EOS, BOS = 1, 7, 3
VALID = 60
PADDED = VALID + 4  # rows beyond the tokenizer
WINDOW = 4  # of sliding attention: shorter than the prompts of the tests

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2}
CAPPED = {**LLAMA, "head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
OWN: dict[str, dict[str, Any]] = {
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma2": CAPPED,
    "gemma3_text": CAPPED,
    "mistral": {**LLAMA, "head_dim": 8, "sliding_window": WINDOW},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {**LLAMA, "head_dim": 8},
    "olmo3": {**LLAMA, "sliding_window": WINDOW},
    "exaone4": {**LLAMA, "sliding_window": WINDOW},
    "cohere2": {**LLAMA, "head_dim": 8, "sliding_window": WINDOW},
    "granite": {**LLAMA, "logits_scaling": 3.0},
    "glm": {**LLAMA, "head_dim": 8},
    "gpt2": {"n_inner": 32},
    "gpt_bigcode": {"n_inner": 32},
    "gptj": {"n_inner": 32, "rotary_dim": 2},
    "codegen": {"n_inner": 32, "rotary_dim": 2},
    "gpt_neox": {"intermediate_size": 32},
    "gpt_neo": {"intermediate_size": 32, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "falcon": {"ffn_hidden_size": 32, "num_kv_heads": 2, "new_decoder_architecture": True},
}


def tiny_decoder(
    family: str = "llama", *, seed: int = 0, words: int = VALID, noise: float = 0.0, **options: Any
) -> Any:
    """A random model in evaluation mode with `words` tokens, 4 more rows than these, and two tokens that end answers.

    noise: every dropout of its configuration; options: fields of it.
    """
    torch.manual_seed(seed)
    ids = {"vocab_size": words + PADDED - VALID, "bos_token_id": BOS, "eos_token_id": [EOS, OTHER_EOS]}
    settings = {**SHAPE, **ids, "pad_token_id": None, **OWN.get(family, LLAMA), **options}
    config = AutoConfig.for_model(family, **settings)
    for name in NOISE:
        if hasattr(config, name):
            setattr(config, name, noise)
    for name in ("initializer_range", "init_std"):
        if hasattr(config, name):
            setattr(config, name, 0.4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at 1 and 0
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def continuing_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word, as decoder-only models have them: `<s>` begins a text, nothing ends it, no padding token."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)
