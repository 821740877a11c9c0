"""The main job, end to end, on a synthetic task: no downloads, two CPU cores, minutes.

python recipes/quickstart.py [--out runs/quickstart] [--seeds 3] [--quick]

1. trains a prompted T5 teacher on the task's notes (recipes/quickstart_task.py: many right answers for every input)
2. per seed: the teacher labels unlabeled notes by sampling, and a small student is warmed up on the labels (SeqKD)
3. from that same start trains on with REINFORCE, with PPO, and with SeqKD for as many CPU seconds as the longer of
the two
4. prints one table of held-out results, also in results.json

Every result is made in a process of its own. Those that are finished are skipped: to continue, repeat the command.
Settings were chosen on the validation notes (`--split validation`); the table is of the test notes.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import T5Config, T5ForConditionalGeneration

import quickstart_task as task
from rlkd import (
    Arm,
    Cell,
    PPOArguments,
    PPOTrainer,
    ReinforceArguments,
    ReinforceTrainer,
    Study,
    SupervisedArguments,
    SupervisedTrainer,
    Teacher,
    generate_pseudolabels,
    language_model,
    load_model,
    load_pseudolabels,
    load_tokenizer,
    paired_test,
    run_main,
    run_study,
    spread,
    spreads,
    timed_training,
    write_json,
)

HELD_OUT = {"validation": 2, "test": 3}
LIMITS = {"max_input_tokens": 96, "max_new_tokens": 24}
# Arms by the name of their folder, and as the table calls them.
TITLES = {
    "teacher": "teacher",
    "seqkd-warm-up": "SeqKD warm-up",
    "seqkd-as-long": "SeqKD, as long",
    "reinforce": "REINFORCE",
    "ppo": "PPO",
}
COLUMNS = {
    "accuracy": ("accuracy", 100, "%"),
    "sample_accuracy": ("of samples", 100, "%"),
    "regret": ("regret", 1, "nats"),
    "sample_regret": ("of samples", 1, "nats"),
    "match": ("match", 100, "%"),
    "length": ("length", 1, "tokens"),
    "cpu_seconds": ("time", 1, "CPU s"),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: FULL is what the README reports, QUICK only shows that everything runs."""

    teacher_rows: int = 60_000
    teacher_steps: int = 1000
    notes: int = 6000
    held_out: int = 600
    warmup_steps: int = 800
    reinforce_steps: int = 350
    ppo_steps: int = 500


FULL = Plan()
QUICK = Plan(
    teacher_rows=2000, teacher_steps=40, notes=400, held_out=60, warmup_steps=40, reinforce_steps=8, ppo_steps=8
)
# T5's own optimizer: from random weights AdamW needs more steps.
ADAFACTOR = {"optim": "adafactor", "optim_args": "scale_parameter=True"}
RL = {"rollouts_per_prompt": 1, "learning_rate": 1.5e-3, "lam": 0.1, "kl_coef": 0.02}


def build_model(tokenizer: Any, *, width: int, seed: int) -> Any:
    """A T5 v1.1-shaped model with random weights; embedding rows padded to a multiple of 8, as T5 pads its own."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Trainer settings shared by every stage."""
    return {
        "output_dir": str(folder),
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 25,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 250,
        "eval_limit": None,
        "sample_table_rows": 20,
        **LIMITS,
        **more,
    }


def train(trainer: Any, stage: str) -> float:
    """Train with progress lines, save the model; returns CPU seconds of the training."""
    seconds = timed_training(trainer, stage)["cpu_seconds"]
    trainer.save_model()
    return seconds


def evaluate(trainer: Any, seconds: float) -> dict[str, float]:
    """Held-out metrics of the trainer's policy; samples and their token rewards stay in its run folder."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if "eval_" in name}
    return {**metrics, "cpu_seconds": seconds}


def held_out_notes(cell: Cell, split: str) -> list[Any]:
    return task.make_examples(cell.settings["held_out"], HELD_OUT[split])


def reserved_notes(cell: Cell) -> frozenset[str]:
    """Notes of every held-out split: nothing trains on them."""
    return frozenset(example.student_input for split in HELD_OUT for example in held_out_notes(cell, split))


def train_teacher(cell: Cell) -> dict[str, float]:
    """A teacher that follows every template, from gold answers in random order and wording; its own metrics."""
    tokenizer = task.make_tokenizer()
    model = build_model(tokenizer, width=64, seed=0)
    held_out = held_out_notes(cell, cell.settings["split"])
    trainer = SupervisedTrainer(
        model,
        SupervisedArguments(**settings(cell.folder, max_steps=cell.settings["teacher_steps"], learning_rate=3e-3)),
        teacher=Teacher(language_model(copy.deepcopy(model), tokenizer), tokenizer),
        tokenizer=tokenizer,
        train_dataset=task.teacher_rows(cell.settings["teacher_rows"], seed=1, exclude=reserved_notes(cell)),
        eval_examples=[replace(e, student_input=e.teacher_inputs[0]) for e in held_out],
        task_metric=task.task_metric,
    )
    seconds = train(trainer, cell.name)
    trainer.teacher.lm.model.load_state_dict(model.state_dict())
    return evaluate(trainer, seconds)


def teacher_of(cell: Cell) -> Teacher:
    path = str(cell.inputs["teacher"].folder)
    tokenizer = load_tokenizer(path, "teacher")
    return Teacher(language_model(load_model(path, "teacher"), tokenizer), tokenizer)


def unlabeled(cell: Cell) -> list[Any]:
    return task.make_examples(cell.settings["notes"], 1000 + cell.seed, reserved_notes(cell))


def label(cell: Cell) -> dict[str, float]:
    """The teacher's sampled answers to the unlabeled notes of the seed."""
    generate_pseudolabels(
        teacher_of(cell),
        unlabeled(cell),
        out=cell.folder,
        strategy="sample",
        template_names=["what gets packed"],
        max_new_tokens=LIMITS["max_new_tokens"],
        batch_tokens=16_384,
        seed=cell.seed,
    )
    return {"labels": cell.settings["notes"]}


def train_student(cell: Cell, model: Any, kind: Any, arguments: dict[str, Any], **data: Any) -> dict[str, float]:
    """Train `model` as trainer `kind` does, on the data given; its held-out metrics."""
    Arguments, Trainer = kind
    teacher = teacher_of(cell)
    trainer = Trainer(
        model,
        Arguments(**settings(cell.folder, seed=cell.seed, **arguments)),
        teacher=teacher,
        tokenizer=teacher.tokenizer,
        eval_examples=held_out_notes(cell, cell.settings["split"]),
        task_metric=task.task_metric,
        **data,
    )
    return evaluate(trainer, train(trainer, cell.name))


def warm_student(cell: Cell) -> Any:
    return load_model(str(cell.inputs["seqkd-warm-up"].folder), "student")


def warm_up(cell: Cell) -> dict[str, float]:
    """A new student, trained on the teacher's labels."""
    student = build_model(task.make_tokenizer(), width=32, seed=cell.seed)
    return seqkd(cell, student, max_steps=cell.settings["warmup_steps"], learning_rate=3e-2)


def seqkd(cell: Cell, student: Any, **arguments: Any) -> dict[str, float]:
    labels = load_pseudolabels(cell.inputs["labels"].folder)
    kind = (SupervisedArguments, SupervisedTrainer)
    return train_student(cell, student, kind, {**ADAFACTOR, **arguments}, train_dataset=labels)


def reinforce(cell: Cell) -> dict[str, float]:
    arguments = {"max_steps": cell.settings["reinforce_steps"], "baseline": "teacher", **RL}
    kind = (ReinforceArguments, ReinforceTrainer)
    return train_student(cell, warm_student(cell), kind, arguments, train_examples=unlabeled(cell))


def ppo(cell: Cell) -> dict[str, float]:
    arguments = {"max_steps": cell.settings["ppo_steps"], **RL}
    return train_student(
        cell, warm_student(cell), (PPOArguments, PPOTrainer), arguments, train_examples=unlabeled(cell)
    )


def seqkd_as_long(cell: Cell) -> dict[str, float]:
    """The warm start trained on as it was, for about as many CPU seconds as the longer of the RL arms."""
    seconds = max(cell.inputs[arm].result["cpu_seconds"] for arm in ("reinforce", "ppo"))
    rate = cell.settings["warmup_steps"] / cell.inputs["seqkd-warm-up"].result["cpu_seconds"]
    return seqkd(cell, warm_student(cell), max_steps=max(1, round(seconds * rate)), learning_rate=1e-2)


def study(out: Path, plan: Plan, split: str, seeds: list[int]) -> Study:
    shared = {"split": split, "held_out": plan.held_out, "notes": plan.notes}
    warm = {**shared, "warmup_steps": plan.warmup_steps}
    arms = {
        "teacher": Arm(
            train_teacher,
            settings={"teacher_rows": plan.teacher_rows, "teacher_steps": plan.teacher_steps, **shared},
            seeds=(),
        ),
        "labels": Arm(label, ("teacher",), shared, resumes=True),
        "seqkd-warm-up": Arm(warm_up, ("teacher", "labels"), warm),
        "reinforce": Arm(
            reinforce, ("teacher", "seqkd-warm-up"), {**shared, "reinforce_steps": plan.reinforce_steps, "rl": RL}
        ),
        "ppo": Arm(ppo, ("teacher", "seqkd-warm-up"), {**shared, "ppo_steps": plan.ppo_steps, "rl": RL}),
        "seqkd-as-long": Arm(seqkd_as_long, ("teacher", "labels", "seqkd-warm-up", "reinforce", "ppo"), warm),
    }
    return Study(out, arms, seeds, headline=("accuracy", "regret"))


def print_table(results: dict[str, list[dict[str, float]]], seeds: int, split: str) -> None:
    """Teacher and arms; mean over seeds, and (lowest, highest)."""
    table = Table(title=f"{split} notes: mean and (lowest, highest) of {seeds} seed(s)")
    table.add_column("")
    for title, _, unit in COLUMNS.values():
        table.add_column(f"{title}\n{unit}", justify="right")
    for arm, runs in results.items():
        cells = []
        for name, (_, factor, unit) in COLUMNS.items():
            over, digits = spread([factor * run[name] for run in runs]), 2 if unit == "nats" else 1
            both = f"\n({over.lowest:.{digits}f}, {over.highest:.{digits}f})" if over.seeds > 1 else ""
            cells.append(f"{over.mean:.{digits}f}{both}")
        table.add_row(arm, *cells)
    Console(width=120).print(table)


def wins(study: Study, arm: str) -> dict[str, int]:
    """On how many seeds an RL arm beats SeqKD trained as long, in accuracy and in regret of greedy answers."""
    own, rival = (
        {name: {seed: run[name] for seed, run in study.results(who).items()} for name in ("accuracy", "regret")}
        for who in (arm, "seqkd-as-long")
    )
    return {
        "accuracy": paired_test(own["accuracy"], rival["accuracy"])["above_0"],
        "regret": paired_test(rival["regret"], own["regret"])["above_0"],
    }


def report(study: Study, plan: Plan, split: str) -> None:
    """results.json and the table, of what is finished."""
    results = {title: runs for arm, title in TITLES.items() if (runs := list(study.results(arm).values()))}
    won = {TITLES[arm]: wins(study, arm) for arm in ("reinforce", "ppo")}
    record = {
        "split": split,
        "seeds": study.seeds,
        "plan": asdict(plan),
        "seeds_won_against_seqkd_as_long": won,
        "results": results,
        "spread": {title: spreads(runs) for title, runs in results.items()},
    }
    write_json(study.out / "results.json", record)
    print_table(results, len(study.seeds), split)
    for arm, count in won.items():
        print(
            f"{arm} beats SeqKD trained as long on {count['accuracy']} of {len(study.seeds)} seeds in accuracy, "
            f"{count['regret']} in regret"
        )
    print(f"run folder: {study.out}  (results.json, the teacher, every student and its metrics.jsonl)")
    print(f"PPO student of seed 1: {study.out / 'seed-1' / 'ppo'}")
    print(f"did RL help, at what cost, where does it fail:  rlkd report {study.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--split", choices=HELD_OUT, default="test", help="held-out notes the table is of")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    grid = study(options.out, plan, options.split, list(range(1, options.seeds + 1)))
    run_study(grid, jobs=options.jobs, report=lambda: report(grid, plan, options.split))


if __name__ == "__main__":
    run_main(main)
