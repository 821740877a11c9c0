"""Run by test_finite.py under torchrun: process 1 meets a number that is not finite; both must end, with a message."""

import sys
from pathlib import Path

import torch

from rlkd.errors import DivergenceError
from tiny_runs import make


def main(folder: str, where: str) -> None:
    trainer = make("ppo", Path(folder), n=32, max_steps=4, epochs_per_rollout=1, minibatches_per_rollout=1)
    rank = trainer.args.process_index
    if where == "teacher":
        score = trainer.teacher.score

        def broken(*args, **options):
            if rank == 1 and trainer.state.global_step == 1:
                with torch.no_grad():
                    next(trainer.teacher.lm.model.decoder.final_layer_norm.parameters())[0] = float("nan")
            return score(*args, **options)

        trainer.teacher.score = broken
    else:
        token_loss = trainer.objective.token_loss

        def spoiled(student, minibatch):
            loss, logged = token_loss(student, minibatch)
            # Constant, so that no gradient tells the other process.
            return loss + float("inf") if rank == 1 and trainer.state.global_step == 1 else loss, logged

        trainer.objective.token_loss = spoiled
    try:
        trainer.train()
    except DivergenceError as error:
        Path(folder, f"message-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
