"""Run by test_sharding.py under `accelerate launch` with FSDP2: runs of each trainer, whole and resumed from half."""

import shutil
import sys
from pathlib import Path

import two_processes


def build(kind, folder, **more):
    return two_processes.build(kind, folder, **more)


def main(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        trainer = build(kind, folder / kind, per_device_train_batch_size=4)
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
