"""What the guards and checkpoints cost: steps of ReinforceTrainer with them, against steps without.

    python benchmarks/overhead.py --quick

t5-small-shaped student and teacher, random weights, AdamW, one training run. Steps take turns: guards off, guards on,
guards on and a checkpoint saved after the step. The learning rate is 0 and answers are cut at a fixed length, so that
every step does the same work. A checkpoint is whatever the trainer writes when it is told to save.
"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging

from common import arguments, layers, repetitions, report, show
from rl_step import EOS, STUDENT, VALID_VOCAB, t5
from rlkd.models.architectures import language_model
from rlkd.models.teacher import Teacher
from rlkd.records import Example
from rlkd.trainers.arguments import ReinforceArguments
from rlkd.trainers.reinforce import ReinforceTrainer

ROWS, PROMPT, ANSWER = 8, 128, 64
SAVE_STEPS = 500  # the default of save_steps
OFTEN = 100  # of our recipes
GUARDS = {
    "finite": ("watch", "check", "check_weights", "on_pre_optimizer_step"),
    "alarms": ("observe", "on_log", "on_step_end"),
}


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose texts are token ids in decimal."""
    backend = Tokenizer(WordLevel({str(i): i for i in range(VALID_VOCAB)}, unk_token="2"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token=str(EOS), unk_token="2")


@dataclass
class Clock:
    """CPU and wall seconds from one point of every step to the next, and CPU seconds inside the guards."""

    marks: list[tuple[float, float]] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    def mark(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))
        self.inside.append(0.0)

    def timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                if self.inside:
                    self.inside[-1] += time.process_time() - started

        return call

    def steps(self) -> list[tuple[float, float, float]]:
        """(CPU, wall, CPU inside the guards) of each step but the last, which ends with the run."""
        pairs = zip(self.marks, self.marks[1:], self.inside, strict=False)
        return [(after[0] - before[0], after[1] - before[1], inside) for before, after, inside in pairs]


class Turns(TrainerCallback):
    """Which variant a step is: off, on, or on and saved."""

    VARIANTS = ("off", "on", "saved")

    def __init__(self, trainer: ReinforceTrainer, clock: Clock):
        self.trainer, self.clock = trainer, clock
        self.on: dict[tuple[Any, str], Any] = {}
        for part, names in GUARDS.items():
            owner = getattr(trainer, part)
            for name in names:
                self.on[owner, name] = clock.timed(getattr(owner, name))
        fetch = trainer.get_batch_samples

        def begin_step(*args: Any, **kwargs: Any) -> Any:
            self.take(self.trainer.state.global_step)
            clock.mark()
            return fetch(*args, **kwargs)

        trainer.get_batch_samples = begin_step  # type: ignore[method-assign]

    def take(self, step: int) -> None:
        off = self.VARIANTS[step % 3] == "off"
        for (owner, name), function in self.on.items():
            setattr(owner, name, (lambda *_, **__: None) if off else function)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = self.VARIANTS[(state.global_step - 1) % 3] == "saved"


def build(folder: str, steps: int, args: Namespace) -> ReinforceTrainer:
    """The trainer, on prompts and answers of fixed lengths."""
    rows = 2 if args.once else ROWS
    random = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(EOS + 1, VALID_VOCAB, (rows, PROMPT - 1), generator=random)
    texts = [" ".join(map(str, [*row, EOS])) for row in prompts.tolist()]
    student, teacher = t5(layers(args, STUDENT)), t5(layers(args, STUDENT))
    with torch.no_grad():  # no answer ends by itself
        student.shared.weight[EOS] = -4 * student.shared.weight.mean(0)
    settings = ReinforceArguments(
        output_dir=folder,
        use_cpu=True,
        disable_tqdm=True,
        max_steps=steps,
        per_device_train_batch_size=rows,
        rollouts_per_prompt=2,
        max_input_tokens=PROMPT,
        max_new_tokens=ANSWER,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        weak_start="ignore",
        seed=args.seed,
    )
    tokenizer = number_tokenizer()
    return ReinforceTrainer(
        student,
        settings,
        teacher=Teacher(language_model(teacher, tokenizer), tokenizer),
        tokenizer=tokenizer,
        train_examples=[Example(str(i), text, (text,)) for i, text in enumerate(texts)],
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    clock, rounds = Clock(), repetitions(args, quick=3, full=12)
    with TemporaryDirectory() as folder:
        # One round warms up, and the last step has no end.
        trainer = build(folder, 3 * (rounds + 1) + 1, args)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns(trainer, clock))
        with patch("builtins.print"):
            trainer.train()
        size = sum(f.stat().st_size for f in Path(folder).glob("checkpoint-*/**/*") if f.is_file())
        saved = len(list(Path(folder).glob("checkpoint-*")))
    steps = clock.steps()[3:]
    by_variant = {name: steps[i::3] for i, name in enumerate(Turns.VARIANTS)}
    cpu = {name: median(c for c, _, _ in rows) for name, rows in by_variant.items()}
    inside = median(i for _, _, i in by_variant["on"])

    # Saving waits for the disk, too: the longer of CPU and wall seconds counts.
    def extra(column: int) -> float:
        pairs = zip(by_variant["saved"], by_variant["on"], strict=True)
        return median(max(0.0, saved[column] - plain[column]) for saved, plain in pairs)

    checkpoint = max(extra(0), extra(1))
    guards = inside / cpu["off"]
    figures = {
        "overhead": guards + checkpoint / SAVE_STEPS / cpu["off"],
        f"overhead_save_steps_{OFTEN}": guards + checkpoint / OFTEN / cpu["off"],
        "guards_overhead": guards,
        "guards_overhead_by_difference": cpu["on"] / cpu["off"] - 1,
        "checkpoint_seconds": checkpoint,
        "checkpoint_cpu_seconds": extra(0),
        "checkpoint_seconds_per_step": checkpoint / SAVE_STEPS,
        "checkpoint_mb": size / saved / 1e6,
        "step_cpu_seconds": cpu["off"],
    }
    show(
        f"Step of ReinforceTrainer: B {ROWS}, prompts {PROMPT}, answers {ANSWER}, t5-small shapes, {rounds} rounds",
        ["", "CPU s", "share of a step"],
        [
            ["step without guards", f"{cpu['off']:.3f}", ""],
            ["step with guards", f"{cpu['on']:.3f}", f"{figures['guards_overhead_by_difference']:+.4f}"],
            ["inside the guards", f"{inside:.4f}", f"{guards:.4f}"],
            ["a checkpoint (CPU or wall, the longer)", f"{checkpoint:.3f}", f"{checkpoint / cpu['off']:.4f}"],
            [f"guards + checkpoint every {SAVE_STEPS} steps", "", f"{figures['overhead']:.4f}"],
            [f"guards + checkpoint every {OFTEN} steps", "", f"{figures[f'overhead_save_steps_{OFTEN}']:.4f}"],
        ],
        f"Medians of steps that took turns. A checkpoint (with AdamW's state): {figures['checkpoint_mb']:.0f} MB.",
    )
    report(figures)


if __name__ == "__main__":
    main()
