"""Pseudo-labels per second: rlkd's engines against transformers' generate over the file in order.

    python benchmarks/pseudolabels.py --quick

Weights are random but for a clock that is wired into them (`clocked_t5`), which ends each answer at a length that its
prompt encodes. Both sides therefore run the same plain model to the same answers, and nothing is forced from outside.
How much int8 changes labels is measured on a small model trained in the run.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from common import arguments, interleave, layers, repetitions, report, show
from label_pipeline import overhead, two_processes
from rl_step import EOS, PAD, PADDED_VOCAB, STUDENT, TEACHER, VALID_VOCAB, log_normal_lengths
from rlkd.models.architectures import language_model
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.language_model import LanguageModel
from rlkd.sampling.agreement import agreement
from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine
from rlkd.sampling.engines.protocol import Answer, Decoding, Engine
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.schedule import Budget, answer_all
from rlkd.tensors import pad_rows

LONGEST_PROMPT, LONGEST_ANSWER = 256, 64
HF_BATCH = 16
# Heads as in the families: t5-small's is tied to the embedding, that of T0 and Flan-T5 is not.
SHAPES = {"t5-small, tied head": (STUDENT, True), "t5-base, untied head": (TEACHER, False)}
GREEDY = Decoding("greedy", LONGEST_ANSWER)

# Residual channels of the clock: 1 for every token but the start; the wanted length; elapsed minus wanted time.
TOKEN, WANTED, OVERDUE = range(3)
CHANNELS = 3
PERIOD = LONGEST_ANSWER + 1
CLASSES = LONGEST_ANSWER - 1  # ids i, i + CLASSES, ... ask for an answer of i % CLASSES + 2 tokens


@torch.no_grad()
def clocked_t5(shape: dict[str, int], *, tied: bool, seed: int) -> T5ForConditionalGeneration:
    """A random T5 that ends its answers at lengths its prompts ask for (to a few percent).

    The first head of the decoder's first layer attends by position alone, so that what it does not give to the start
    token is step / PERIOD; the first head of its cross-attention averages the length that prompt tokens stand for. The
    difference of the two, in a channel that no other weight writes, decides for end-of-sequence. Shapes and operations
    are those of any T5, but for a table of relative positions long enough to tell all steps apart.
    """
    torch.manual_seed(seed)
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    table = {"relative_attention_num_buckets": 2 * LONGEST_ANSWER, "relative_attention_max_distance": 256}
    untied = {} if tied else {"tie_word_embeddings": False}
    config = T5Config(vocab_size=PADDED_VOCAB, dropout_rate=0.0, **shape, **special, **table, **untied)
    model = T5ForConditionalGeneration(config).eval()
    _wire_embeddings(model, tied)
    for name, weight in model.named_parameters():
        if name.endswith("o.weight"):
            weight[:CHANNELS] = 0
    own, cross, _ = model.decoder.block[0].layer
    own, cross = own.SelfAttention, cross.EncDecAttention
    for attention, channel, gain in ((own, TOKEN, LONGEST_ANSWER), (cross, WANTED, -LONGEST_ANSWER)):
        head = slice(config.d_kv)
        attention.q.weight[head], attention.v.weight[head], attention.o.weight[:, head] = 0, 0, 0
        attention.v.weight[0, channel] = 1
        attention.o.weight[OVERDUE, 0] = gain
    bias = own.relative_attention_bias.weight[:, 0]
    bias[0] = 0
    for step in range(1, LONGEST_ANSWER):
        start_share = torch.tensor(1 - step / PERIOD)
        bias[step] = start_share.logit() + bias[:step].logsumexp(0)
    # What the encoder's last normalisation makes of the wanted length.
    lengths = range(2, LONGEST_ANSWER + 1)
    prompts = torch.tensor([prompt_for(length, 32, random.Random(seed)) for length in lengths])
    seen = model.encoder(prompts).last_hidden_state[..., WANTED].mean(1)
    cross.o.weight[OVERDUE, 0] /= (seen / torch.tensor([_wanted(length) for length in lengths])).mean()
    return model


def _wanted(length: int) -> float:
    """The time half a step before the last token, as a share of the clock's period."""
    return (length - 1.5) / PERIOD


def _wire_embeddings(model: T5ForConditionalGeneration, tied: bool) -> None:
    table, width = model.shared.weight, model.config.d_model
    table[:, TOKEN], table[:, OVERDUE] = 1, 0
    table[:, WANTED] = torch.tensor([_wanted(i % CLASSES + 2) for i in range(PADDED_VOCAB)])
    # All of the same norm, so that the first normalisation changes none.
    rest = table[:, CHANNELS:]
    rest *= ((width - table[:, :CHANNELS].square().sum(1)) / rest.square().sum(1)).sqrt()[:, None]
    table[PAD] = 0
    if tied:
        model.lm_head.weight = table
        gain = 150 * width**0.5
    else:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(table) * width**-0.5)
        model.lm_head.weight[PAD] = 0
        gain = 60.0
    model.lm_head.weight[EOS] = 0
    model.lm_head.weight[EOS, OVERDUE] = gain


def prompt_for(answer: int, tokens: int, rng: random.Random) -> list[int]:
    """A random prompt of so many tokens that asks for an answer of so many."""
    groups = range(1, VALID_VOCAB // CLASSES - 1)
    return [rng.choice(groups) * CLASSES + answer - 2 for _ in range(tokens)]


def draw_prompts(rows: int, seed: int) -> list[list[int]]:
    """Prompts in the order of a file: log-normal lengths of prompts and answers, independent of each other."""
    rng = random.Random(seed)
    prompts, answers = log_normal_lengths(LONGEST_PROMPT, rows), log_normal_lengths(LONGEST_ANSWER, rows)
    rng.shuffle(prompts)
    rng.shuffle(answers)
    return [prompt_for(answer, prompt, rng) for prompt, answer in zip(prompts, answers, strict=True)]


def hf_in_order(lm: LanguageModel, prompts: list[list[int]]) -> list[list[int]]:
    """Plain generate: batches in file order, each padded to its longest prompt. It records no log-probabilities."""
    settings = GenerationConfig(
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    answers = []
    for start in range(0, len(prompts), HF_BATCH):
        ids, mask = pad_rows(prompts[start : start + HF_BATCH], PAD)
        sequences = lm.model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        for row in sequences[:, 1:].tolist():
            answers.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return answers


@dataclass
class Result:
    """seconds: CPU seconds of each variant; equal: share of answers token-equal to generate's; difference: largest
    |log-probability - that of a plain forward|, nats; lengths: mean answer, by variant.
    """

    seconds: dict[str, float]
    equal: dict[str, float]
    difference: dict[str, float]
    lengths: dict[str, float]


def measure_speed(shape: dict[str, int], tied: bool, rows: int, turns: int, seed: int) -> Result:
    """Label the same prompts in every way, taking turns."""
    logging.set_verbosity_error()
    lm = EncoderDecoder(clocked_t5(shape, tied=tied, seed=seed), VALID_VOCAB)
    engines: dict[str, Engine] = {
        "torch": TorchEngine(lm),
        "ct2 float32": CTranslate2Engine(lm, "float32", threads=1),
        "ct2 int8": CTranslate2Engine(lm, "int8", threads=1),
    }
    prompts = draw_prompts(rows, seed)
    made: dict[str, Any] = {}

    def label(key: str) -> None:
        made[key] = [row[0] for row in answer_all(engines[key], prompts, [[0]] * rows, GREEDY, Budget())]

    def reference() -> None:
        made["hf"] = hf_in_order(lm, prompts)

    variants: dict[str, Callable[[], None]] = {"hf": reference}
    variants |= {key: lambda key=key: label(key) for key in engines}
    seconds = interleave(variants, turns)
    return Result(
        seconds,
        {k: sum(a.ids == b for a, b in zip(made[k], made["hf"], strict=True)) / rows for k in engines},
        {k: max(map(partial(_difference, lm), prompts[:8], map(_without_end, made[k][:8]))) for k in engines},
        {k: sum(len(a) if k == "hf" else len(a.ids) for a in made[k]) / rows for k in made},
    )


@torch.no_grad()
def _difference(lm: LanguageModel, prompt: list[int], answer: Any) -> float:
    decoder_input = torch.tensor([[PAD, *answer.ids[:-1]]])
    logits: Tensor = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits
    want = logits[0, :, : lm.valid_vocab].log_softmax(-1)[range(len(answer.ids)), answer.ids]
    return (torch.tensor(answer.logps) - want).abs().max().item()


def _without_end(answer: Answer) -> Answer:
    """End-of-sequence comes from the clock, whose gain multiplies rounding too; the trained model's is compared."""
    return Answer(answer.ids[:-1], answer.logps[:-1], False)


@dataclass
class Trained:
    """A small T5 trained on the quickstart's task; prompts of the task that it has not seen; its last loss."""

    lm: LanguageModel
    tokenizer: Any
    prompts: list[list[int]]
    loss: float


def train_small(steps: int, prompts: int, seed: int) -> Trained:
    """Train a small T5 on the quickstart's task, with one right answer for each input."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    task = importlib.import_module("quickstart_task")
    tokenizer = task.make_tokenizer()
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    notes = task.notes(seed)

    def batch(rows: int) -> tuple[Any, Tensor]:
        texts, answers = zip(*(next(notes) for _ in range(rows)), strict=True)
        # Things in a fixed order, by their first name: where answers are ties, any change of precision decides.
        words = [" and ".join(task.THINGS[i][0] for i in sorted(packed)) or "nothing" for packed in answers]
        ids = tokenizer(words, padding=True, return_tensors="pt").input_ids
        return tokenizer(list(texts), padding=True, return_tensors="pt"), ids.masked_fill(ids == PAD, -100)

    for _ in range(steps):
        inputs, labels = batch(32)
        loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    texts = [next(notes)[0] for _ in range(prompts)]
    return Trained(language_model(model.eval(), tokenizer), tokenizer, tokenizer(texts).input_ids, loss.item())


def measure_agreement(steps: int, prompts: int, seed: int) -> dict[str, float]:
    """Compare int8 with float32 on a trained model."""
    small = train_small(steps, prompts, seed)
    lm, ids = small.lm, small.prompts
    int8, float32 = (CTranslate2Engine(lm, precision, threads=1) for precision in ("int8", "float32"))
    decoding = Decoding("greedy", 24)
    exact = [row[0] for row in answer_all(float32, ids, [[0]] * len(ids), decoding, Budget())]
    more = {"loss": small.loss, "difference": max(map(partial(_difference, lm), ids, exact))}
    return agreement(int8, TorchEngine(lm), ids, decoding) | more


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    rows = (8, 4) if args.once else (64, 32) if args.quick else (256, 128)
    sizes = ((rows[0], repetitions(args, quick=2, full=5)), (rows[1], repetitions(args, quick=1, full=3)))
    steps, held_out = (40, 20) if args.once else (400, 200) if args.quick else (1500, 1000)
    # Converted models are of no use to a later run.
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        os.environ["RLKD_CACHE"] = cache
        jobs = {
            name: pool.submit(measure_speed, layers(args, shape), tied, count, turns, args.seed)
            for (name, (shape, tied)), (count, turns) in reversed(list(zip(SHAPES.items(), sizes, strict=True)))
        }
        trained = pool.submit(measure_agreement, steps, held_out, args.seed).result()
        results = {name: jobs[name].result() for name in SHAPES}
    for (name, result), (count, _) in zip(results.items(), sizes, strict=True):
        lines = [
            [
                key,
                f"{seconds:.1f}",
                f"{count / seconds:.1f}",
                f"{result.seconds['hf'] / seconds:.2f}",
                f"{result.lengths[key]:.1f}",
                f"{result.equal[key]:.0%}" if key in result.equal else "",
                f"{result.difference[key]:.1e}" if key in result.difference else "",
            ]
            for key, seconds in result.seconds.items()
        ]
        columns = ["variant", "CPU s", "labels/s", "speed-up", "mean answer", "equal", "log-prob off"]
        show(f"{name}: {count} prompts, random weights with a clock, greedy, one thread", columns, lines)
    exact = [(r.equal[k], r.difference[k]) for r in results.values() for k in ("torch", "ct2 float32")]
    # Random weights have ties that rounding decides.
    off = max(trained["difference"], *(off for _, off in exact))
    if min(equal for equal, _ in exact) < 0.97 or off > 1e-4:
        raise SystemExit("the float32 engines disagree with transformers: their times cannot be compared")
    figures: dict[str, float] = {}
    for name, r in results.items():
        short = name.split(",")[0].replace("-", "_")
        figures[f"fp32_speedup_{short}"] = r.seconds["hf"] / min(r.seconds["torch"], r.seconds["ct2 float32"])
        figures[f"torch_speedup_{short}"] = r.seconds["hf"] / r.seconds["torch"]
        figures[f"ct2_int8_speedup_{short}"] = r.seconds["hf"] / r.seconds["ct2 int8"]
    worst = {
        key: min(value for name, value in figures.items() if name.startswith(f"{key}_t5"))
        for key in ("fp32_speedup", "ct2_int8_speedup")
    }
    worst |= {
        "logprob_max_abs_diff": off,
        "ct2_int8_agreement": trained["exact_match"],
        "ct2_int8_mean_abs_delta_logprob": trained["mean_abs_delta_logprob"],
        "trained_loss": trained["loss"],
    }
    free, shared = (20_000, 4_000) if args.once else (100_000, 20_000) if args.quick else (200_000, 40_000)
    pipeline = overhead(free) | two_processes(shared, repetitions=repetitions(args, quick=2, full=3))
    figures = worst | figures | pipeline
    show(
        "Figures (speed-ups: the worse of the two shapes)",
        ["figure", "value"],
        [[k, f"{figures[k]:.4g}"] for k in worst],
    )
    report(figures)


if __name__ == "__main__":
    main()
