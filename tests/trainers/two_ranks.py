"""Run by test_run_faults.py under torchrun: a run with checkpoints; one of its ranks may kill itself half-way."""

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

import chaos
from rlkd.settings.parsing import run_main


class KilledRank(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, killed_at, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    trainer = chaos.build("reinforce", folder, KilledRank(killed_at))
    trainer.args.max_steps = steps
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()


if __name__ == "__main__":
    run_main(main)
