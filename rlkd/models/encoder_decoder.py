"""What rlkd needs of a model family: encode once, decode to hidden states, and the head.

Everything else (rollouts, scoring, losses) is written against `EncoderDecoder` and knows no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..tensors import length_mask, pad_stack
from .heads import Head

T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
BART_FAMILY = ("bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "plbart", "led")
# Padding that one batch of unequal lengths may hold, in tokens: about what one more forward costs. A processor computes
# padding like anything else; an accelerator mostly waits for its launches.
PADDING = {"cpu": 32, "accelerator": 2048}


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder model of the T5 or BART family.

    model        the transformers model (possibly PEFT-wrapped)
    valid_vocab  number of ids that are real tokens; actions and normalisers are limited to them
    """

    model: Any
    valid_vocab: int

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def start_id(self) -> int:
        return int(self.config.decoder_start_token_id)

    @property
    def eos_id(self) -> int:
        eos = self.config.eos_token_id
        return int(eos[0] if isinstance(eos, list) else eos)

    @property
    def pad_id(self) -> int:
        return int(self.config.pad_token_id)

    def head(self) -> Head:
        """The vocabulary projection as transformers applies it, output scale and logits bias included."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        projection = base.get_output_embeddings()
        weight = projection.weight
        if not weight.is_floating_point():
            raise ModelError(
                "the output head is quantised, so its exact logits are not available. "
                "Keep it in full precision: add 'lm_head' to llm_int8_skip_modules."
            )
        bias = getattr(base, "final_logits_bias", None)
        bias = projection.bias if bias is None else bias.view(-1)
        return Head(weight, bias, _output_scale(base.config), self.valid_vocab)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states [B, P, D] of prompts [B, P]; `mask` [B, P] bool."""
        return self.model.get_encoder()(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state

    def encode_prompts(self, prompts: list[list[int]], batch_tokens: int = 4096) -> list[Tensor]:
        """Encoder states [P_i, D] of each prompt, batched by length so that little padding is encoded."""
        states: list[Tensor | None] = [None] * len(prompts)
        for rows in batches_by_length([len(p) for p in prompts], batch_tokens, self._padding):
            ids, mask = self.pad_prompts([prompts[i] for i in rows])
            for i, state, n in zip(rows, self.encode(ids, mask), mask.sum(1).tolist(), strict=True):
                states[i] = state[:n]
        return states  # type: ignore[return-value]

    def pad_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids [B, P] and mask [B, P] on the model's device."""
        ids = pad_stack([torch.tensor(p, dtype=torch.long) for p in prompts], self.pad_id)
        return ids.to(self.device), length_mask([len(p) for p in prompts], ids.shape[1]).to(self.device)

    def hidden(self, states: Tensor, mask: Tensor, answer_ids: Tensor) -> Tensor:
        """Head inputs [B, R, D] that predict `answer_ids` [B, R], teacher-forced from the start token.

        Answers are right-padded and attention is causal, so padding after an answer changes nothing before it.
        """
        start = torch.full_like(answer_ids[:, :1], self.start_id)
        shifted = torch.cat([start, answer_ids[:, :-1]], dim=1)
        return self.model.get_decoder()(
            input_ids=shifted,
            attention_mask=torch.ones_like(shifted),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state

    def answer_hidden(
        self, states: list[Tensor], answer_ids: Tensor, lengths: list[int], batch_tokens: int = 4096
    ) -> Tensor:
        """`hidden` [B, R, D] for encoder states [P_i, D], batched by length, as wide as needed; 0 after an answer."""
        rows: list[Tensor | None] = [None] * len(states)
        for batch in batches_by_length(
            [n + len(s) for n, s in zip(lengths, states, strict=True)], batch_tokens, self._padding
        ):
            width = max(max(lengths[i] for i in batch), 1)
            mask = length_mask([len(states[i]) for i in batch]).to(answer_ids.device)
            hidden = self.hidden(pad_stack([states[i] for i in batch]), mask, answer_ids[batch, :width])
            for i, row in zip(batch, hidden, strict=True):
                rows[i] = row[: lengths[i]]
        grid = pad_stack(rows)  # type: ignore[arg-type]
        return torch.nn.functional.pad(grid, (0, 0, 0, answer_ids.shape[1] - grid.shape[1]))

    @property
    def _padding(self) -> int:
        return PADDING["cpu" if self.device.type == "cpu" else "accelerator"]

    def step(self, tokens: Tensor, states: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """One cached decoding step: head input [B, D] for the token after `tokens` [B], and the grown cache."""
        out = self.model.get_decoder()(
            input_ids=tokens[:, None],
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1], out.past_key_values


def _output_scale(config: Any) -> float:
    """T5 multiplies decoder states by d_model^-0.5 before the head; v1.1, Flan, T0 and every mT5 do not."""
    if config.model_type not in T5_FAMILY or config.model_type == "mt5":
        return 1.0
    scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if scaled else 1.0


def batches_by_length(lengths: list[int], batch_tokens: int, padding: int | None = None) -> list[list[int]]:
    """Row indices, sorted by length and cut so that rows x longest <= batch_tokens (one row at least).

    With `padding` also so that rows x longest - sum of lengths <= padding.
    """
    batches: list[list[int]] = []
    padded = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches:
            rows = batches[-1]
            more = padded + len(rows) * (lengths[i] - lengths[rows[-1]])
            if (len(rows) + 1) * lengths[i] <= batch_tokens and (padding is None or more <= padding):
                rows.append(i)
                padded = more
                continue
        batches.append([i])
        padded = 0
    return batches
