"""Writes tiny untrained models and a few rows of text, for the `*.tiny.yaml` configurations.

python recipes/tiny_models.py --to runs/tiny
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

from quickstart_task import LEAVE, TAKE, make_examples, make_tokenizer, write_answer


def write_tiny(folder: Path, rows: int = 64) -> None:
    """folder/teacher, folder/student (T5ForConditionalGeneration with tokenizer) and
    folder/{train,validation}.jsonl.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer()
    for seed, (role, width) in enumerate({"teacher": 32, "student": 16}.items()):
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=len(tokenizer) + 4,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        T5ForConditionalGeneration(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    rng = random.Random(0)
    for seed, part in enumerate(("train", "validation")):
        with (folder / f"{part}.jsonl").open("w") as file:
            for example in make_examples(rows, seed):
                packed = frozenset(map(int, example.references))
                file.write(json.dumps({"note": example.student_input, "answer": write_answer(packed, rng)}) + "\n")


def write_tiny_decoders(folder: Path) -> None:
    """folder/{decoder-teacher,decoder-student}: LlamaForCausalLM with a tokenizer that begins texts and ends none."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.unk_token
    begin = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=begin
    )
    for seed, (role, width) in enumerate({"decoder-teacher": 32, "decoder-student": 16}.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 4, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def write_tiny_encoder(folder: Path, rows: int = 240) -> None:
    """folder/encoder (a BERT with tokenizer, no classifier yet) and folder/labelled.csv: what a note begins with."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    notes = make_examples(rows, 2)
    seen = {word for note in notes for word in note.student_input.split()}
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted(seen)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    tokenizer.save_pretrained(folder / "encoder")
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    with (folder / "labelled.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        for example in notes:
            verb = example.student_input.split()[0]
            table.writerow((example.student_input, "take" if verb in TAKE else "leave" if verb in LEAVE else "neither"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("runs/tiny"))
    target = parser.parse_args().to
    write_tiny(target)
    write_tiny_decoders(target)
    write_tiny_encoder(target)
