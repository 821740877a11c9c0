"""The study of encoder students: does the tree pay? The eleven presets, same start, same settings, paired seeds.

python recipes/studies/tkd_presets.py --model FOLDER [--data FOLDER] [--out runs/tkd_presets] [--quick]

1. per task: fine-tunes the model as the teacher
2. per task and initialisation: finds a learning rate with preset kd on training rows kept apart, first seed
3. per seed and preset: trains a student cut from the teacher and scores it once on the test rows, after the last epoch
4. writes table.md, results.json (every run, means, paired tests) and plot.svg from whatever is finished

Results that are finished are skipped: after an interruption, repeat the command.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, set_seed

from rlkd import (
    PRESETS,
    Arm,
    Cell,
    Study,
    file_digests,
    markdown_table,
    paired_test,
    read_plan,
    run_main,
    run_study,
    spread_text,
    write_json,
)
from tkd_presets_task import Runs

HERE = Path(__file__).resolve().parent
SHARED = ("test_rows", "dev_rows", "max_length", "training", "teacher")  # keys of the plan that every arm reads
STUDENT = ("layers", "train_rows", "student")


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
    weights = file_digests(Path(model), sorted(path.name for path in Path(model).glob("*") if path.is_file()))
    shared = {"model": model, "weights": weights, "data": str(data), **{name: plan[name] for name in SHARED}}
    student = {**shared, **{name: plan[name] for name in STUDENT}}
    arms = {"teacher": Arm(train_teacher, (), shared, seeds=())}
    for init, presets in plan["inits"].items():
        search = {"init": init, "seed": plan["seeds"][0], "learning_rates": plan["learning_rates"]}
        arms[f"{init}-learning-rate"] = Arm(find_learning_rate, ("teacher",), {**student, **search}, seeds=())
        needs = ("teacher", f"{init}-learning-rate")
        for preset in presets:
            arms[f"{init}-{preset}"] = Arm(train_student, needs, {**student, "init": init, "preset": preset})
    tasks = {
        name: {**task, "files": file_digests(data, [task["train"], *task["test"]])}
        for name, task in plan["tasks"].items()
    }
    return Study(out, arms, plan["seeds"], tasks, headline=("score",))


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
        if any(runs):
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
    parser.add_argument("--out", type=Path, help="run folder; default: runs/tkd_presets[-quick]")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: the number of CPUs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = read_plan(options.config, quick=options.quick)
    out = options.out or Path("runs/tkd_presets-quick" if options.quick else "runs/tkd_presets")
    grid = study(plan, options.model, options.data, out)
    run_study(grid, jobs=options.jobs, report=lambda: print(report(grid, plan)))
    print(f"run folder: {out} (results.json, table.md, plot.svg, the teachers)")


if __name__ == "__main__":
    run_main(main)
