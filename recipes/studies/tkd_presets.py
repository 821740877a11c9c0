"""The study of encoder students: does the tree pay? The eleven presets, same start, same settings, paired seeds.

python recipes/studies/tkd_presets.py --model FOLDER [--data FOLDER] [--out runs/tkd_presets] [--quick]

1. per task: fine-tunes the model as the teacher
2. per task and initialisation: finds a learning rate with preset kd on training rows kept apart, first seed
3. per seed and preset: trains a student cut from the teacher and scores it once on the test rows, after the last epoch
4. writes table.md, results.json (every run, means, paired tests) and plot.svg from whatever is finished

A run that is finished is in the run folder and is skipped at the next start; `--quick` is for a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from rlkd import TableLayout, TKDArguments, TKDTrainer, build_student, classification_metrics, load_labelled
from rlkd.data.glue import find_labels
from rlkd.data.rows import load_rows
from rlkd.objectives.encoder import PRESETS

HERE = Path(__file__).resolve().parent


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Task:
    """One data set's rows and its teacher, fine-tuned once and kept in the run folder."""

    def __init__(self, name: str, plan: dict[str, Any], model: str, data: Path, out: Path):
        self.name, self.plan, self.model, self.out = name, plan, model, out / name
        settings = plan["tasks"][name]
        self.metric = settings["metric"]
        train_file = str(data / settings["train"])
        self.labels = find_labels(load_rows(train_file)["label"])
        layout = TableLayout(text=settings["text"])
        rows = load_labelled(train_file, layout, labels=self.labels)
        tests = [load_labelled(str(data / file), layout, labels=self.labels) for file in settings["test"]]
        self.test = [row for rows in tests for row in rows]
        self.test = sorted(self.test[: plan["test_rows"]], key=lambda row: len(row["text"]))  # batches of like lengths
        tested = {row["text"] for row in self.test}
        rows = [row for row in rows if row["text"] not in tested]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.dev = [rows[i] for i in order[: plan["dev_rows"]]]
        self.train = [rows[i] for i in order[plan["dev_rows"] :][: plan["teacher"]["rows"]]]
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def subset(self, seed: int) -> list[dict[str, Any]]:
        """The training rows of a seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.train[i] for i in order[: self.plan["train_rows"]]]

    @cached_property
    def teacher(self) -> Any:
        folder = self.out / "teacher"
        if not folder.exists():
            set_seed(0)
            base = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=len(self.labels))
            settings = {k: v for k, v in self.plan["teacher"].items() if k != "rows"}
            trainer = self.trainer(base, self.train, self.test, self.out / "training", preset="ft", seed=0, **settings)
            score, seconds = fit(trainer, self.metric)
            say(f"{self.name}: teacher, {len(self.train)} rows, {self.metric} {100 * score:.1f}, {seconds:.0f} s")
            trainer.save_model(str(self.out / "unfinished"))
            write(self.out / "unfinished" / "score.json", {"score": score, "rows": len(self.train), "seconds": seconds})
            (self.out / "unfinished").rename(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def trainer(self, model: Any, rows: Any, judged: Any, folder: Path, **settings: Any) -> TKDTrainer:
        plan = self.plan
        arguments = TKDArguments(
            output_dir=str(folder),
            max_length=plan["max_length"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be asked for
            **plan["training"] | settings,
        )
        teacher = None if arguments.preset == "ft" else self.teacher
        trainer = TKDTrainer(
            model,
            arguments,
            teacher=teacher,
            tokenizer=self.tokenizer,
            train_rows=rows,
            eval_rows=judged,
            compute_metrics=classification_metrics([self.metric]),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, init: str, preset: str, seed: int, learning_rate: float, *, on_dev: bool = False) -> dict[str, Any]:
        """Train and score one student."""
        # A tree in the teacher's attention cannot be kept; all else of the teacher is computed once for a seed.
        kept = "none" if preset == "ft" or "td_teacher" in PRESETS[preset] else "hidden"
        set_seed(seed)
        trainer = self.trainer(
            build_student(self.teacher, self.plan["layers"], init),
            self.subset(seed),
            self.dev if on_dev else self.test,
            self.out / "training",
            preset=preset,
            seed=seed,
            learning_rate=learning_rate,
            teacher_cache=kept,
            teacher_cache_dir=None if kept == "none" else str(self.out / "kept"),
            **self.plan["student"],
        )
        score, seconds = fit(trainer, self.metric)
        return {"score": score, "cpu_seconds": round(seconds, 1), "learning_rate": learning_rate}


def fit(trainer: TKDTrainer, metric: str) -> tuple[float, float]:
    """Train, then score once; and the CPU seconds of the training."""
    shutil.rmtree(trainer.run_folder, ignore_errors=True)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    score = trainer.evaluate()[f"eval_{metric}"]
    shutil.rmtree(trainer.run_folder, ignore_errors=True)
    return score, seconds


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(unfinished, path)


def once(path: Path, compute: Any) -> dict[str, Any]:
    """The record in `path`, computed if it is not there."""
    if not path.exists():
        write(path, compute())
    return json.loads(path.read_text())


def learning_rate(task: Task, init: str) -> float:
    """The best of the candidates by preset kd, first seed, on rows that nothing else sees."""

    def choose() -> dict[str, Any]:
        plan = task.plan
        tried = {
            str(rate): task.run(init, "kd", plan["seeds"][0], rate, on_dev=True)["score"]
            for rate in plan["learning_rates"]
        }
        return {"chosen": float(max(tried, key=lambda rate: tried[rate])), "dev_scores": tried}

    return once(task.out / init / "learning_rate.json", choose)["chosen"]


def study(plan: dict[str, Any], model: str, data: Path, out: Path) -> None:
    """All runs that are not in `out` yet, a seed of all tasks before the next: an early end leaves whole seeds."""
    tasks = [Task(name, plan, model, data, out) for name in plan["tasks"]]
    for init, presets in plan["inits"].items():
        for seed in plan["seeds"]:
            for task in tasks:
                for preset in presets:
                    path = task.out / init / f"{preset}-{seed}.json"
                    if path.exists():
                        continue
                    rate = learning_rate(task, init)
                    record = once(path, lambda: task.run(init, preset, seed, rate))  # noqa: B023 (called at once)
                    say(f"{task.name} {init} seed {seed} {preset}: {100 * record['score']:.1f} {task.metric}")
                shutil.rmtree(task.out / "kept", ignore_errors=True)
            report(plan, out)


def finished(plan: dict[str, Any], out: Path) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """Scores x 100 of the finished runs: init -> task -> preset -> seed -> score."""
    scores: dict[str, Any] = {}
    for init, presets in plan["inits"].items():
        for task in plan["tasks"]:
            for preset in presets:
                for seed in plan["seeds"]:
                    path = out / task / init / f"{preset}-{seed}.json"
                    if path.exists():
                        score = 100 * json.loads(path.read_text())["score"]
                        scores.setdefault(init, {}).setdefault(task, {}).setdefault(preset, {})[seed] = score
    return scores


def compare(tasks: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """Paired differences first - second: per task over seeds, and pooled over tasks and seeds; t-tests, two-sided.

    `pooled` treats (task, seed) pairs as independent: it speaks of these tasks, not of tasks in general.
    """
    rows: dict[str, list[float]] = {}
    for task, presets in tasks.items():
        shared = sorted(presets.get(first, {}).keys() & presets.get(second, {}).keys())
        if shared:
            rows[task] = [presets[first][seed] - presets[second][seed] for seed in shared]
    everything = [difference for differences in rows.values() for difference in differences]
    return {
        "first": first,
        "second": second,
        "tasks": {task: summary(differences) for task, differences in rows.items()},
        "pooled": summary(everything),
    }


def summary(differences: list[float]) -> dict[str, Any]:
    """Mean, 95 % interval and p of the two-sided one-sample t-test against 0, and how many are above 0."""
    n = len(differences)
    record: dict[str, Any] = {"n": n, "above_0": sum(d > 0 for d in differences)}
    if n:
        record["mean"] = round(statistics.mean(differences), 3)
    if n > 1 and statistics.stdev(differences) > 0:
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        record |= {"low": round(float(low), 3), "high": round(float(high), 3), "p": round(float(test.pvalue), 5)}
    return record


def report(plan: dict[str, Any], out: Path) -> str:
    """Write results.json, table.md and plot.svg from what is finished; returns the table."""
    scores = finished(plan, out)
    teachers = {
        task: json.loads((out / task / "teacher" / "score.json").read_text())
        for task in plan["tasks"]
        if (out / task / "teacher" / "score.json").exists()
    }
    rates = {
        f"{task} {init}": json.loads(path.read_text())
        for init in plan["inits"]
        for task in plan["tasks"]
        if (path := out / task / init / "learning_rate.json").exists()
    }
    tests = {init: [compare(tasks, a, b) for a, b in plan["compared"]] for init, tasks in scores.items()}
    seconds = {
        f"{path.parent.parent.name} {path.parent.name} {path.stem}": json.loads(path.read_text())["cpu_seconds"]
        for path in sorted(out.glob("*/*/*-*.json"))
    }
    record = {"plan": plan, "teachers": teachers, "learning_rates": rates, "scores": scores, "tests": tests}
    write(out / "results.json", record | {"cpu_seconds": seconds})
    text = table(plan, scores, teachers) + "\n\n" + comparisons(plan, tests)
    (out / "table.md").write_text(text + "\n")
    plot(scores, out / "plot.svg")
    return text


def table(plan: dict[str, Any], scores: dict[str, Any], teachers: dict[str, Any]) -> str:
    """Markdown: mean +- sd over seeds of each preset, a column for each task and initialisation."""
    columns = [(init, task) for init in scores for task in plan["tasks"] if task in scores[init]]
    head = [f"{task} ({plan['tasks'][task]['metric']}), {init}" for init, task in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    known = [f"{100 * teachers[task]['score']:.1f}" if task in teachers else "" for _, task in columns]
    lines.append("| teacher | " + " | ".join(known) + " |")
    for preset in PRESETS:
        cells = [spread(list(scores[init][task].get(preset, {}).values())) for init, task in columns]
        lines.append(f"| {preset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd} ({len(values)})"


def comparisons(plan: dict[str, Any], tests: dict[str, Any]) -> str:
    """Markdown: paired differences and p of each task, and pooled with their 95 % interval."""
    names = list(plan["tasks"])
    lines = [
        "| init | difference | " + " | ".join(names) + " | pooled | 95 % | p | above 0 |",
        "|---" * (len(names) + 6) + "|",
    ]
    for init, comparisons in tests.items():
        for test in comparisons:
            own = [signed(test["tasks"][name]) if name in test["tasks"] else "" for name in names]
            pooled = test["pooled"]
            if "p" not in pooled:
                continue
            cells = [
                init,
                f"{test['first']} - {test['second']}",
                *own,
                f"{pooled['mean']:+.2f}",
                f"[{pooled['low']:+.2f}, {pooled['high']:+.2f}]",
                f"{pooled['p']:.3f}",
                f"{pooled['above_0']} of {pooled['n']}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, nested dictionaries key by key."""
    return base | {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in changes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the encoder that becomes the teacher: a folder or a hub id")
    parser.add_argument("--config", type=Path, default=HERE / "tkd_presets.yaml", help="sizes and settings")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="cola, trec, sst2 as .jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/tkd_presets"), help="run folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = yaml.safe_load(options.config.read_text())
    quick = plan.pop("quick")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    plan = merge(plan, quick) if options.quick else plan
    study(plan, options.model, options.data, options.out)
    print(report(plan, options.out))
    print(f"run folder: {options.out} (results.json, table.md, plot.svg, the teachers)")


if __name__ == "__main__":
    main()
