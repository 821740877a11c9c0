"""Tiny models and a word-level tokenizer, built in memory in milliseconds; everything is seeded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.loading import protect_untied_head
from rlkd.models.teacher import Teacher

PAD, EOS, UNK = 0, 1, 2
WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklm", *"0123456789", "copy", "reverse", "answer", "of", "is", ":"]
VALID = len(WORDS)
PADDED_VOCAB = VALID + 6  # as T5 has 32,128 rows for 32,100 pieces


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word, `</s>` appended."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_t5(
    *, tied: bool = True, seed: int = 0, width: int = 16, vocab: int = PADDED_VOCAB, dropout: float = 0.0
) -> T5ForConditionalGeneration:
    """A random T5. `tied=False` is v1.1-like (T0, Flan-T5): a head of its own and unscaled decoder outputs."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        dropout_rate=dropout,
        decoder_start_token_id=PAD,
        # T5Config then sets scale_decoder_outputs=False, and tie_word_embeddings=True all the same.
        **({} if tied else {"tie_word_embeddings": False}),
    )
    model = T5ForConditionalGeneration(config).eval()
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(vocab, width))
        protect_untied_head(model)
    return model


def tiny_bart(
    *, seed: int = 0, width: int = 16, vocab: int = PADDED_VOCAB, eos_bias: float = 0.0, dropout: float = 0.0
):
    """A random BART with a random final_logits_bias; `eos_bias` more on end-of-sequence makes answers shorter."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=vocab,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=64,
        init_std=0.3,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    model.final_logits_bias[0, EOS] += eos_bias
    return model


def tiny_model(kind: str, **options: Any) -> Any:
    """kind: 't5' (tied head), 't5-untied' or 'bart'."""
    build = {"t5": tiny_t5, "t5-untied": lambda **o: tiny_t5(tied=False, **o), "bart": tiny_bart}
    return build[kind](**options)


KINDS = ("t5", "t5-untied", "bart")


def tiny_teacher(kind: str = "t5-untied", *, seed: int = 0, **options: Any) -> Teacher:
    """A frozen teacher around a tiny model; `options` are the fields of Teacher."""
    return Teacher(EncoderDecoder(tiny_model(kind, seed=seed), VALID), tiny_tokenizer(), **options)


def save_pretrained(folder: str | Path, model: Any, tokenizer: Any = None) -> str:
    """Write a model and its tokenizer as a hub checkpoint has them; returns the folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_pair(folder: str | Path, *, seed: int = 0) -> tuple[str, str]:
    """Save an untied T5 teacher and a smaller tied T5 student below `folder`; returns the two folders."""
    folder = Path(folder)
    teacher = save_pretrained(folder / "teacher", tiny_t5(tied=False, seed=seed, width=32))
    student = save_pretrained(folder / "student", tiny_t5(seed=seed + 1))
    return teacher, student


# Encoder-only classifiers.

CLASSIFIER_WORDS = ["<pad>", "[CLS]", "[SEP]", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


def classifier_tokenizer(words: list[str] = CLASSIFIER_WORDS, model_max_length: int = 32) -> PreTrainedTokenizerFast:
    """One token per word, `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


def tiny_classifier(
    kind: str = "bert",
    *,
    layers: int = 4,
    width: int = 16,
    heads: int = 2,
    labels: int = 2,
    seed: int = 0,
    dropout: float = 0.0,
) -> Any:
    """A random classifier whose attention is far from uniform; kind: 'bert', 'roberta' or 'distilbert'."""  # fmt: skip
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(CLASSIFIER_WORDS),
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "num_labels": labels,
    }
    if kind == "distilbert":
        config = DistilBertConfig(
            dim=width, n_layers=layers, n_heads=heads, hidden_dim=2 * width, dropout=dropout, attention_dropout=dropout,
            seq_classif_dropout=dropout, initializer_range=0.4, **shape,
        )  # fmt: skip
        return DistilBertForSequenceClassification(config).eval()
    config_type, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[kind]
    config = config_type(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.4, type_vocab_size=2,
        **shape,
    )  # fmt: skip
    return model(config).eval()


# Classifiers of words.

TAGS = ("O", "B-V", "I-V", "B-Z")


def tagged_rows(n: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Vowels are entities of type V, z of type Z; every third word has two letters, which are two tokens."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        words = [draw.choice(CLASSIFIER_WORDS[4:]) + (f" {draw.choice(CLASSIFIER_WORDS[4:])}" if k % 3 == 2 else "")
                 for k in range(draw.randint(2, 7))]  # fmt: skip
        made.append({"words": words, "label": [1 if w[0] in "aeiou" else 3 if w[0] == "z" else 0 for w in words]})
    return made


def tiny_tagger(family: str = "bert", *, tags: tuple[str, ...] = TAGS, seed: int = 0, layers: int = 4) -> Any:
    """A random token classifier; family: 'bert', 'roberta' or 'distilbert'."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(tags)), "label2id": {tag: i for i, tag in enumerate(tags)}}
    shape = {"vocab_size": len(CLASSIFIER_WORDS), "max_position_embeddings": 40, "pad_token_id": 0,
             "initializer_range": 0.4, **names}  # fmt: skip
    if family == "distilbert":
        config = DistilBertConfig(dim=16, n_layers=layers, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0,
                                  **shape)  # fmt: skip
        return DistilBertForTokenClassification(config).eval()
    config, model = {"bert": (BertConfig, BertForTokenClassification),
                     "roberta": (RobertaConfig, RobertaForTokenClassification)}[family]  # fmt: skip
    width = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}  # fmt: skip
    return model(config(**shape, **width)).eval()


def first_tokens(row: dict[str, Any], length: int = 32) -> list[int | None]:
    """The position of each word's first token, counted by hand; None beyond the longest text."""
    found, position = [], 1
    for word in row["words"]:
        found.append(position if position < length - 1 else None)
        position += len(word.split())
    return found
