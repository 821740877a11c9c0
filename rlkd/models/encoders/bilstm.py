"""A BiLSTM classifier as a PreTrainedModel: a student of another architecture (Tang et al. 2019, arXiv 1903.12136).

Importing this module registers it with transformers' Auto classes, so that a saved one loads like any other model.
The saved folder holds this file too, which imports nothing of rlkd: elsewhere it loads with trust_remote_code=True.
It has no attention, so it learns from logits (and, through projections, from hidden states), never from a tree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BiLSTMConfig(PreTrainedConfig):
    """embedding_size and hidden_size (of one direction) are widths; classifier_size that of the layer before labels."""

    model_type = "rlkd_bilstm"

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        hidden_size: int = 150,
        num_hidden_layers: int = 1,
        classifier_size: int = 200,
        dropout: float = 0.1,
        pad_token_id: int = 0,
        **options: Any,
    ):
        self.vocab_size, self.embedding_size, self.hidden_size = vocab_size, embedding_size, hidden_size
        self.num_hidden_layers, self.classifier_size, self.dropout = num_hidden_layers, classifier_size, dropout
        self.pad_token_id = pad_token_id
        super().__init__(**options)

    @property
    def output_width(self) -> int:
        """Width of the hidden states: both directions."""
        return 2 * self.hidden_size


class BiLSTMForSequenceClassification(PreTrainedModel):
    """Word embeddings, bidirectional LSTM layers, the last states of both directions, ReLU, labels.

    Padding must be on the right; it changes nothing.
    """

    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"

    def __init__(self, config: BiLSTMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        widths = [config.embedding_size] + [config.output_width] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            nn.LSTM(width, config.hidden_size, batch_first=True, bidirectional=True) for width in widths
        )
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.output_width, config.classifier_size)
        self.classifier = nn.Linear(config.classifier_size, int(config.num_labels))  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own rules: the small standard deviation of transformers' default is too low for a network this
        # shallow.
        if isinstance(module, (nn.Embedding, nn.LSTM, nn.Linear)):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, C] of input_ids [B, L]; hidden_states are the embeddings and each layer's output [B, L, 2 D]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.sum(1).cpu()
        states = [self.embedding(input_ids)]
        for layer in self.layers:
            packed = pack_padded_sequence(self.dropout(states[-1]), lengths, batch_first=True, enforce_sorted=False)
            output, (last, _) = layer(packed)
            states.append(pad_packed_sequence(output, batch_first=True, total_length=input_ids.shape[1])[0])
        both_ends = torch.cat([last[0], last[1]], dim=-1)
        logits = self.classifier(self.dropout(self.dense(both_ends).relu()))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None
        )


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig)
AutoModelForSequenceClassification.register(BiLSTMConfig, BiLSTMForSequenceClassification)
BiLSTMConfig.register_for_auto_class()
BiLSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
