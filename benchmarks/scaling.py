"""Memory of a process that trains a sharded student over one that trains a copied one: FSDP2 over DDP, two processes.

    python benchmarks/scaling.py --quick

Both are launched with the files of recipes/accelerate. The student is so large, and its rows so short, that weights,
gradients and Adam's moments are nearly all of the memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from export import any_tokenizer
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from common import arguments, report, show, status
from rlkd.trainers.arguments import SupervisedArguments
from rlkd.trainers.supervised import SupervisedTrainer

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "fsdp2")


WORDS = 1000


def student(width: int) -> Any:
    """A T5 of four layers on each side."""
    shape = {"d_model": width, "d_ff": 4 * width, "d_kv": 64, "num_heads": width // 64, "num_layers": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, dropout_rate=0.0, **shape))


class SecondStep(TrainerCallback):
    """Bytes of resident memory at the peak of the second update: the first one makes the optimizer's state."""

    peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.peak = status("VmHWM")


def train(folder: Path, width: int) -> None:
    """In one of the two processes: two updates, and what they took beyond the process itself."""
    before, second = status("VmRSS"), SecondStep()
    args = SupervisedArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, max_steps=2, save_strategy="no", report_to="none",
        per_device_train_batch_size=1, max_new_tokens=4,
    )  # fmt: skip
    rows = [{"student_input": f"w{i + 3} w{i + 4}", "label": f"w{i + 5}"} for i in range(8)]
    SupervisedTrainer(
        student(width), args, tokenizer=any_tokenizer(WORDS), train_dataset=rows, callbacks=[second]
    ).train()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(second.peak - before))


def measured(engine: str, width: int) -> float:
    """MB of the larger of two processes, launched with the recipe of `engine`."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{engine}.yaml"]
        command = [sys.executable, *launcher, __file__, "--process", folder, "--width", str(width)]
        # Every buffer from 64 KiB on is given back when freed; else glibc keeps what was transient.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return max(json.loads(path.read_text()) for path in Path(folder).glob("[01].json")) / 1e6


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--process", type=Path, help="be one of the processes that are measured")
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    width = 128 if args.once else args.width
    if args.process:
        return train(args.process, args.width)
    found = {engine: measured(engine, width) for engine in ENGINES}
    weights = 4 * sum(p.numel() for p in student(width).parameters()) / 1e6
    show(f"Memory of a process, {weights:.0f} MB of weights", ["engine", "MB", "over the weights"],
         [[name, f"{mb:.0f}", f"{mb / weights:.2f}"] for name, mb in found.items()])  # fmt: skip
    report({"fsdp2_memory_over_ddp": found["fsdp2"] / found["ddp"], "ddp_mb": found["ddp"], "weights_mb": weights})


if __name__ == "__main__":
    main()
