"""The study of objectives on real text: from the same warmed-up student, every method with equal CPU time and settings
chosen alike.

python recipes/studies/real_text.py [--config FILE] [--data FOLDER] [--out runs/real_text] [--tasks e2e,quora] [--quick]

Per task:
1. trains a vocabulary and a teacher, which answers inputs it was not trained on, greedily and by sampling
2. per seed: warms a student up on the greedy answers
3. measures the CPU seconds of an update of every method, the methods taking turns: from then on a budget of seconds is
   a number of updates, so what else the machine does changes no result
4. tries every method with the same number of settings on validation rows (first seed)
5. per seed: trains the student further with every method, for equal CPU seconds and for equal updates
6. writes the tables of test rows, paired bootstrap intervals, and results.json

Results that are finished are skipped: after an interruption, repeat the command. `--table` computes nothing and prints
what is finished.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import real_text_report
import real_text_task as task
from transformers import TrainerCallback

from rlkd import (
    Arm,
    Cell,
    ConfigError,
    Decoding,
    GKDArguments,
    GKDTrainer,
    PPOArguments,
    PPOTrainer,
    ReinforceArguments,
    ReinforceTrainer,
    RunOptions,
    Study,
    SupervisedArguments,
    SupervisedTrainer,
    Teacher,
    check_choice,
    file_digests,
    generate_pseudolabels,
    language_model,
    load_model,
    load_pseudolabels,
    load_tokenizer,
    read_plan,
    run_main,
    run_study,
    timed_training,
)

HERE = Path(__file__).resolve().parent
TRAINERS: dict[str, Any] = {
    "supervised": (SupervisedArguments, SupervisedTrainer),
    "gkd": (GKDArguments, GKDTrainer),
    "reinforce": (ReinforceArguments, ReinforceTrainer),
    "ppo": (PPOArguments, PPOTrainer),
}
# Keys of methods in the YAML; tasks: those it is tried on, all if left out.
METHOD = ("title", "tasks", "start", "trainer", "labels", "training", "trials", "equal_updates")
CYCLE = 4  # updates of a rollout batch of PPO
ANSWERS = ("id", "student", "sample_student", "regret", "sample_regret")


def trainer_settings(cell: Cell, **more: Any) -> dict[str, Any]:
    """Trainer settings shared by every arm."""
    return {
        "output_dir": str(cell.folder),
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 10,
        "max_steps": 1,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": cell.settings["batch"]["student"],
        "per_device_eval_batch_size": 100,
        "eval_limit": None,
        **cell.settings["limits"],
        **more,
    }


def splits_of(cell: Cell) -> task.Splits:
    return task.load_splits(str(cell.task), Path(cell.settings["data"]), cell.settings["rows"])


def teacher_of(cell: Cell) -> Teacher:
    path = str(cell.inputs["teacher"].folder)
    tokenizer = load_tokenizer(path, "teacher")
    limit = cell.settings["limits"]["max_input_tokens"]
    return Teacher(language_model(load_model(path, "teacher"), tokenizer), tokenizer, max_input_tokens=limit)


def train(trainer: Any, cell: Cell) -> dict[str, float]:
    """Train up to max_steps and save the model; returns what was used.

    start_*: the trainer's own check of its start, where it has one.
    """
    used = timed_training(trainer, cell.name)
    trainer.save_model()
    logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    start = {name: round(value, 3) for name, value in logs.items() if name.startswith("start_")}
    return {"updates": used["steps"], "cpu_seconds": round(used["cpu_seconds"], 1), **start}


def evaluate(trainer: Any, cell: Cell) -> dict[str, float]:
    """Numbers of all held-out rows; their answers are kept in the cell's folder."""
    rows = trainer.evaluate_policy(None)
    lines = [json.dumps({name: row[name] for name in ANSWERS}) + "\n" for row in rows]
    (cell.folder / real_text_report.ANSWERS).write_text("".join(lines), encoding="utf-8")
    return {name: round(value, 4) for name, value in trainer.evaluator.summarise(rows).items()}


def train_teacher(cell: Cell) -> dict[str, Any]:
    plan, splits = cell.settings["teacher"], splits_of(cell)
    tokenizer = task.train_tokenizer((text for pair in splits.pairs for text in pair), cell.settings["pieces"])
    model = task.build_model(tokenizer, seed=0, **plan["model"])
    own = {**cell.settings["from_scratch"], "per_device_train_batch_size": cell.settings["batch"]["teacher"]}
    own["max_steps"] = plan["updates"]
    trainer = SupervisedTrainer(
        model,
        SupervisedArguments(**trainer_settings(cell, **own)),
        tokenizer=tokenizer,
        train_dataset=[{"student_input": text, "label": answer} for text, answer in splits.pairs],
    )
    used = train(trainer, cell)
    tokenizer.save_pretrained(cell.folder)
    return {**used, "parameters": model.num_parameters(), "pairs": len(splits.pairs), "pieces": len(tokenizer)}


def evaluate_teacher(cell: Cell) -> dict[str, float]:
    """The teacher's own answers, evaluated as a student's are."""
    teacher = teacher_of(cell)
    trainer = SupervisedTrainer(
        teacher.lm.model,
        SupervisedArguments(**trainer_settings(cell)),
        teacher=teacher,
        tokenizer=teacher.tokenizer,
        train_dataset=[],
        eval_examples=getattr(splits_of(cell), cell.settings["split"]),
        task_metric=task.task_metric,
    )
    return evaluate(trainer, cell)


def label(cell: Cell) -> dict[str, int]:
    """The teacher's answers to the unlabeled inputs, by the strategy that ends the arm's name."""
    inputs = splits_of(cell).unlabeled
    generate_pseudolabels(
        teacher_of(cell),
        inputs,
        out=cell.folder,
        template_names=["bare"],
        decoding=Decoding(cell.settings["strategy"], cell.settings["limits"]["max_new_tokens"]),
        options=RunOptions(quiet=True),
    )
    return {"inputs": len(inputs)}


def labels_of(cell: Cell, kind: str, share: float) -> Any:
    """The labels of the first `share` of the unlabeled inputs."""
    inputs = splits_of(cell).unlabeled
    known = {example.id for example in inputs[: max(1, round(share * len(inputs)))]}
    labels = load_pseudolabels(cell.inputs[f"labels-{kind}"].folder)
    return labels.select([i for i, name in enumerate(labels["id"]) if name in known])


def student_trainer(cell: Cell, model: Any, method: dict[str, Any], training: dict[str, Any]) -> Any:
    """The trainer of `model` with a method, whose evaluations are of the cell's split."""
    teacher, splits = teacher_of(cell), splits_of(cell)
    labels = labels_of(cell, method["labels"], method["share"]) if "labels" in method else None
    supervised = method["trainer"] == "supervised"
    data = {"train_dataset": labels} if supervised else {"train_examples": splits.unlabeled, "labels": labels}
    Arguments, Trainer = TRAINERS[method["trainer"]]
    return Trainer(
        model,
        Arguments(**trainer_settings(cell, seed=cell.seed or 0, **method.get("training", {}), **training)),
        teacher=teacher,
        tokenizer=teacher.tokenizer,
        eval_examples=getattr(splits, cell.settings["split"]),
        task_metric=task.task_metric,
        **data,
    )


def train_student(cell: Cell, model: Any, method: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Train `model` with a method for the budget of its cell, and evaluate it on the cell's split."""
    budget = cell.settings["budget"]
    price = cell.inputs["prices"].result[method["name"]] if "seconds" in budget else None
    updates = budget["updates"] if price is None else max(round(budget["seconds"] / price), 1)
    trainer = student_trainer(cell, model, method, {**training, "max_steps": updates})
    used = train(trainer, cell)
    shown = {} if price is None else {"seconds_per_update": price}
    return {**used, **shown, "parameters": model.num_parameters(), "training": training, **evaluate(trainer, cell)}


class StepClock(TrainerCallback):
    """CPU seconds at the end of every update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.process_time())


def measure_prices(cell: Cell) -> dict[str, float]:
    """CPU seconds of an update of every method: the median of turns, in which the methods follow each other.

    A turn trains for three rollout batches of PPO; the first warms up. Prompts are new to the teacher, as in a first
    pass over the inputs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cell.settings["methods"]}
    for _ in range(cell.settings["turns"]):
        for name, method in cell.settings["methods"].items():
            trainer = student_trainer(cell, start_of(cell, method), method, {"max_steps": 3 * CYCLE})
            clock = StepClock()
            trainer.add_callback(clock)
            timed_training(trainer, f"{cell.name}, {name}")
            seconds[name].append((clock.ends[-1] - clock.ends[CYCLE - 1]) / (2 * CYCLE))
    return {name: round(median(turns), 5) for name, turns in seconds.items()}


def warm_up(cell: Cell) -> dict[str, Any]:
    """The student that all methods of a seed start from, and its numbers."""
    tokenizer = load_tokenizer(str(cell.inputs["teacher"].folder), "teacher")
    model = task.build_model(tokenizer, seed=cell.seed or 0, **cell.settings["student"])
    method = {"trainer": "supervised", "labels": "greedy", "share": cell.settings["share"]}
    return train_student(cell, model, method, cell.settings["from_scratch"])


def start_of(cell: Cell, method: dict[str, Any]) -> Any:
    return load_model(str(cell.inputs[method["start"]].folder), "student")


def trial(cell: Cell) -> dict[str, Any]:
    """One candidate for the settings of a method, on validation rows."""
    method = cell.settings["method"]
    return train_student(cell, start_of(cell, method), method, cell.settings["training"])


def main_arm(cell: Cell) -> dict[str, Any]:
    """The start trained further with the settings that have the best BLEU on validation rows, greedy and sampled."""
    trials = [done.result for arm, done in cell.inputs.items() if "-trial-" in arm]
    best = max(trials, key=lambda result: result["bleu"] + result["sample_bleu"])
    method = cell.settings["method"]
    return train_student(cell, start_of(cell, method), method, best["training"])


def methods_of(plan: dict[str, Any], task_name: str) -> dict[str, dict[str, Any]]:
    """What the methods of a task are made of, without their titles and trials.

    Raises ConfigError for settings that a method does not have, and for fewer trials than the others'.
    """
    found = {}
    for name, method in plan["methods"].items():
        if unknown := sorted(method.keys() - METHOD):
            raise ConfigError(f"methods.{name}.{unknown[0]}: not a setting of a method; those are {', '.join(METHOD)}.")
        check_choice(f"methods.{name}.trainer", method["trainer"], TRAINERS)
        check_choice(f"methods.{name}.start", method["start"], plan["starts"])
        for other in method.get("tasks", ()):
            check_choice(f"methods.{name}.tasks", other, plan["tasks"])
        if len(method.get("trials", plan["trials"])) < len(plan["trials"]):
            raise ConfigError(f"methods.{name}.trials: must be {len(plan['trials'])} or more, as for the others.")
        if task_name in method.get("tasks", plan["tasks"]):
            what = {key: method[key] for key in ("start", "trainer", "labels", "training") if key in method}
            found[name] = {**what, "name": name, "share": plan["starts"][method["start"]]}
    return found


def method_arms(
    method: dict[str, Any], plan: dict[str, Any], own: dict[str, Any], shared: dict[str, Any]
) -> dict[str, Arm]:
    """The trials of a method, and the method on each axis. own: settings of the task; shared: of all its arms."""
    name, written = method["name"], plan["methods"][method["name"]]
    common = {**shared, "method": method}
    labels = [f"labels-{method['labels']}"] if "labels" in method else []
    needs = ("teacher", *labels, method["start"])
    budget = {"seconds": own["seconds"]["trial"]}
    trials = {
        f"{name}-trial-{number}": {**common, "split": "validation", "budget": budget, "training": training}
        for number, training in enumerate(written.get("trials", plan["trials"]))
    }
    arms = {arm: Arm(trial, (*needs, "prices"), settings, tuple(plan["seeds"][:1])) for arm, settings in trials.items()}
    budgets = {"": {"seconds": own["seconds"]["arm"]}, "-updates": {"updates": own["updates"]["arm"]}}
    for suffix in real_text_report.AXES:
        if suffix == "" or (own["updates"]["arm"] and written.get("equal_updates", True)):
            settings = {**common, "split": "test", "budget": budgets[suffix]}
            arms[name + suffix] = Arm(main_arm, (*needs, *trials, *(["prices"] if suffix == "" else [])), settings)
    return arms


def study(plan: dict[str, Any], name: str, data: Path, out: Path) -> Study:
    """The arms of one task."""
    own, methods = plan["tasks"][name], methods_of(plan, name)
    shared = {key: own[key] for key in ("rows", "limits")} | {"batch": plan["batch"]}
    shared |= {"data": str(data), "files": file_digests(data, task.FILES[name])}
    scratch, teacher = {"from_scratch": plan["from_scratch"]}, {key: own[key] for key in ("teacher", "pieces")}
    test = {**shared, "split": "test"}
    arms = {
        "teacher": Arm(train_teacher, (), {**shared, **scratch, **teacher}, seeds=()),
        "teacher-test": Arm(evaluate_teacher, ("teacher",), test, seeds=()),
    }
    for strategy, kind in (("greedy", "greedy"), ("sample", "sampled")):
        settings = {**shared, "strategy": strategy}
        arms[f"labels-{kind}"] = Arm(label, ("teacher",), settings, seeds=(), resumes=True)
    for start, share in plan["starts"].items():
        settings = {**test, **scratch, "student": own["student"], "share": share}
        settings["budget"] = {"updates": own["updates"]["warmup"]}
        arms[start] = Arm(warm_up, ("teacher", "labels-greedy"), settings)
    priced = {**shared, "split": "validation", "methods": methods, "turns": plan["turns"]}
    needs = ("teacher", "labels-greedy", "labels-sampled", *plan["starts"])
    arms["prices"] = Arm(measure_prices, needs, priced, tuple(plan["seeds"][:1]))
    for method in methods.values():
        arms |= method_arms(method, plan, own, shared)
    return Study(out, arms, plan["seeds"], {name: {}}, headline=("bleu", "sample_bleu", "regret", "length"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "real_text.yaml", help="sizes and settings")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="e2e, quora_para")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/real_text[-quick]")
    parser.add_argument("--tasks", help="some of the tasks, separated by commas, in this order; default: all")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = read_plan(options.config, quick=options.quick)
    out = options.out or Path("runs/real_text-quick" if options.quick else "runs/real_text")
    names = options.tasks.split(",") if options.tasks else list(plan["tasks"])
    for name in names:
        check_choice("tasks", name, plan["tasks"])
    grids = {name: study(plan, name, options.data, out) for name in names}
    try:
        for grid in grids.values() if not options.table else ():
            run_study(grid, jobs=options.jobs)
    finally:
        references = {name: task.load_splits(name, options.data, plan["tasks"][name]["rows"]).test for name in names}
        real_text_report.report(grids, references, plan, out)


if __name__ == "__main__":
    run_main(main)
