"""The study on real text: a prompted multi-task T5 teacher, trained here, and a student of a quarter of its size.

python recipes/studies/quora_agnews.py [--config FILE] [--data FOLDER] [--out runs/quora_agnews] [--quick]

1. trains the teacher on Quora paraphrases and AG News topics under all templates of both (prompts/)
2. the teacher labels inputs it was not trained on, by sampling
3. per seed: a student is warmed up on the labels (SeqKD), then trained further from that same start with SeqKD,
   REINFORCE and PPO, equal CPU seconds each, settings chosen on validation rows (first seed)
4. writes the table of test rows, and results.json

Results that are finished are skipped: after an interruption, repeat the command.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import quora_agnews_task as task
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
    file_digests,
    generate_pseudolabels,
    language_model,
    load_model,
    load_pseudolabels,
    load_tokenizer,
    markdown_table,
    read_plan,
    run_main,
    run_study,
    spread_text,
    spreads,
    timed_training,
    write_json,
)

FILES = [f"{name}/{part}.jsonl" for name in ("quora_para", "agnews") for part in ("train", "test")]
HERE = Path(__file__).resolve().parent
TRAINERS: dict[str, Any] = {
    "seqkd": (SupervisedArguments, SupervisedTrainer),
    "reinforce": (ReinforceArguments, ReinforceTrainer),
    "ppo": (PPOArguments, PPOTrainer),
}
TITLES = {
    "teacher-test": "teacher",
    "warm-up": "SeqKD warm-up",
    "seqkd": "SeqKD, as long",
    "reinforce": "REINFORCE",
    "ppo": "PPO",
}
COLUMNS = {
    "bleu": ("BLEU", 1, 1),
    "rougeL": ("ROUGE-L", 1, 1),
    "self_bleu": ("self-BLEU", 1, 1),
    "copies": ("copies %", 100, 1),
    "accuracy": ("news acc. %", 100, 1),
    "sample_accuracy": ("of samples %", 100, 1),
    "quora_regret": ("regret para.", 1, 2),
    "sample_quora_regret": ("of samples", 1, 2),
    "agnews_regret": ("regret news", 1, 2),
    "match": ("match %", 100, 1),
    "quora_length": ("length para.", 1, 1),
    "quora_finish_rate": ("finished %", 100, 1),
}


def trainer_settings(cell: Cell, **more: Any) -> dict[str, Any]:
    """Trainer settings shared by every arm: training ends with its CPU budget."""
    return {
        "output_dir": str(cell.folder),
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 10,
        "max_steps": 1_000_000,
        "lr_scheduler_type": "constant",
        "per_device_eval_batch_size": 100,
        "eval_limit": None,
        **cell.settings["limits"],
        **more,
    }


def tokenizer_of(cell: Cell) -> Any:
    return load_tokenizer(str(Path(cell.settings["data"]) / "tokenizers" / "t5"), "teacher")


def splits_of(cell: Cell) -> dict[str, Any]:
    return task.load_splits(Path(cell.settings["data"]), cell.settings["rows"])


def examples(cell: Cell, part: str) -> list[Any]:
    return task.examples(splits_of(cell), part, cell.settings["scoring_templates"])


def teacher_of(cell: Cell) -> Teacher:
    model, tokenizer = load_model(str(cell.inputs["teacher"].folder), "teacher"), tokenizer_of(cell)
    limit = cell.settings["limits"]["max_input_tokens"]
    return Teacher(language_model(model, tokenizer), tokenizer, max_input_tokens=limit)


def train(trainer: Any, cell: Cell, seconds: float) -> dict[str, float]:
    """Train for a budget of CPU seconds, save the model; returns what was used."""
    used = timed_training(trainer, cell.name, seconds)
    trainer.save_model()
    return {"steps": used["steps"], "cpu_seconds": round(used["cpu_seconds"], 1)}


def evaluate(trainer: Any) -> dict[str, float]:
    return task.summarise(trainer.evaluator, trainer.evaluate_policy(None))


def train_teacher(cell: Cell) -> dict[str, Any]:
    plan, tokenizer = cell.settings["teacher"], tokenizer_of(cell)
    pairs = task.teacher_pairs(splits_of(cell), plan["pairs"], plan["training"]["per_device_train_batch_size"])
    model = task.build_model(tokenizer, seed=0, **plan["model"])
    arguments = SupervisedArguments(**trainer_settings(cell, train_sampling_strategy="sequential", **plan["training"]))
    trainer = SupervisedTrainer(model, arguments, tokenizer=tokenizer, train_dataset=pairs)
    used = train(trainer, cell, plan["seconds"])
    return {**used, "parameters": model.num_parameters(), "pairs": len(pairs)}


def evaluate_teacher(cell: Cell) -> dict[str, float]:
    """The teacher's own answers to its prompts, evaluated as a student's are."""
    teacher = teacher_of(cell)
    prompted = [replace(e, student_input=e.teacher_inputs[0]) for e in examples(cell, cell.settings["split"])]
    arguments = SupervisedArguments(**trainer_settings(cell))
    shared = {"teacher": teacher, "tokenizer": teacher.tokenizer, "task_metric": task.task_metric}
    return evaluate(SupervisedTrainer(teacher.lm.model, arguments, train_dataset=[], eval_examples=prompted, **shared))


def label(cell: Cell) -> dict[str, int]:
    """The teacher's sampled answers to the unlabeled inputs."""
    inputs, limit = examples(cell, "unlabeled"), cell.settings["limits"]["max_new_tokens"]
    generate_pseudolabels(
        teacher_of(cell),
        inputs,
        out=cell.folder,
        template_names=["first"],
        decoding=Decoding("sample", limit, labels_per_input=cell.settings["labels_per_input"]),
        options=RunOptions(shard_rows=2500),
    )
    return {"inputs": len(inputs)}


def train_student(cell: Cell, method: str, model: Any, training: dict[str, Any]) -> dict[str, Any]:
    """Train `model` with SeqKD, REINFORCE or PPO, and evaluate it on the split of its cell."""
    teacher = teacher_of(cell)
    if method == "seqkd":
        data = {"train_dataset": load_pseudolabels(cell.inputs["labels"].folder)}
    else:
        data = {"train_examples": examples(cell, "unlabeled")}
    Arguments, Trainer = TRAINERS[method]
    trainer = Trainer(
        model,
        Arguments(**trainer_settings(cell, seed=cell.seed, **training)),
        teacher=teacher,
        tokenizer=teacher.tokenizer,
        eval_examples=examples(cell, cell.settings["split"]),
        task_metric=task.task_metric,
        **data,
    )
    used = train(trainer, cell, cell.settings["seconds"])
    return {**used, "parameters": model.num_parameters(), "training": training, **evaluate(trainer)}


def warm_up(cell: Cell) -> dict[str, Any]:
    """The student that all arms of a seed start from, and its scores."""
    model = task.build_model(tokenizer_of(cell), seed=cell.seed, **cell.settings["student"])
    return train_student(cell, "seqkd", model, cell.settings["training"])


def warm_student(cell: Cell) -> Any:
    return load_model(str(cell.inputs["warm-up"].folder), "student")


def trial(cell: Cell) -> dict[str, Any]:
    """One candidate for the settings of a method, on validation rows."""
    return train_student(cell, cell.settings["method"], warm_student(cell), cell.settings["training"])


def main_arm(cell: Cell) -> dict[str, Any]:
    """The warm start trained further with the candidate settings that have the lowest validation regret.

    Regret is a sum over tokens, so short answers are cheap: answers must be about as long as the teacher's.
    """
    length = cell.inputs["teacher-validation"].result["quora_length"]
    trials = [done.result for arm, done in cell.inputs.items() if "-trial-" in arm]

    def rank(result: dict[str, Any]) -> tuple[bool, float]:
        return not 0.75 <= result["quora_length"] / length <= 1.25, result["regret"] + result["sample_regret"]

    return train_student(cell, cell.arm, warm_student(cell), min(trials, key=rank)["training"])


def study(plan: dict[str, Any], data: Path, out: Path) -> Study:
    shared = {key: plan[key] for key in ("limits", "rows", "scoring_templates")}
    shared |= {"data": str(data), "files": file_digests(data, [*FILES, "tokenizers/t5/tokenizer.json"])}
    test, validation = {**shared, "split": "test"}, {**shared, "split": "validation"}
    arms = {
        "teacher": Arm(train_teacher, (), {**shared, "teacher": plan["teacher"]}, seeds=()),
        "teacher-test": Arm(evaluate_teacher, ("teacher",), test, seeds=()),
        "teacher-validation": Arm(evaluate_teacher, ("teacher",), validation, seeds=()),
        "labels": Arm(
            label, ("teacher",), {**shared, "labels_per_input": plan["labels_per_input"]}, seeds=(), resumes=True
        ),
        "warm-up": Arm(warm_up, ("teacher", "labels"), {**test, "student": plan["student"], **plan["warmup"]}),
    }
    start, seconds = ("teacher", "labels", "warm-up"), plan["arms"]["seconds"]
    for method, candidates in (("seqkd", plan["arms"]["seqkd"]), ("reinforce", plan["arms"]["rl"])):
        for number, training in enumerate(candidates):
            own = {"method": method, "training": training, "seconds": plan["arms"]["trial_seconds"]}
            arms[f"{method}-trial-{number}"] = Arm(trial, start, {**validation, **own}, tuple(plan["seeds"][:1]))
    for method, tried in (("seqkd", "seqkd"), ("reinforce", "reinforce"), ("ppo", "reinforce")):
        needs = (*start, "teacher-validation", *(name for name in arms if name.startswith(f"{tried}-trial-")))
        arms[method] = Arm(main_arm, needs, {**test, "seconds": seconds})
    return Study(out, arms, plan["seeds"], headline=("regret", "sample_regret", "quora_length"))


def report(study: Study, plan: dict[str, Any]) -> None:
    """results.json and table.md of the finished results."""
    results = {title: runs for arm, title in TITLES.items() if (runs := list(study.results(arm).values()))}
    record = {
        "plan": plan,
        "teacher": study.results("teacher").get(None),
        "validation": {arm: list(study.results(arm).values()) for arm in study.arms if "-trial-" in arm},
        "spread": {title: spreads(runs) for title, runs in results.items()},
        "results": results,
    }
    write_json(study.out / "results.json", record)
    rows = [
        [title]
        + [
            spread_text([factor * run[name] for run in runs], "{mean} [{lowest}, {highest}]", digits)
            for name, (_, factor, digits) in COLUMNS.items()
        ]
        for title, runs in results.items()
    ]
    table = markdown_table(["", *(title for title, _, _ in COLUMNS.values())], rows)
    (study.out / "table.md").write_text(table + "\n")
    print(table)
    print(f"run folder: {study.out} (results.json, table.md, the teacher, every student and its metrics.jsonl)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "quora_agnews.yaml", help="sizes and settings")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="quora_para, agnews, tokenizers/t5")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/quora_agnews[-quick]")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = read_plan(options.config, quick=options.quick)
    out = options.out or Path("runs/quora_agnews-quick" if options.quick else "runs/quora_agnews")
    grid = study(plan, options.data, out)
    run_study(grid, jobs=options.jobs, report=lambda: report(grid, plan))


if __name__ == "__main__":
    run_main(main)
