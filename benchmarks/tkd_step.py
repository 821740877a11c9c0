"""One TKD step (student's forward with its tree, teacher's outputs, gradient) against one KD step of the same models.

    python benchmarks/tkd_step.py --quick

MiniLM-L6-shaped teacher (6 layers, width 384, 12 heads), 3-layer student cut from it, random weights, full rows of
length 128. All variants are `TKDTrainer.compute_loss` and its backward pass; the optimizer is left out: it is the same
in all. The teacher's outputs are written before the clock runs: once a run, not once a step.
"""

from __future__ import annotations

import copy
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from common import arguments, interleave, repetitions, report, show
from rlkd.models.encoders.classifiers import build_student
from rlkd.trainers.encoders.arguments import TKDArguments
from rlkd.trainers.encoders.tkd import TKDTrainer

VOCAB, ROWS, LENGTH, CHILDREN = 30_522, 8, 128, 2
TEACHER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
STUDENT_LAYERS = 3


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose texts are token ids in decimal."""
    backend = Tokenizer(WordLevel({str(token): token for token in range(VOCAB)}, unk_token="100"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "0", "cls_token": "101", "sep_token": "102", "unk_token": "100"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def texts(length: int, seed: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(103, VOCAB, (ROWS, length), generator=random)
    ids[:, 0], ids[:, -1] = 101, 102
    return [{"text": " ".join(map(str, row)), "label": i % 2} for i, row in enumerate(ids.tolist())]


def step(trainer: TKDTrainer, batch: dict[str, Any]) -> float:
    """One gradient; returns the loss."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item()


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    teacher = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **TEACHER))
    student = build_student(teacher, STUDENT_LAYERS)

    def variant(preset: str, length: int = LENGTH, m: int = CHILDREN, cache: str = "none") -> partial[float]:
        settings = TKDArguments(
            output_dir=folder, preset=preset, tree_m=m, teacher_cache=cache, use_cpu=True, report_to=[], max_length=512
        )
        trainer = TKDTrainer(
            copy.deepcopy(student),
            settings,
            teacher=teacher,
            tokenizer=number_tokenizer(),
            train_rows=texts(length, args.seed),
        )
        trainer.open_teacher_cache()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])
        trainer.model.train()
        return partial(step, trainer, batch)

    lengths, children = ((32, LENGTH), (1, 8)) if args.quick else ((32, 64, LENGTH, 256), (1, 4, 8, 16))
    with TemporaryDirectory() as folder:
        variants = {
            **{f"{preset} {n}": variant(preset, n) for n in lengths for preset in ("kd", "tkd")},
            **{f"tkd m={m}": variant("tkd", m=m) for m in children},
            "pkd": variant("pkd"),
            "all": variant("all"),
            "tinybert": variant("tinybert"),
            "minilm": variant("minilm"),
            "cached kd": variant("kd", cache="logits"),
            "cached tkd": variant("tkd", cache="hidden"),
        }
        losses = {}
        for name, run in variants.items():  # warms up; one seed, so that all draw the same dropout
            torch.manual_seed(args.seed)
            losses[name] = run()
        if abs(losses["cached kd"] - losses[f"kd {LENGTH}"]) > 1e-4:
            raise SystemExit("the cached teacher disagrees with the teacher: their times cannot be compared")
        seconds = interleave(variants, repetitions(args, quick=5, full=15))

    base, tree = f"kd {LENGTH}", f"tkd {LENGTH}"
    figures = {
        "tkd_over_kd": seconds[tree] / seconds[base],
        "cached_tkd_over_kd": seconds["cached tkd"] / seconds[base],
        "cached_kd_over_kd": seconds["cached kd"] / seconds[base],
        "pkd_over_kd": seconds["pkd"] / seconds[base],
        "all_over_kd": seconds["all"] / seconds[base],
        "tinybert_over_kd": seconds["tinybert"] / seconds[base],
        "minilm_over_kd": seconds["minilm"] / seconds[base],
        **{f"tkd_over_kd_length_{n}": seconds[f"tkd {n}"] / seconds[f"kd {n}"] for n in lengths if n != LENGTH},
        **{f"tkd_over_kd_m_{m}": seconds[f"tkd m={m}"] / seconds[base] for m in children},
    }

    def over_kd(name: str) -> float:
        length = name.split()[-1]
        return seconds[name] / seconds[f"kd {length}" if length.isdigit() else base]

    show(
        f"TKD step: B {ROWS}, length {LENGTH} and m = {CHILDREN} unless named, 6 layers -> {STUDENT_LAYERS}",
        ["variant", "CPU s", "over the KD step of its length"],
        [[name, f"{value:.3f}", f"{over_kd(name):.3f}"] for name, value in seconds.items()],
        "Medians of steps that took turns, CPU seconds of one thread, gradient included, optimizer left out.",
    )
    report(figures)


if __name__ == "__main__":
    main()
