"""A student in service: tokens per CPU second of its CTranslate2 export over its PyTorch form and over the teacher.

    python benchmarks/export.py --quick

Weights of the models that are timed are random but for the clock of pseudolabels.py, which ends their answers at given
lengths. Agreement is measured on a small model that is trained in the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pseudolabels import GREEDY, LONGEST_ANSWER, clocked_t5, draw_prompts, hf_in_order, train_small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from common import arguments, interleave, repetitions, report, show
from rl_step import EOS, STUDENT, TEACHER, VALID_VOCAB
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.footprint import megabytes
from rlkd.sampling.engines.protocol import Answer
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.exported import Exported, equal_shares, without_end, write_exported
from rlkd.sampling.schedule import Budget, answer_all

TORCH, INT8, FLOAT32 = "student, generate", "student, CTranslate2 int8", "student, CTranslate2 float32"
LOOP, BY_TEACHER = "student, rlkd's loop", "teacher, generate"


def any_tokenizer(words: int = VALID_VOCAB) -> PreTrainedTokenizerFast:
    """A word for each id, for models that read ids."""
    ids = {"<pad>": 0, "</s>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, words)}}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, unk_token="<unk>")), **special)


def in_pytorch(lm: EncoderDecoder, prompts: list[list[int]], decoding: Any = GREEDY) -> list[Answer]:
    """Greedy answers by rlkd's own loop."""
    return [row[0] for row in answer_all(TorchEngine(lm), prompts, [[0]] * len(prompts), decoding, Budget())]


def measure_speed(
    rows: int, turns: int, seed: int, folder: Path, **shape: int
) -> tuple[dict[str, float], list[list[str]]]:
    """Tokens per CPU second of each form, and the lines of the table; the forms take turns on the same prompts. shape:
    what both models have otherwise.
    """
    student = EncoderDecoder(clocked_t5(STUDENT | shape, tied=True, seed=seed), VALID_VOCAB)
    teacher = EncoderDecoder(clocked_t5(TEACHER | shape, tied=False, seed=seed), VALID_VOCAB)
    prompts, tokenizer = draw_prompts(rows, seed), any_tokenizer()
    some = prompts[:8]
    sizes = {TORCH: megabytes(student.model), BY_TEACHER: megabytes(teacher.model)}
    exported: dict[str, Exported] = {}
    for name, quantization in ((INT8, "int8"), (FLOAT32, "float32")):
        (folder / quantization).mkdir()
        answers = in_pytorch(student, some)
        exported[name] = write_exported(student, tokenizer, folder / quantization, quantization, some, answers)
        sizes[name] = exported[name].megabytes
    loaded = {name: one.load(threads=1) for name, one in exported.items()}
    made: dict[str, list[list[int]]] = {}

    def keep(name: str, answer: Callable[[], list[list[int]]]) -> Callable[[], None]:
        return lambda: made.update({name: answer()})

    variants = {
        TORCH: keep(TORCH, lambda: hf_in_order(student, prompts)),
        LOOP: keep(LOOP, lambda: [answer.ids for answer in in_pytorch(student, prompts)]),
        **{
            name: keep(name, lambda name=name: exported[name].answer(loaded[name], prompts, LONGEST_ANSWER))
            for name in exported
        },
        BY_TEACHER: keep(BY_TEACHER, lambda: hf_in_order(teacher, prompts)),
    }
    seconds = interleave(variants, turns)
    rules = exported[INT8].rules
    answers = {name: [without_end(ids, rules) for ids in rows] for name, rows in made.items()}
    if equal_shares(answers[FLOAT32], answers[TORCH])[0] < 0.9:  # random weights have ties that rounding decides
        raise SystemExit("the float32 export disagrees with transformers: their times cannot be compared")
    speeds = {name: sum(map(len, answers[name])) / seconds[name] for name in seconds}
    lines = [
        [
            name,
            f"{sizes[name]:.0f}" if name in sizes else "",
            f"{seconds[name]:.1f}",
            f"{speed:.0f}",
            f"{speed / speeds[TORCH]:.2f}",
            f"{speed / speeds[BY_TEACHER]:.2f}",
            f"{sum(map(len, answers[name])) / rows:.1f}",
        ]
        for name, speed in speeds.items()
    ]
    return speeds, lines


def measure_agreement(steps: int, inputs: int, seed: int) -> dict[str, float]:
    """Shares of greedy answers and of tokens of a trained model that its int8 export gives, too."""
    small = train_small(steps, inputs, seed)
    theirs = in_pytorch(small.lm, small.prompts)
    with tempfile.TemporaryDirectory() as folder:
        exported = write_exported(small.lm, small.tokenizer, Path(folder), "int8", small.prompts, theirs)
        ours = exported.answer(exported.load(), small.prompts, LONGEST_ANSWER)
    answers, tokens = equal_shares(ours, [without_end(answer.ids, exported.rules) for answer in theirs])
    return {"agreement": answers, "agreement_tokens": tokens, "trained_loss": small.loss}


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, turns = (8 if args.once else 32 if args.quick else 128), repetitions(args, quick=2, full=5)
    steps, inputs = (20, 20) if args.once else (400, 200) if args.quick else (1500, 1000)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, tempfile.TemporaryDirectory() as folder:
        trained = pool.submit(measure_agreement, steps, inputs, args.seed)
        speeds, lines = measure_speed(rows, turns, args.seed, Path(folder), **({"num_layers": 1} if args.once else {}))
        agreement = trained.result()
    columns = ["form", "MB", "CPU s", "tokens/s", "over student", "over teacher", "mean answer"]
    title = f"{rows} prompts, t5-small-shaped student, t5-base-shaped teacher, greedy, one thread"
    show(
        title, columns, lines, f"agreement of int8 on a trained model: {agreement['agreement']:.1%} of {inputs} answers"
    )
    report(
        {
            "student_ct2_int8_over_torch": speeds[INT8] / speeds[TORCH],
            "student_over_teacher": speeds[INT8] / speeds[BY_TEACHER],
            **agreement,
            "student_ct2_float32_over_torch": speeds[FLOAT32] / speeds[TORCH],
            "student_ct2_int8_over_loop": speeds[INT8] / speeds[LOOP],
        }
    )


if __name__ == "__main__":
    main()
