"""The study on real text: a prompted multi-task T5 teacher, trained here, and a student of a quarter of its size.

python recipes/studies/quora_agnews.py [--config FILE] [--data FOLDER] [--out runs/quora_agnews] [--quick]

1. trains the teacher on Quora paraphrases and AG News topics under all templates of both (prompts/)
2. the teacher labels inputs it was not trained on, by sampling
3. per seed: a student is warmed up on the labels (SeqKD), then goes on from that same start with SeqKD, REINFORCE and
   PPO, equal CPU seconds each, settings chosen on validation rows (first seed)
4. writes the table of test rows, and results.json

A stage that is finished is in the run folder and is skipped at the next start; `--quick` is for a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import PrinterCallback, T5Config, T5ForConditionalGeneration, TrainerCallback
from transformers.utils import logging as transformers_logging

import quora_agnews_task as task
from rlkd import (
    Decoding,
    PPOArguments,
    PPOTrainer,
    ReinforceArguments,
    ReinforceTrainer,
    RunOptions,
    SupervisedArguments,
    SupervisedTrainer,
    Teacher,
    generate_pseudolabels,
    labels_finished,
    language_model,
    load_model,
    load_pseudolabels,
    load_tokenizer,
)

HERE = Path(__file__).resolve().parent
ARMS = {"seqkd": "SeqKD, as long", "reinforce": "REINFORCE", "ppo": "PPO"}
TRAINERS = {"reinforce": (ReinforceArguments, ReinforceTrainer), "ppo": (PPOArguments, PPOTrainer)}
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


class Clock(TrainerCallback):
    """Ends training after `seconds` of CPU time, the learning rate falling linearly to 0 with it; tells each minute."""

    def __init__(self, stage: str, seconds: float, warmup_steps: int):
        self.stage, self.seconds, self.warmup_steps, self.newest = stage, seconds, warmup_steps, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.shown = time.process_time(), time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        left = max(1 - (time.process_time() - self.started) / self.seconds, 0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(left, (state.global_step + 1) / self.warmup_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.newest = ", ".join(f"{k} {logs[k]:.2f}" for k in ("loss", "regret", "length") if k in (logs or {}))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.used = time.process_time() - self.started
        control.should_training_stop = self.used >= self.seconds
        if control.should_training_stop or time.monotonic() - self.shown > 60:
            say(f"{self.stage}: {state.global_step} steps, {self.used:.0f} of {self.seconds:.0f} CPU s, {self.newest}")
            self.shown = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def build_model(tokenizer: Any, width: int, layers: int, seed: int) -> Any:
    """A T5 v1.1-shaped model with random weights, tied embedding and the true vocabulary's 32,128 rows."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Stage:
    """One training of a student: how, for how many CPU seconds, from where, and the split it is judged on."""

    arm: str
    training: dict[str, Any]
    seconds: float
    seed: int
    start: Path | None = None
    split: str = "test"


class Study:
    """The stages, each a function of the plan and the folders of the stages before it."""

    def __init__(self, plan: dict[str, Any], data: Path, out: Path):
        self.plan, self.out = plan, out
        self.tokenizer = load_tokenizer(str(data / "tokenizers" / "t5"), "teacher")
        self.splits = task.load_splits(data, plan["rows"])

    def once(self, folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned, from the folder's done.json if it is there."""
        done = folder / "done.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            result = make(folder)
            done.with_suffix(".tmp").write_text(json.dumps(result, indent=2))
            os.replace(done.with_suffix(".tmp"), done)
        return json.loads(done.read_text())

    def settings(self, folder: Path, **more: Any) -> dict[str, Any]:
        return {
            "output_dir": str(folder),
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 10,
            "max_steps": 1_000_000,
            "lr_scheduler_type": "constant",
            "per_device_eval_batch_size": 100,
            "eval_limit": None,
            **self.plan["limits"],
            **more,
        }

    def examples(self, part: str) -> list[Any]:
        return task.examples(self.splits, part, self.plan["scoring_templates"])

    def judged_by_teacher(self, split: str) -> dict[str, Any]:
        """What every trainer is given to judge its policy on a split."""
        return {
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "eval_examples": self.examples(split),
            "task_metric": task.task_metric,
        }

    # Stages

    @cached_property
    def teacher(self) -> Teacher:
        folder = self.out / "teacher"
        self.once(folder, self.train_teacher)
        lm = language_model(load_model(str(folder), "teacher"), self.tokenizer)
        return Teacher(lm, self.tokenizer, max_input_tokens=self.plan["limits"]["max_input_tokens"])

    def train_teacher(self, folder: Path) -> dict[str, Any]:
        plan = self.plan["teacher"]
        pairs = task.teacher_pairs(self.splits, plan["pairs"], plan["training"]["per_device_train_batch_size"])
        settings = self.settings(folder, train_sampling_strategy="sequential", **plan["training"])
        model = build_model(self.tokenizer, seed=0, **plan["model"])
        trainer = SupervisedTrainer(
            model, SupervisedArguments(**settings), tokenizer=self.tokenizer, train_dataset=pairs
        )
        used = train(trainer, "teacher", plan["seconds"])
        trainer.save_model()
        return {**used, "parameters": model.num_parameters(), "pairs": len(pairs)}

    def judge_teacher(self, folder: Path, split: str) -> dict[str, Any]:
        """The teacher's own answers to its prompts, judged as a student's are."""
        prompted = [replace(example, student_input=example.teacher_inputs[0]) for example in self.examples(split)]
        arguments = SupervisedArguments(**self.settings(folder))
        shared = {**self.judged_by_teacher(split), "eval_examples": prompted}
        return judge(SupervisedTrainer(self.teacher.lm.model, arguments, train_dataset=[], **shared))

    @cached_property
    def labels(self) -> Any:
        """The teacher's sampled answers to the unlabeled inputs."""
        folder = self.out / "labels"
        if not labels_finished(folder):
            say("the teacher labels the unlabeled inputs")
            inputs, limit = self.examples("unlabeled"), self.plan["limits"]["max_new_tokens"]
            generate_pseudolabels(
                self.teacher,
                inputs,
                out=folder,
                template_names=["first"],
                decoding=Decoding("sample", limit, labels_per_input=self.plan["labels_per_input"]),
                options=RunOptions(shard_rows=2500),
            )
        return load_pseudolabels(folder)

    def warm_up(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """The student that all arms of a seed start from, and how it does."""
        folder = self.out / f"seed-{seed}" / "warmup"
        stage = Stage("seqkd", self.plan["warmup"]["training"], self.plan["warmup"]["seconds"], seed)
        return folder, self.once(folder, lambda folder: self.train_student(folder, stage))

    def train_student(self, folder: Path, stage: Stage) -> dict[str, Any]:
        """Train on from `stage.start` (random weights if None), judge on its split."""
        if stage.start is None:
            model = build_model(self.tokenizer, seed=stage.seed, **self.plan["student"])
        else:
            model = load_model(str(stage.start), "student")
        settings = self.settings(folder, seed=stage.seed, **stage.training)
        shared = self.judged_by_teacher(stage.split)
        if stage.arm == "seqkd":
            trainer: Any = SupervisedTrainer(
                model, SupervisedArguments(**settings), train_dataset=self.labels, **shared
            )
        else:
            Arguments, Trainer = TRAINERS[stage.arm]
            trainer = Trainer(model, Arguments(**settings), train_examples=self.examples("unlabeled"), **shared)
        used = train(trainer, f"{folder.parent.name}/{folder.name}", stage.seconds)
        trainer.save_model()
        return {**used, "parameters": model.num_parameters(), **judge(trainer)}

    def choose(self, arm: str) -> Stage:
        """The candidate settings of an arm with the lowest validation regret, tried on the first seed.

        Regret is a sum over tokens, so short answers are cheap: answers must be about as long as the teacher's.
        """
        plan, seed = self.plan["arms"], self.plan["seeds"][0]
        start, _ = self.warm_up(seed)
        length = self.once(self.out / "teacher-validation", lambda f: self.judge_teacher(f, "validation"))[
            "quora_length"
        ]
        trials: list[tuple[bool, float, int, Stage]] = []
        for number, training in enumerate(plan["seqkd" if arm == "seqkd" else "rl"]):
            stage = Stage(arm, training, plan["trial_seconds"], seed, start, "validation")
            folder = self.out / "validation" / f"{arm}-{number}"
            score = self.once(folder, lambda folder, stage=stage: self.train_student(folder, stage))
            say(
                f"{folder.name}: validation regret {score['regret']:.2f}, of samples {score['sample_regret']:.2f}, "
                f"length {score['quora_length']:.1f} (teacher {length:.1f})"
            )
            other_length = not 0.75 <= score["quora_length"] / length <= 1.25
            trials.append((other_length, score["regret"] + score["sample_regret"], number, stage))
        return replace(min(trials)[-1], seconds=plan["seconds"], split="test")

    def run(self) -> dict[str, Any]:
        results = {"teacher": [self.once(self.out / "teacher-test", lambda f: self.judge_teacher(f, "test"))]}
        chosen = {arm: self.choose(arm) for arm in ("seqkd", "reinforce")}
        chosen["ppo"] = replace(chosen["reinforce"], arm="ppo")
        for seed in self.plan["seeds"]:
            start, warm = self.warm_up(seed)
            results.setdefault("SeqKD warm-up", []).append(warm)
            for arm, title in ARMS.items():
                stage = replace(chosen[arm], seed=seed, start=start)
                folder = self.out / f"seed-{seed}" / arm
                result = self.once(folder, lambda folder, stage=stage: self.train_student(folder, stage))
                results.setdefault(title, []).append(result)
                (self.out / "table.md").write_text(table(results) + "\n")
        report = {
            "plan": self.plan,
            "rows": {name: {part: len(rows) for part, rows in parts.items()} for name, parts in self.splits.items()},
            "teacher": self.once(self.out / "teacher", self.train_teacher),
            "chosen": {arm: stage.training for arm, stage in chosen.items()},
            "validation": {f.parent.name: json.loads(f.read_text()) for f in self.out.glob("validation/*/done.json")},
            "results": results,
        }
        (self.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
        return results


def train(trainer: Any, stage: str, seconds: float) -> dict[str, float]:
    """Train for so many CPU seconds; returns what was used."""
    clock = Clock(stage, seconds, max(int(trainer.args.warmup_steps), 1))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return {"steps": trainer.state.global_step, "cpu_seconds": round(clock.used, 1)}


def judge(trainer: Any) -> dict[str, float]:
    """Held-out metrics of the trainer's policy, over both tasks and of each."""
    rows = trainer.evaluate_policy(None)
    metrics = trainer.evaluator.summarise(rows)
    for name in task.TASKS:
        own = trainer.evaluator.summarise([row for row in rows if row["id"].startswith(name)])
        metrics |= {f"{p}{name}_{m}": own[p + m] for p in ("", "sample_") for m in ("regret", "length", "finish_rate")}
        metrics[f"{name}_match"] = own["match"]
    return {name: round(value, 4) for name, value in metrics.items()}


def table(results: dict[str, Any]) -> str:
    """Markdown: mean over seeds and, with more than one, [lowest, highest]."""
    lines = ["| | " + " | ".join(title for title, _, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, runs in results.items():
        cells = []
        for name, (_, factor, digits) in COLUMNS.items():
            values = [factor * run[name] for run in runs]
            spread = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, nested dictionaries key by key."""
    return base | {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in changes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "quora_agnews.yaml", help="sizes and settings")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="quora_para, agnews, tokenizers/t5")
    parser.add_argument("--out", type=Path, default=Path("runs/quora_agnews"), help="run folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan = yaml.safe_load(options.config.read_text())
    quick = plan.pop("quick")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    results = Study(merge(plan, quick) if options.quick else plan, options.data, options.out).run()
    print(table(results))
    print(f"run folder: {options.out} (results.json, table.md, the teacher, every student and its metrics.jsonl)")


if __name__ == "__main__":
    main()
