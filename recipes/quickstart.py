"""The main job, end to end, on a synthetic task: no downloads, two CPU cores, minutes.

python recipes/quickstart.py [--out runs/quickstart] [--seeds 3] [--quick]

1. trains a prompted T5 teacher on the task's notes (recipes/quickstart_task.py: many right answers for every input)
2. per seed: the teacher labels unlabeled notes by sampling, and a small student is warmed up on the labels (SeqKD)
3. from that same start trains on with REINFORCE, with PPO, and with SeqKD for as many CPU seconds as the longer of
   the two
4. prints one table of held-out results, also in results.json

Results that are finished are skipped: after an interruption, repeat the command. Settings were chosen on the validation
notes (`--split validation`); the table is of the test notes.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import quickstart_task as task
from quickstart_task import build_model
from rlkd import (
    Arm,
    Cell,
    Decoding,
    PPOArguments,
    PPOTrainer,
    ReinforceArguments,
    ReinforceTrainer,
    RunOptions,
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
    spread_text,
    spreads,
    timed_training,
    write_json,
)

# Sizes of a run: FULL is what the README reports, QUICK only shows that everything runs.
FULL = {
    "teacher_rows": 60_000,
    "teacher_steps": 1000,
    "notes": 6000,
    "held_out": 600,
    "warmup_steps": 800,
    "reinforce_steps": 350,
    "ppo_steps": 500,
}
QUICK = dict(zip(FULL, (2000, 40, 400, 60, 40, 8, 8), strict=True))
LIMITS = {"max_input_tokens": 96, "max_new_tokens": 24}
# T5's own optimizer: AdamW needs more steps from random weights.
ADAFACTOR = {"optim": "adafactor", "optim_args": "scale_parameter=True"}
RL = {"rollouts_per_prompt": 1, "learning_rate": 1.5e-3, "lam": 0.1, "kl_coef": 0.02}
TRAINERS = {"reinforce": (ReinforceArguments, ReinforceTrainer), "ppo": (PPOArguments, PPOTrainer)}
COLUMNS = {
    "accuracy": ("accuracy", 100, "%"),
    "sample_accuracy": ("of samples", 100, "%"),
    "regret": ("regret", 1, "nats"),
    "sample_regret": ("of samples", 1, "nats"),
    "match": ("match", 100, "%"),
    "length": ("length", 1, "tokens"),
    "cpu_seconds": ("time", 1, "CPU s"),
}
TITLES = {
    "teacher": "teacher",
    "seqkd-warm-up": "SeqKD warm-up",
    "seqkd-as-long": "SeqKD, as long",
    "reinforce": "REINFORCE",
    "ppo": "PPO",
}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Trainer settings shared by every arm."""
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


def train_teacher(cell: Cell) -> dict[str, float]:
    """A teacher that follows every template, from gold answers in random order and wording; its own metrics."""
    plan, tokenizer = cell.settings, task.make_tokenizer()
    model = build_model(tokenizer, width=64, seed=0)
    held_out = task.held_out_notes(plan["held_out"], plan["split"])
    trainer = SupervisedTrainer(
        model,
        SupervisedArguments(**settings(cell.folder, max_steps=plan["teacher_steps"], learning_rate=3e-3)),
        teacher=Teacher(language_model(copy.deepcopy(model), tokenizer), tokenizer),
        tokenizer=tokenizer,
        train_dataset=task.teacher_rows(plan["teacher_rows"], 1, task.reserved_notes(plan["held_out"])),
        eval_examples=[replace(note, student_input=note.teacher_inputs[0]) for note in held_out],
        task_metric=task.task_metric,
    )
    seconds = train(trainer, cell.name)
    trainer.teacher.lm.model.load_state_dict(model.state_dict())
    return evaluate(trainer, seconds)


def shared(cell: Cell) -> dict[str, Any]:
    """Arguments that all trainers of a student share: the teacher, and the evaluation."""
    path = str(cell.inputs["teacher"].folder)
    tokenizer = load_tokenizer(path, "teacher")
    return {
        "teacher": Teacher(language_model(load_model(path, "teacher"), tokenizer), tokenizer),
        "tokenizer": tokenizer,
        "eval_examples": task.held_out_notes(cell.settings["held_out"], cell.settings["split"]),
        "task_metric": task.task_metric,
    }


def unlabeled(cell: Cell) -> list[Any]:
    return task.make_examples(cell.settings["notes"], 1000 + cell.seed, task.reserved_notes(cell.settings["held_out"]))


def label(cell: Cell) -> dict[str, int]:
    """The teacher's sampled answers to the seed's notes."""
    generate_pseudolabels(
        shared(cell)["teacher"],
        unlabeled(cell),
        out=cell.folder,
        template_names=["what gets packed"],
        decoding=Decoding("sample", LIMITS["max_new_tokens"]),
        options=RunOptions(seed=cell.seed, batch_tokens=16_384),
    )
    return {"notes": cell.settings["notes"]}


def seqkd(cell: Cell, student: Any, **more: Any) -> dict[str, float]:
    arguments = SupervisedArguments(**settings(cell.folder, seed=cell.seed, **ADAFACTOR, **more))
    labels = load_pseudolabels(cell.inputs["labels"].folder)
    trainer = SupervisedTrainer(student, arguments, train_dataset=labels, **shared(cell))
    return evaluate(trainer, train(trainer, cell.name))


def warm_up(cell: Cell) -> dict[str, float]:
    student = build_model(task.make_tokenizer(), width=32, seed=cell.seed)
    return seqkd(cell, student, max_steps=cell.settings["warmup_steps"], learning_rate=3e-2)


def warm_student(cell: Cell) -> Any:
    return load_model(str(cell.inputs["seqkd-warm-up"].folder), "student")


def reinforcement(cell: Cell) -> dict[str, float]:
    Arguments, Trainer = TRAINERS[cell.arm]
    baseline = {"baseline": "teacher"} if cell.arm == "reinforce" else {}
    steps = cell.settings[f"{cell.arm}_steps"]
    arguments = Arguments(**settings(cell.folder, seed=cell.seed, max_steps=steps, **baseline, **RL))
    trainer = Trainer(warm_student(cell), arguments, train_examples=unlabeled(cell), **shared(cell))
    return evaluate(trainer, train(trainer, cell.name))


def seqkd_as_long(cell: Cell) -> dict[str, float]:
    """The warm start trained on as it was, for about as many CPU seconds as the longer of the RL arms."""
    seconds = max(cell.inputs[arm].result["cpu_seconds"] for arm in TRAINERS)
    warmup_seconds = cell.inputs["seqkd-warm-up"].result["cpu_seconds"]
    steps = max(1, round(cell.settings["warmup_steps"] * seconds / warmup_seconds))
    return seqkd(cell, warm_student(cell), max_steps=steps, learning_rate=1e-2)


def study(out: Path, plan: dict[str, int], split: str, seeds: list[int]) -> Study:
    settings, start = {**plan, "split": split}, ("teacher", "labels", "seqkd-warm-up")
    arms = {
        "teacher": Arm(train_teacher, (), settings, seeds=()),
        "labels": Arm(label, ("teacher",), settings, resumes=True),
        "seqkd-warm-up": Arm(warm_up, ("teacher", "labels"), settings),
        "reinforce": Arm(reinforcement, start, settings),
        "ppo": Arm(reinforcement, start, settings),
        "seqkd-as-long": Arm(seqkd_as_long, (*start, "reinforce", "ppo"), settings),
    }
    return Study(out, arms, seeds, headline=("accuracy", "regret"))


def print_table(results: dict[str, list[dict[str, float]]], title: str) -> None:
    """Teacher and arms; mean over seeds, and (lowest, highest)."""
    table = Table("", title=title)
    for heading, _, unit in COLUMNS.values():
        table.add_column(f"{heading}\n{unit}", justify="right")
    for arm, runs in results.items():
        cells = [([factor * run[name] for run in runs], unit) for name, (_, factor, unit) in COLUMNS.items()]
        form = "{mean}\n({lowest}, {highest})"
        table.add_row(arm, *(spread_text(values, form, 2 if unit == "nats" else 1) for values, unit in cells))
    Console(width=120).print(table)


def wins(study: Study, arm: str) -> dict[str, int]:
    """On how many seeds an RL arm beats SeqKD trained as long, in accuracy and in regret of greedy answers."""
    accuracy = paired_test(study.numbers(arm, "accuracy"), study.numbers("seqkd-as-long", "accuracy"))
    regret = paired_test(study.numbers("seqkd-as-long", "regret"), study.numbers(arm, "regret"))
    return {"accuracy": accuracy["above_0"], "regret": regret["above_0"]}


def report(study: Study, plan: dict[str, int], split: str) -> None:
    """results.json and the table of the finished results."""
    results = {title: runs for arm, title in TITLES.items() if (runs := list(study.results(arm).values()))}
    won = {TITLES[arm]: wins(study, arm) for arm in TRAINERS}
    spread = {title: spreads(runs) for title, runs in results.items()}
    record = {"split": split, "seeds": study.seeds, "plan": plan, "seeds_won_against_seqkd_as_long": won}
    write_json(study.out / "results.json", {**record, "spread": spread, "results": results})
    missing = sum(study.finished(cell) is None for cell in study.cells.values())
    title = f"{split} notes: mean and (lowest, highest) of {len(study.seeds)} seed(s)"
    print_table(results, f"{title}, {missing} results missing" if missing else title)
    compared = len(study.results("seqkd-as-long"))
    for arm, count in won.items():
        print(
            f"{arm} beats SeqKD trained as long on {count['accuracy']} of {compared} seeds in accuracy, "
            f"{count['regret']} in regret"
        )
    print(f"run folder: {study.out}  (results.json, the teacher, every student and its metrics.jsonl)")
    print(f"did RL help, at what cost, where does it fail:  rlkd report {study.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="run folder; default: runs/quickstart[-quick]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--split", choices=task.HELD_OUT, default="test", help="held-out notes the table is of")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    out = options.out or Path("runs/quickstart-quick" if options.quick else "runs/quickstart")
    grid = study(out, plan, options.split, list(range(1, options.seeds + 1)))
    run_study(grid, jobs=options.jobs, report=lambda: report(grid, plan, options.split))


if __name__ == "__main__":
    run_main(main)
