"""Run by test_processes.py, alone and under torchrun: a short run with a global batch of 8 rows per micro-batch."""

import os
import sys
from pathlib import Path
from typing import Any

from test_tkd import make as make_tkd
from test_tkd import rows

from rlkd.evaluation.task_metrics import exact_match
from rlkd.models.encoders.classifiers import build_student
from tiny import tiny_classifier
from tiny_runs import examples, labels, make


def tkd(folder: str, **more: Any) -> Any:
    teacher = tiny_classifier()
    return make_tkd(
        Path(folder),
        model=build_student(teacher, 2, "random", hidden_size=8),
        teacher=teacher,
        preset="pkd",
        terms={"attention": 1.0, "relations": 1.0, "embedding": 1.0},
        teacher_cache="needed",
        auto_scale=True,
        optim="sgd",  # Adam would amplify the rounding error of key biases, which have gradient 0
        max_steps=4,
        per_device_eval_batch_size=2,
        # Of equal length: terms over tokens are means of a micro-batch, whatever the tokens of the others.
        train=[row for row in rows(400) if len(row["text"].split()) == 5][:32],
        dev=rows(8, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        **more,
    )


def generating(kind: str, folder: str, **more: Any) -> Any:
    options = {
        "ppo": {
            "kl_target": 0.01,
            "whiten_advantages": True,
            "value_warmup_updates": 3,
            "max_steps": 8,
            "cut_answers": "end_price",
            "imitation_coef": 0.5,
            "labels": labels(11),
        },
        "gkd": {"on_policy_fraction": 0.5, "max_steps": 4, "labels": labels(11)},
        "reinforce": {
            "sync_every": 2,
            "teacher_mix": 0.2,
            "rollout_top_p": 0.9,
            "loss_reduction": "sequence_mean",
            "max_steps": 4,
            "gradient_accumulation_steps": 2,
            "task_reward": "rouge1",
            "task_reward_coef": 0.01,
        },
        "supervised": {"max_steps": 4, "eval_steps": 2, "dataloader_drop_last": True}
        | {"until_ready": True, "lr_scheduler_type": "linear"},
    }[kind]
    if kind in ("ppo", "reinforce"):
        options["weak_start"] = "warn"
    return make(
        kind,
        Path(folder),
        n=32,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_examples=examples(5),
        sample_table_rows=5,
        task_metric=exact_match,
        **{"eval_steps": 4, **options, **more},
    )


def build(kind: str, folder: str | Path, **more: Any) -> Any:
    """The trainer of a kind, which saves a checkpoint after half of its steps."""
    more = {"save_strategy": "steps", "save_steps": 4 if kind == "ppo" else 2, "save_total_limit": 3, **more}
    return tkd(str(folder), **more) if kind == "tkd" else generating(kind, str(folder), **more)


if __name__ == "__main__":
    trainer = build(*sys.argv[1:], per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")))
    trainer.train()
    trainer.save_model()
