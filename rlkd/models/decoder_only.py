"""Decoder-only language models: the keys and values of a prompt are computed once, and every answer continues them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..tensors import length_mask, pad_rows, pad_stack
from . import generation
from .batching import batches_by_length, packed_by_length, padding_allowed
from .compat import cache_name, own_generation_config
from .generation import AnswerRules, beam_search_settings
from .heads import Head
from .positions import Positions
from .transformers_model import TransformersModel
from .vocabulary import check_prompts

GEMMA = ("gemma", "gemma2", "gemma3_text")
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", *GEMMA, "gpt2", "gpt_neox", "phi", "phi3", "smollm3", "olmo", "olmo2",
    "olmo3", "granite", "cohere", "cohere2", "opt", "gptj", "gpt_neo", "gpt_bigcode", "codegen", "starcoder2",
    "stablelm", "falcon", "glm", "exaone4", "arcee",
)  # fmt: skip
# Configuration fields that make a forward in training mode random.
NOISE = (
    "attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout", "dropout", "activation_dropout",
    "layerdrop", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout", "classifier_dropout",
)  # fmt: skip
# Time of reading prompts and answers apart, in that of reading them together (measured: 1.16 on a CPU).
APART = 1.15
# Rules that transformers applies to prompt and answer together: an answer alone does not say whether they hold.
OF_WHOLE_TEXTS = ("forced_bos_token_id", "min_length")


def check(config: Any, role: str, name: str, dtype: torch.dtype) -> None:
    """Raises ModelError for a precision in which the model fails silently, and for positions that are not told."""
    if dtype == torch.float16 and config.model_type in GEMMA:
        raise ModelError(
            f"{role} '{name}': float16 overflows to inf in Gemma models, and greedy decoding does not notice. "
            f"Use {role}_dtype: bfloat16 (GPU) or float32."
        )
    if getattr(config, "alibi", False):
        raise ModelError(
            f"{role} '{name}' has ALiBi instead of positions (alibi: true), which rlkd does not pass to the model."
        )


def positions(config: Any) -> Positions:
    """The context window."""
    return Positions(together=config.max_position_embeddings)


def read_rules(config: Any, generation_config: Any, role: str, name: str, valid_vocab: int) -> AnswerRules:
    """As `generation.read_rules`, for answers that continue their prompts. Raises ModelError for rules of whole texts,
    too.
    """
    for key in OF_WHOLE_TEXTS:
        if value := getattr(generation_config, key, None):
            raise ModelError(
                f"{role} '{name}': its generation_config sets {key} = {value}, which in a decoder-only model counts "
                "the prompt as well. Remove it from generation_config.json."
            )
    return generation.read_rules(config, generation_config, role, name, valid_vocab, continues=True)


@dataclass(frozen=True)
class DecoderOnly(TransformersModel):
    """`LanguageModel` of a decoder-only transformer.

    The state of a prompt is [P F + D]: for each of its P tokens the F keys and values of all layers, then the head
    input of the answer's first token. While the model trains, it is the prompt's ids [P]: they are read with each
    answer, or once for all of a prompt's answers where that is less work. Layers that are checkpointed keep no keys and
    values, so that each answer reads its prompt.
    """

    read_rules = staticmethod(read_rules)

    @property
    def positions(self) -> Positions:
        return positions(self.config)

    def head(self) -> Head:
        """As in LanguageModel."""
        projection, config = self._projection(), self._base.config
        cap = getattr(config, "final_logit_softcapping", None)
        return Head(projection.weight, projection.bias, logit_scale(config), self.valid_vocab, self.rules, cap)

    def prompt_states(self, prompts: list[list[int]], batch_tokens: int | None = 4096) -> list[Tensor]:
        """As in LanguageModel, batched by length so that little padding is read."""
        check_prompts(prompts, self.config.vocab_size)
        self.positions.check(max(map(len, prompts), default=0))
        if self._checkpointed or (self.model.training and torch.is_grad_enabled()):
            return [torch.tensor(prompt, device=self.device) for prompt in prompts]
        return self._computed(prompts, batch_tokens)

    def _computed(self, prompts: list[list[int]], batch_tokens: int | None) -> list[Tensor]:
        """The states that hold keys and values."""
        from transformers import DynamicCache

        states: list[Any] = [None] * len(prompts)
        for rows in batches_by_length([len(p) for p in prompts], batch_tokens, padding_allowed(self.device)):
            # Padding after a prompt is never seen from it.
            ids, mask = pad_rows([prompts[i] for i in rows], self.pad_id, self.device)
            cache = DynamicCache()
            hidden = self._forward(ids, mask, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), cache)
            packed = torch.cat([part.transpose(1, 2).flatten(2) for part in _parts(cache)], -1)
            for i, row, last, n in zip(rows, packed, hidden, mask.sum(1).tolist(), strict=True):
                states[i] = torch.cat([row[:n].flatten(), last[n - 1]])
        return states

    def answer_hidden(
        self, states: list[Tensor], answer_ids: Tensor, answer_mask: Tensor, batch_tokens: int | None = 4096
    ) -> Tensor:
        """As in LanguageModel."""
        if batch_tokens and _are_ids(states) and self._shares(states, int(answer_mask.sum())):
            made = dict(zip(map(id, states), states, strict=True))
            computed = self._computed([state.tolist() for state in made.values()], batch_tokens)
            by_prompt = dict(zip(made, computed, strict=True))
            states = [by_prompt[id(state)] for state in states]
        follow = self._with_prompts if _are_ids(states) else self._after_prompts
        lengths = self._prompt_lengths(states)

        def forward(rows: list[int], ids: Tensor) -> Tensor:
            self.positions.check(max(lengths[i] for i in rows), ids.shape[1])
            # The last token predicts nothing.
            return follow([states[i] for i in rows], ids[:, :-1])

        return packed_by_length(forward, lengths, answer_ids, answer_mask, batch_tokens)

    def start(self, states: list[Tensor]) -> _Decoding:
        """As in LanguageModel. Raises ModelError while gradient checkpointing is on: call model.eval() before."""
        if self._checkpointed:
            raise ModelError(
                "a decoder-only model that trains with gradient checkpointing keeps no keys and values to decode with. "
                "Call model.eval() first."
            )
        return _Decoding(
            self, self._computed([state.tolist() for state in states], 4096) if _are_ids(states) else states
        )

    def beam_search(
        self, prompts: list[list[int]], *, num_beams: int, num_answers: int, max_new_tokens: int
    ) -> list[list[int]]:
        """As in LanguageModel."""
        rules = self.rules
        width = max(map(len, prompts))
        self.positions.check(width, max_new_tokens)
        # On the left, so that answers follow their prompts.
        ids = torch.tensor([[rules.pad_id] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = _left_mask([len(prompt) for prompt in prompts], self.device)
        beyond = range(self.valid_vocab, self.config.vocab_size)
        search = {"num_beams": num_beams, "num_return_sequences": num_answers, "max_new_tokens": max_new_tokens}
        settings = beam_search_settings(rules, beyond, **search)
        with own_generation_config(self.model):
            sequences = self.model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        return [rules.up_to_end(row) for row in sequences[:, width:].tolist()]

    # Parts of the transformers model

    @property
    def _checkpointed(self) -> bool:
        """Whether layers would drop the cache that they are given."""
        # transformers 5.24 renamed the property of the model that says it.
        return self.model.training and any(getattr(m, "gradient_checkpointing", False) for m in self._base.modules())

    def _shares(self, states: list[Tensor], answer_tokens: int) -> bool:
        """Whether to read each prompt once: less work, if enough of these ids are of the same prompt."""
        once = sum(map(len, {id(state): state for state in states}.values()))
        each = sum(map(len, states))
        return not self._checkpointed and APART * (once + answer_tokens) < each + answer_tokens

    @cached_property
    def _layout(self) -> list[tuple[int, int]]:
        """(heads, width of each) of the keys and the values of every layer, in the order of a state."""
        from transformers import DynamicCache

        cache, one = DynamicCache(), torch.zeros((1, 1), dtype=torch.long, device=self.device)
        with torch.no_grad():
            self._forward(one, torch.ones_like(one).bool(), one, cache)
        return [(part.shape[1], part.shape[3]) for part in _parts(cache)]

    @property
    def _token_size(self) -> int:
        """F, the keys and values of one token."""
        return sum(heads * width for heads, width in self._layout)

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any = None) -> Tensor:
        """Head inputs [B, T, D] of ids [B, T] at `places` [B, T]; mask [B, C + T] bool of the C tokens in the cache,
        which grows, and of these.
        """
        decoder = self._base.base_model
        cached = {} if cache is None else {cache_name(decoder): cache}
        out = decoder(
            input_ids=ids, attention_mask=mask.long(), position_ids=places, use_cache=cache is not None, **cached
        )
        return out.last_hidden_state

    def _prompt_lengths(self, states: list[Tensor]) -> list[int]:
        if _are_ids(states):
            return [len(state) for state in states]
        return [(len(state) - self.width) // self._token_size for state in states]

    def _with_prompts(self, states: list[Tensor], ids: Tensor) -> Tensor:
        """Head inputs [B, T + 1, D] at the last token of each prompt and at ids [B, T] after it, read together."""
        texts = pad_stack([torch.cat([state, row]) for state, row in zip(states, ids, strict=True)])
        mask = length_mask([len(state) + ids.shape[1] for state in states]).to(ids.device)
        hidden = self._forward(texts, mask, torch.arange(texts.shape[1], device=ids.device).expand_as(texts))
        return torch.stack(
            [row[len(state) - 1 :][: ids.shape[1] + 1] for state, row in zip(states, hidden, strict=True)]
        )

    def _after_prompts(self, states: list[Tensor], ids: Tensor) -> Tensor:
        """As `_with_prompts`, from the prompts' keys and values."""
        cache, mask, last = self.resume(states)
        if not ids.shape[1]:
            return last[:, None]
        places = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        seen = torch.cat([mask, torch.ones_like(ids).bool()], 1)
        return torch.cat([last[:, None], self._forward(ids, seen, places, cache)], 1)

    def resume(self, states: list[Tensor]) -> tuple[Any, Tensor, Tensor]:
        """transformers' cache of the prompts, their mask [B, P] bool, and the head inputs [B, D] after them."""
        from transformers import DynamicCache

        lengths = self._prompt_lengths(states)
        most, size = max(lengths), self._token_size
        # On the left: a sliding window counts places in the cache, so nothing may lie between prompt and answer.
        rows = [
            torch.nn.functional.pad(state[: n * size].view(n, size), (0, 0, most - n, 0))
            for state, n in zip(states, lengths, strict=True)
        ]
        parts = torch.stack(rows).split([heads * width for heads, width in self._layout], -1)
        shaped = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self._layout, strict=True)]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(shaped[::2], shaped[1::2], strict=True)):
            cache.update(keys, values, layer)
        last = torch.stack([state[n * size :] for state, n in zip(states, lengths, strict=True)])
        return cache, _left_mask(lengths, self.device), last


class _Decoding:
    """`DecodingState` of a decoder-only model: transformers' cache, padded on the left, and which of it counts."""

    def __init__(self, lm: DecoderOnly, states: list[Tensor]):
        self.lm = lm
        self.cache, self.mask, self.last = lm.resume(states)
        self.places = self.mask.sum(1)  # of the next token

    def step(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            self.lm.positions.check(self.mask.shape[1], 1)
            return self.last
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.lm.positions.check(self.mask.shape[1], 1)
        hidden = self.lm._forward(tokens[:, None], self.mask, self.places[:, None], self.cache)
        self.places = self.places + 1
        return hidden[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.mask, self.places = self.mask[rows], self.places[rows]
        self.cache.batch_select_indices(rows)
        spare = self.mask.shape[1] - int(self.places.max())
        if spare:
            # The longest prompt is gone: its padding in the others costs attention at every step.
            self.mask = self.mask[:, spare:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]


def logit_scale(config: Any) -> float:
    """Granite divides its logits by a number, Cohere multiplies them with one."""
    return getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0)


def _are_ids(states: list[Tensor]) -> bool:
    """Whether states are those of training."""
    return bool(states) and not states[0].is_floating_point()


def _parts(cache: Any) -> list[Tensor]:
    """Keys and values [B, heads, T, width] of each layer, in the order of a state."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def _left_mask(lengths: list[int], device: torch.device) -> Tensor:
    """Boolean mask [B, P] that is True for the last `lengths[i]` places of row i."""
    return length_mask(lengths).flip(1).to(device)
