"""The study of encoder students: does the tree pay? The eleven presets, same start, same settings, paired seeds.

python recipes/studies/tkd_presets.py --model FOLDER [--data FOLDER] [--out runs/tkd_presets] [--quick]

1. per task: fine-tunes the model as the teacher
2. per task and initialisation: finds a learning rate with preset kd on training rows kept apart, first seed
3. per seed and preset: trains a student cut from the teacher and scores it once on the test rows, after the last epoch
4. writes table.md, results.json (every run, means, paired tests) and plot.svg from whatever is finished

Results that are finished are skipped: after an interruption, repeat the command. `--quick` needs a folder of its own.
"""

from __future__ import annotations

import argparse
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from rlkd import (
    PRESETS,
    Arm,
    Cell,
    Study,
    TableLayout,
    TKDArguments,
    TKDTrainer,
    build_student,
    classification_metrics,
    find_labels,
    load_labelled,
    load_rows,
    markdown_table,
    paired_test,
    read_plan,
    run_main,
    run_study,
    spread_text,
    timed_training,
    write_json,
)

HERE = Path(__file__).resolve().parent
SHARED = ("test_rows", "dev_rows", "max_length", "training", "teacher")  # keys of the plan that every arm reads
STUDENT = ("layers", "train_rows", "student")


class Data:
    """The rows of a cell's task: none of `test` is in another part."""

    def __init__(self, plan: dict[str, Any]):
        folder, self.plan = Path(plan["data"]), plan
        train_file = str(folder / plan["train"])
        self.labels = find_labels(load_rows(train_file)["label"])
        layout = TableLayout(text=plan["text"])
        rows = load_labelled(train_file, layout, labels=self.labels)
        tests = [load_labelled(str(folder / file), layout, labels=self.labels) for file in plan["test"]]
        self.test = [row for rows in tests for row in rows]
        self.test = sorted(self.test[: plan["test_rows"]], key=lambda row: len(row["text"]))  # batches of like lengths
        tested = {row["text"] for row in self.test}
        rows = [row for row in rows if row["text"] not in tested]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.dev = [rows[i] for i in order[: plan["dev_rows"]]]
        self.train = [rows[i] for i in order[plan["dev_rows"] :][: plan["teacher"]["rows"]]]

    def subset(self, seed: int) -> list[dict[str, Any]]:
        """The training rows of a seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.train[i] for i in order[: self.plan["train_rows"]]]


class Runs:
    """Trainings on the data of one cell."""

    def __init__(self, cell: Cell):
        self.cell, self.plan = cell, cell.settings
        self.data, self.tokenizer = Data(self.plan), AutoTokenizer.from_pretrained(self.plan["model"])

    @cached_property
    def teacher(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.cell.inputs["teacher"].folder).eval()

    def fit(self, model: Any, rows: Any, held_out: Any, **settings: Any) -> dict[str, float]:
        """Train, then score once on `held_out`; and the CPU seconds of the training."""
        arguments = TKDArguments(
            output_dir=str(self.cell.folder),
            max_length=self.plan["max_length"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be requested
            **self.plan["training"] | settings,
        )
        trainer = TKDTrainer(
            model,
            arguments,
            teacher=None if arguments.preset == "ft" else self.teacher,
            tokenizer=self.tokenizer,
            train_rows=rows,
            eval_rows=held_out,
            compute_metrics=classification_metrics([self.plan["metric"]]),
        )
        seconds = timed_training(trainer, self.cell.name)["cpu_seconds"]
        return {"score": trainer.evaluate()[f"eval_{self.plan['metric']}"], "cpu_seconds": round(seconds, 1)}

    def student(self, init: str, preset: str, seed: int, learning_rate: float, held_out: Any) -> dict[str, float]:
        """Train and score one student, cut from the teacher."""
        # A tree in the teacher's attention cannot be cached; all other outputs of the teacher are computed once.
        kept = "none" if preset == "ft" or "td_teacher" in PRESETS[preset] else "hidden"
        folder = self.cell.folder / "kept"
        set_seed(seed)
        record = self.fit(
            build_student(self.teacher, self.plan["layers"], init),
            self.data.subset(seed),
            held_out,
            preset=preset,
            seed=seed,
            learning_rate=learning_rate,
            teacher_cache=kept,
            teacher_cache_dir=None if kept == "none" else str(folder),
            **self.plan["student"],
        )
        shutil.rmtree(folder, ignore_errors=True)
        return record | {"learning_rate": learning_rate}


def train_teacher(cell: Cell) -> dict[str, Any]:
    """The model fine-tuned on the task."""
    runs = Runs(cell)
    rows, labels = runs.data.train, runs.data.labels
    settings = {name: value for name, value in cell.settings["teacher"].items() if name != "rows"}
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(cell.settings["model"], num_labels=len(labels))
    record = runs.fit(model, rows, runs.data.test, preset="ft", seed=0, **settings)
    model.save_pretrained(cell.folder)
    return record | {"rows": len(rows)}


def find_learning_rate(cell: Cell) -> dict[str, Any]:
    """The best of the candidates by preset kd, first seed, on rows used for nothing else."""
    init, seed, rates = (cell.settings[name] for name in ("init", "seed", "learning_rates"))
    runs = Runs(cell)
    scores = {str(rate): runs.student(init, "kd", seed, rate, runs.data.dev)["score"] for rate in rates}
    return {"chosen": float(max(scores, key=lambda rate: scores[rate])), "dev_scores": scores}


def train_student(cell: Cell) -> dict[str, Any]:
    init, preset = cell.settings["init"], cell.settings["preset"]
    rate = cell.inputs[f"{init}-learning-rate"].result["chosen"]
    runs = Runs(cell)
    return runs.student(init, preset, cell.seed, rate, runs.data.test)


def study(plan: dict[str, Any], model: str, data: Path, out: Path) -> Study:
    """A teacher, a learning rate for each initialisation, and a student for each preset, of every task."""
    shared = {"model": model, "data": str(data), **{name: plan[name] for name in SHARED}}
    student = {**shared, **{name: plan[name] for name in STUDENT}}
    arms = {"teacher": Arm(train_teacher, (), shared, seeds=())}
    for init, presets in plan["inits"].items():
        search = {"init": init, "seed": plan["seeds"][0], "learning_rates": plan["learning_rates"]}
        arms[f"{init}-learning-rate"] = Arm(find_learning_rate, ("teacher",), {**student, **search}, seeds=())
        needs = ("teacher", f"{init}-learning-rate")
        for preset in presets:
            arms[f"{init}-{preset}"] = Arm(train_student, needs, {**student, "init": init, "preset": preset})
    return Study(out, arms, plan["seeds"], plan["tasks"], headline=("score",))


def finished(study: Study, plan: dict[str, Any], name: str = "score") -> dict[str, Any]:
    """A number of the finished students: init -> task -> preset -> seed -> number."""
    found: dict[str, Any] = {}
    for init, presets in plan["inits"].items():
        for task in plan["tasks"]:
            for preset in presets:
                if numbers := study.numbers(f"{init}-{preset}", name, task):
                    found.setdefault(init, {}).setdefault(task, {})[preset] = numbers
    return found


def compare(tasks: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """Paired differences first - second: per task over seeds, and pooled over tasks and seeds; t-tests, two-sided.

    `pooled` treats (task, seed) pairs as independent: it speaks of these tasks, not of tasks in general.
    """
    own = {task: paired_test(presets.get(first, {}), presets.get(second, {})) for task, presets in tasks.items()}
    pooled = [
        {(task, seed): score for task, presets in tasks.items() for seed, score in presets.get(preset, {}).items()}
        for preset in (first, second)
    ]
    return {
        "first": first,
        "second": second,
        "tasks": {task: test for task, test in own.items() if test["n"]},
        "pooled": paired_test(*pooled),
    }


def report(study: Study, plan: dict[str, Any]) -> str:
    """Write results.json, table.md and plot.svg from what is finished; returns the table."""
    scores = {
        init: {task: {p: {s: 100 * v for s, v in runs.items()} for p, runs in of.items()} for task, of in tasks.items()}
        for init, tasks in finished(study, plan).items()
    }
    teachers = {task: result[None] for task in plan["tasks"] if (result := study.results("teacher", task))}
    rates = {
        f"{task} {init}": result[None]
        for init in plan["inits"]
        for task in plan["tasks"]
        if (result := study.results(f"{init}-learning-rate", task))
    }
    tests = {init: [compare(tasks, a, b) for a, b in plan["compared"]] for init, tasks in scores.items()}
    record = {"plan": plan, "teachers": teachers, "learning_rates": rates, "scores": scores, "tests": tests}
    write_json(study.out / "results.json", record | {"cpu_seconds": finished(study, plan, "cpu_seconds")})
    text = table(plan, scores, teachers) + "\n\n" + comparisons(plan, tests)
    (study.out / "table.md").write_text(text + "\n")
    plot(scores, study.out / "plot.svg")
    return text


def table(plan: dict[str, Any], scores: dict[str, Any], teachers: dict[str, Any]) -> str:
    """Mean +- sd over seeds of each preset, a column for each task and initialisation."""
    columns = [(init, task) for init in scores for task in scores[init]]
    head = [f"{task} ({plan['tasks'][task]['metric']}), {init}" for init, task in columns]
    rows = [["teacher", *(f"{100 * teachers[task]['score']:.1f}" for _, task in columns)]]
    for preset in PRESETS:
        runs = [list(scores[init][task].get(preset, {}).values()) for init, task in columns]
        rows.append([preset, *(spread_text(values, "{mean} ± {deviation} ({seeds})", 2) for values in runs)])
    return markdown_table(["", *head], rows)


def comparisons(plan: dict[str, Any], tests: dict[str, Any]) -> str:
    """Paired differences and p of each task, and pooled with their 95 % interval."""
    names = list(plan["tasks"])
    rows = []
    for init, comparisons in tests.items():
        for test in comparisons:
            pooled = test["pooled"]
            if "p" in pooled:
                own = [signed(test["tasks"][name]) if name in test["tasks"] else "" for name in names]
                interval = f"[{pooled['low']:+.2f}, {pooled['high']:+.2f}]"
                numbers = [f"{pooled['mean']:+.2f}", interval, f"{pooled['p']:.3f}"]
                above = f"{pooled['above_0']} of {pooled['n']}"
                rows.append([init, f"{test['first']} - {test['second']}", *own, *numbers, above])
    return markdown_table(["init", "difference", *names, "pooled", "95 %", "p", "above 0"], rows)


def signed(difference: dict[str, Any]) -> str:
    """A mean difference, and its p where there is one."""
    p = f" (p {difference['p']:.3f})" if "p" in difference else ""
    return f"{difference['mean']:+.2f}{p}"


def plot(scores: dict[str, Any], path: Path) -> None:
    """Paired differences to kd, a panel for each initialisation: a mark per task, a bar for all (95 %)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rlkd"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, max(len(scores), 1), figsize=(5.5 * max(len(scores), 1), 4), squeeze=False)
    for panel, (init, tasks) in zip(panels[0], scores.items(), strict=False):
        presets = [p for p in PRESETS if p != "kd" and any(p in runs for runs in tasks.values())]
        for line, preset in enumerate(presets):
            test = compare(tasks, preset, "kd")
            if "low" in test["pooled"]:
                panel.plot([test["pooled"]["low"], test["pooled"]["high"]], [line, line], color="0.6", linewidth=5)
            for (name, own), marker in zip(test["tasks"].items(), "o^sDv", strict=False):
                label = name if line == 0 else None
                panel.plot(own["mean"], line, marker, color="black", markersize=5, label=label)
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_yticks(range(len(presets)), presets)
        panel.invert_yaxis()
        panel.set_title(f"init: {init}")
        panel.set_xlabel("points above kd, paired by seed")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(tasks), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the encoder that becomes the teacher: a folder or a hub id")
    parser.add_argument("--config", type=Path, default=HERE / "tkd_presets.yaml", help="sizes and settings")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="cola, trec, sst2 as .jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/tkd_presets"), help="run folder")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = read_plan(options.config, quick=options.quick)
    grid = study(plan, options.model, options.data, options.out)
    run_study(grid, jobs=options.jobs, report=lambda: print(report(grid, plan)))
    print(f"run folder: {options.out} (results.json, table.md, plot.svg, the teachers)")


if __name__ == "__main__":
    run_main(main)
