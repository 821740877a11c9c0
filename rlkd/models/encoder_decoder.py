"""Encoder-decoder language models (T5, BART, T5Gemma ...): encode once, decode against the encoder's states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..records import given
from ..tensors import length_mask, pad_rows, pad_stack
from .batching import batches_by_length, packed_by_length, padding_allowed
from .compat import cache_name, own_generation_config
from .encoders.attention import RecordedAttention, recorded_attention
from .generation import beam_search_settings, read_rules
from .heads import Head
from .positions import Positions
from .transformers_model import TransformersModel
from .vocabulary import check_prompts

T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
BART_FAMILY = ("bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "plbart", "led")
M2M_FAMILY = ("m2m_100",)  # BART with computed positions and no bias on its logits; NLLB, too
T5GEMMA = "t5gemma"  # Gemma's layers, in which encoder and decoder may differ in width
FAMILIES = (*T5_FAMILY, *BART_FAMILY, *M2M_FAMILY, T5GEMMA)
# Configuration fields that make a forward in training mode random.
NOISE = (
    "dropout_rate",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "classifier_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "router_jitter_noise",
)


def check_precision(config: Any, role: str, name: str, dtype: torch.dtype) -> None:
    """Raises ModelError for a precision in which the model fails silently."""
    if dtype == torch.float16 and config.model_type in (*T5_FAMILY, T5GEMMA):
        raise ModelError(
            f"{role} '{name}': float16 overflows to inf in T5 models, and greedy decoding does not notice. "
            f"Use {role}_dtype: bfloat16 (GPU) or float32."
        )


def positions(config: Any) -> Positions:
    """The texts that the model has position embeddings for."""
    if config.model_type == "led":
        return Positions(config.max_encoder_position_embeddings, config.max_decoder_position_embeddings)
    if config.model_type == T5GEMMA:
        return Positions(config.encoder.max_position_embeddings, config.decoder.max_position_embeddings)
    limit = config.max_position_embeddings if config.model_type in BART_FAMILY else None
    return Positions(limit, limit)


@dataclass(frozen=True, slots=True)
class Layers:
    """hidden, the outputs [B, L, D] of an encoder's or decoder's layers, the first one first; scores [B, H, L, L] of
    their self-attention before softmax, if asked for, -inf where a token does not see another; mask [B, L], the tokens
    that count.
    """

    hidden: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    mask: Tensor


@dataclass(frozen=True)
class EncoderDecoder(TransformersModel):
    """`LanguageModel` of an encoder-decoder; the state of a prompt is its encoder states [P_i, D]."""

    read_rules = staticmethod(read_rules)

    @property
    def start_id(self) -> int:
        """The decoder's input before the first token of an answer. T5's is the padding token."""
        return given(self.rules.start_id)

    @property
    def positions(self) -> Positions:
        return positions(self.config)

    @property
    def depths(self) -> dict[str, int]:
        """Layers of encoder and decoder."""
        config = self.config
        decoder = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        return {"encoder": config.num_hidden_layers, "decoder": decoder}

    def head(self) -> Head:
        """As in LanguageModel."""
        base, projection = self._base, self._projection()
        # BART adds a buffer to its logits; T5's head has no bias.
        bias = getattr(base, "final_logits_bias", None)
        bias = projection.bias if bias is None else bias.view(-1)
        cap = getattr(getattr(base.config, "decoder", None), "final_logit_softcapping", None)
        return Head(projection.weight, bias, output_scale(base.config), self.valid_vocab, self.rules, cap)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states [B, P, D] of prompts [B, P]; `mask` [B, P] bool. Raises ModelError if they are too long."""
        return self._encoder(input_ids, mask).last_hidden_state

    def _encoder(self, input_ids: Tensor, mask: Tensor, **options: Any) -> Any:
        self.positions.check(prompt=input_ids.shape[1])
        return self.model.get_encoder()(input_ids=input_ids, attention_mask=mask.long(), **options)

    def prompt_states(self, prompts: list[list[int]], batch_tokens: int | None = 4096) -> list[Tensor]:
        """Encoder states [P_i, D] of each prompt, batched by length so that little padding is encoded."""
        check_prompts(prompts, self.config.vocab_size)
        states: list[Tensor | None] = [None] * len(prompts)
        for rows in batches_by_length([len(p) for p in prompts], batch_tokens, padding_allowed(self.device)):
            ids, mask = pad_rows([prompts[i] for i in rows], self.pad_id, self.device)
            for i, state, n in zip(rows, self.encode(ids, mask), mask.sum(1).tolist(), strict=True):
                states[i] = state[:n]
        return states  # type: ignore[return-value]

    def hidden(self, states: Tensor, mask: Tensor, answer_ids: Tensor) -> Tensor:
        """Head inputs [B, R, D] that predict `answer_ids` [B, R], teacher-forced from the start token.

        Args: states [B, P, D], mask [B, P] bool: encoder states and which of them count. Answers are right-padded and
        attention is causal, so padding after an answer changes nothing before it.
        """
        return self._decoder(states, mask, answer_ids).last_hidden_state

    def _decoder(self, states: Tensor, mask: Tensor, answer_ids: Tensor, **options: Any) -> Any:
        self.positions.check(answer=answer_ids.shape[1])
        # The decoder reads the answer shifted by one: position t predicts token t from the tokens before it.
        start = torch.full_like(answer_ids[:, :1], self.start_id)
        shifted = torch.cat([start, answer_ids[:, :-1]], dim=1)
        return self.model.get_decoder()(
            input_ids=shifted,
            # All ones: T5's start token is its padding token, so a mask by id would hide it.
            attention_mask=torch.ones_like(shifted),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=False,
            **options,
        )

    def layers(
        self, input_ids: Tensor, input_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, *, scores: bool = False
    ) -> tuple[Layers, Layers]:
        """What the layers of encoder and decoder make of prompts [B, P] and of answers [B, R] to them, teacher-forced,
        as one padded batch; differentiable.

        scores: their self-attention scores, too, of a model that `score_attention` has prepared.
        """
        recording: Callable[[], AbstractContextManager[list[RecordedAttention]]]
        recording = recorded_attention if scores else lambda: nullcontext([])
        with recording() as of_encoder:
            encoded = self._encoder(input_ids, input_mask, output_hidden_states=True)
        with recording() as of_decoder:
            decoded = self._decoder(encoded.last_hidden_state, input_mask, answer_ids, output_hidden_states=True)
        # Where nothing is padded, attention is told that it is causal by no mask.
        later = ~length_mask(list(range(1, answer_ids.shape[1] + 1)), answer_ids.shape[1]).to(answer_ids.device)
        # A decoder layer attends to itself, then to the prompt.
        own = tuple(attention.scores().masked_fill(later, -torch.inf) for attention in of_decoder[::2])
        # The first hidden states are the embeddings.
        return (
            Layers(encoded.hidden_states[1:], tuple(attention.scores() for attention in of_encoder), input_mask),
            Layers(decoded.hidden_states[1:], own, answer_mask),
        )

    def answer_hidden(
        self, states: list[Tensor], answer_ids: Tensor, answer_mask: Tensor, batch_tokens: int | None = 4096
    ) -> Tensor:
        """As in LanguageModel."""

        def forward(rows: list[int], ids: Tensor) -> Tensor:
            mask = length_mask([len(states[i]) for i in rows]).to(ids.device)
            return self.hidden(pad_stack([states[i] for i in rows]), mask, ids)

        return packed_by_length(forward, [len(state) for state in states], answer_ids, answer_mask, batch_tokens)

    def start(self, states: list[Tensor]) -> _Decoding:
        """As in LanguageModel."""
        return _Decoding(self, states)

    def beam_search(
        self, prompts: list[list[int]], *, num_beams: int, num_answers: int, max_new_tokens: int
    ) -> list[list[int]]:
        """As in LanguageModel."""
        rules = self.rules
        ids, mask = pad_rows(prompts, rules.pad_id, self.device)
        self.positions.check(ids.shape[1], max_new_tokens)
        beyond = range(self.valid_vocab, self.config.vocab_size)
        search = {"num_beams": num_beams, "num_return_sequences": num_answers, "max_new_tokens": max_new_tokens}
        settings = beam_search_settings(rules, beyond, **search)
        with own_generation_config(self.model):
            sequences = self.model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        return [rules.up_to_end(row) for row in sequences[:, 1:].tolist()]  # without the start token


class _Decoding:
    """`DecodingState` of an encoder-decoder: padded encoder states and transformers' cache of keys and values."""

    def __init__(self, lm: EncoderDecoder, states: list[Tensor]):
        self.lm = lm
        self.decoder = lm.model.get_decoder()
        self.cache_name = cache_name(self.decoder)
        self.encoded = pad_stack(states)
        self.mask = length_mask([len(s) for s in states]).to(lm.device)
        self.cache: Any = None
        self.length, self.positions = 0, lm.positions

    def step(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            tokens = torch.full((len(self.encoded),), self.lm.start_id, device=self.lm.device)
        self.length += 1
        self.positions.check(answer=self.length)
        out = self.decoder(
            input_ids=tokens[:, None],
            encoder_hidden_states=self.encoded,
            encoder_attention_mask=self.mask.long(),
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        self.cache = out[self.cache_name]
        return out.last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.encoded, self.mask = self.encoded[rows], self.mask[rows]
        width = int(self.mask.sum(1).max())
        self.cache.batch_select_indices(rows)
        if width < self.mask.shape[1]:
            # The longest prompt is gone: its padding in the others costs attention at every step.
            self.encoded, self.mask = self.encoded[:, :width], self.mask[:, :width]
            for layer in self.cache.cross_attention_cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]


def output_scale(config: Any) -> float:
    """T5 multiplies decoder states by d_model^-0.5 before the head; v1.1, Flan, T0 and every mT5 do not."""
    if config.model_type not in T5_FAMILY or config.model_type == "mt5":
        return 1.0
    scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if scaled else 1.0


def separate_head(model: Any) -> None:
    """Give a model that was made of its configuration the head that trained ones of its kind have: v1.1, Flan, T0 and
    mT5 have one of their own, and T5Config ties it all the same.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    untied = model.config.model_type in T5_FAMILY and output_scale(model.config) == 1.0
    if untied and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
