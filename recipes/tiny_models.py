"""Writes a tiny untrained teacher and student and a few rows of text, for the `*.tiny.yaml` configurations.

python recipes/tiny_models.py --to runs/tiny
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from quickstart_task import make_examples, make_tokenizer, write_answer


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("runs/tiny"))
    write_tiny(parser.parse_args().to)
