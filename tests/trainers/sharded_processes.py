"""Run by test_sharding.py under `accelerate launch` with FSDP2: each run of RUNS, those of RESUMED again from their
first checkpoint; at the end process 1 of one more run kills itself.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import test_decoder_training as decoders
import two_processes
from transformers import TrainerCallback

from rlkd.models import batching
from rlkd.runs.checkpoints import checkpoints
from rlkd.sharding import own_part
from tiny_runs import student

# An untied head in one run; layers that are computed again in another.
RUNS = ("supervised", "reinforce", "ppo", "gkd", "llama")
RESUMED = ("supervised", "ppo", "llama")


def build(kind: str, folder: Path, rows: int, **more: Any) -> Any:
    """A trainer of `kind` with so many rows of each micro-batch in this process."""
    more["per_device_train_batch_size"] = rows
    if kind == "gkd":
        more["model"] = student(tied=False)
    if kind != "llama":
        return two_processes.build(kind, folder, **more)
    return decoders.run("reinforce", folder, n=32, save_strategy="steps", save_steps=2, gradient_checkpointing=True,
                        whiten_advantages=True, **more)  # fmt: skip


class Held(TrainerCallback):
    """What this process holds of the student and of Adam's moments, when the first update is due and at the end."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        held = [(own_part(p).numel(), p.numel()) for p in kwargs["model"].parameters()]
        self.weights = sum(own for own, _ in held) / sum(all_ for _, all_ in held)

    def on_train_end(self, args, state, control, **kwargs):
        moments = [v for values in kwargs["optimizer"].state.values() for v in values.values() if v.dim()]
        self.moments = sum(own_part(v).numel() for v in moments) / sum(v.numel() for v in moments)


class KilledRank(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    batching.PADDING["cpu"] = 0  # as many forwards as there are lengths: other numbers in each process
    shares = {}
    for kind in RUNS:
        held, whole, again = Held(), folder / kind, folder / f"{kind}-resumed"
        trainer = build(kind, whole, 4, callbacks=[held])
        trainer.train()
        trainer.save_model()
        shares[kind] = [held.weights, held.moments]
        if kind not in RESUMED:
            continue
        if trainer.is_world_process_zero():
            shutil.copytree(whole, again)
            shutil.rmtree(next(iter(checkpoints(again).values())))  # the newest
        trainer.accelerator.wait_for_everyone()
        trainer = build(kind, again, 4)
        trainer.train(resume_from_checkpoint="auto")
        trainer.save_model()
    (folder / f"shares-{trainer.args.process_index}.json").write_text(json.dumps(shares))
    build("reinforce", folder / "killed", 4, callbacks=[KilledRank()]).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
