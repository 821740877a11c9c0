"""Run by test_processes.py, alone and under torchrun: a short run whose global batch is always 8 rows a micro-batch."""

import os
import sys
from pathlib import Path

from rlkd.metrics import exact_match
from tiny_runs import examples, make


def main(kind: str, folder: str) -> None:
    options = {
        "ppo": {"kl_target": 0.01, "whiten_advantages": True, "max_steps": 8},
        "reinforce": {
            "sync_every": 2,
            "loss_reduction": "sequence_mean",
            "max_steps": 4,
            "gradient_accumulation_steps": 2,
        },
        "supervised": {"max_steps": 4, "dataloader_drop_last": True},
    }[kind]
    if kind != "supervised":
        options["weak_start"] = "warn"
    trainer = make(
        kind,
        Path(folder),
        n=32,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=4,
        eval_examples=examples(5),
        sample_table_rows=5,
        task_metric=exact_match,
        **options,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
