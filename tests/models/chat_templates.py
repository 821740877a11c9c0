"""Byte-level tokenizers with chat templates of three kinds, and tiny models for them."""

from __future__ import annotations

from typing import Any

from models.decoder_families import tiny_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# As SmolLM2's: a system turn of its own; the token that ends a turn ends a text and pads, too.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: the template writes the token that the tokenizer writes as well, and trims.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|header|>\n\n' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}"
)
# As Gemma's: no system turn; turns end otherwise than texts.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# kind -> template, special tokens, that which begins texts, that which ends them, the ends of the checkpoint.
KINDS: dict[str, tuple[str, list[str], str | None, str, list[str]]] = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", ["<|im_end|>"]),
    "llama3": (LLAMA3, ["<|begin|>", "<|text_end|>", "<|start|>", "<|header|>", "<|eot|>"], "<|begin|>", "<|eot|>",
               ["<|text_end|>", "<|eot|>"]),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<turn>", "<end_of_turn>"], "<bos>", "<eos>", ["<eos>", "<end_of_turn>"]),
}  # fmt: skip
TURN_ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<end_of_turn>"}


def chat_tokenizer(kind: str = "chatml") -> PreTrainedTokenizerFast:
    """One token per byte and per special token; a text begins with the first, if the kind has one."""
    template, special, begin, end, _ = KINDS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin is not None:
        ids = [(begin, special.index(begin))]
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
    roles = {"eos_token": end, "pad_token": end, **({} if begin is None else {"bos_token": begin})}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=special, **roles)
    made.chat_template = template
    return made


def chat_model(kind: str = "chatml", *, seed: int = 0, family: str = "llama", **options: Any) -> Any:
    """A random model of that tokenizer, which may end texts and turns."""
    tokenizer = chat_tokenizer(kind)
    ends = tokenizer.convert_tokens_to_ids(KINDS[kind][4])
    ids = {"eos_token_id": ends, "pad_token_id": ends[0], "bos_token_id": tokenizer.bos_token_id}
    return tiny_decoder(family, seed=seed, words=len(tokenizer), max_position_embeddings=256, **{**ids, **options})
