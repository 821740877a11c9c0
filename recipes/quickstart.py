"""The main job, end to end, on a synthetic task: no downloads, two CPU cores, minutes.

python recipes/quickstart.py [--out runs/quickstart] [--seeds 3] [--quick]

1. writes the task's notes (recipes/quickstart_task.py: many right answers for every input)
2. trains a prompted T5 teacher on it, under several templates
3. per seed: the teacher labels unlabeled notes by sampling, and a small student is warmed up on the labels (SeqKD)
4. from that same start trains on with REINFORCE, with PPO, and with SeqKD for as many CPU seconds as the longer of
the two
5. prints one table of held-out results, also in results.json

Settings were chosen on the validation notes (`--split validation`); the table is of the test notes.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback
from transformers.utils import logging as transformers_logging

import quickstart_task as task
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
    language_model,
    load_model,
    load_pseudolabels,
    load_tokenizer,
)

HELD_OUT = {"validation": 2, "test": 3}
LIMITS = {"max_input_tokens": 96, "max_new_tokens": 24}
WARM_UP, AS_LONG = "SeqKD warm-up", "SeqKD, as long"
ARMS = (WARM_UP, AS_LONG, "REINFORCE", "PPO")
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


class Progress(TrainerCallback):
    """A line every ten seconds: stage, step, rate, time left, and the newest regret or loss."""

    def __init__(self, stage: str):
        self.stage, self.newest = stage, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.shown = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        name = next((name for name in ("regret", "loss") if name in (logs or {})), None)
        if name:
            self.newest = f", {name} {logs[name]:.2f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        if now - self.shown >= 10 or state.global_step == state.max_steps:
            rate = state.global_step / (now - self.started)
            left = (state.max_steps - state.global_step) / rate
            say(
                f"{self.stage}: step {state.global_step}/{state.max_steps}, {rate:.1f}/s, {left:.0f} s "
                f"left{self.newest}"
            )
            self.shown = now


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def held_out_notes(plan: Plan, split: str) -> list[Any]:
    return task.make_examples(plan.held_out, HELD_OUT[split])


def reserved_notes(plan: Plan) -> frozenset[str]:
    """Notes of every held-out split: nothing trains on them."""
    return frozenset(example.student_input for split in HELD_OUT for example in held_out_notes(plan, split))


def train(trainer: Any, stage: str) -> float:
    """Train with progress lines, save the model; returns CPU seconds of the training."""
    trainer.add_callback(Progress(stage))
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    trainer.save_model()
    return seconds


def judge(trainer: Any, seconds: float) -> dict[str, float]:
    """Held-out metrics of the trainer's policy; samples and their token rewards stay in its run folder."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if "eval_" in name}
    return {**metrics, "cpu_seconds": seconds}


def train_teacher(folder: Path, plan: Plan, split: str) -> dict[str, float]:
    """A teacher that follows every template, from gold answers in random order and wording; its own metrics."""
    tokenizer = task.make_tokenizer()
    model = build_model(tokenizer, width=64, seed=0)
    rows = task.teacher_rows(plan.teacher_rows, seed=1, exclude=reserved_notes(plan))
    prompted = [replace(e, student_input=e.teacher_inputs[0]) for e in held_out_notes(plan, split)]
    trainer = SupervisedTrainer(
        model,
        SupervisedArguments(**settings(folder, max_steps=plan.teacher_steps, learning_rate=3e-3)),
        teacher=Teacher(language_model(copy.deepcopy(model), tokenizer), tokenizer),
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_examples=prompted,
        task_metric=task.task_metric,
    )
    seconds = train(trainer, "teacher")
    trainer.teacher.lm.model.load_state_dict(model.state_dict())
    return judge(trainer, seconds)


class Seed:
    """The students of one seed: a warm start, and three ways on from it. Every method runs in a process of its own."""

    def __init__(self, folder: Path, plan: Plan, split: str, seed: int):
        self.folder, self.plan, self.split, self.seed = folder, plan, split, seed
        self.home = folder / f"seed-{seed}"

    def shared(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.disable(logging.INFO)
        path = str(self.folder / "teacher")
        tokenizer = load_tokenizer(path, "teacher")
        teacher = Teacher(language_model(load_model(path, "teacher"), tokenizer), tokenizer)
        return {
            "teacher": teacher,
            "tokenizer": tokenizer,
            "eval_examples": held_out_notes(self.plan, self.split),
            "task_metric": task.task_metric,
        }

    def unlabeled(self) -> list[Any]:
        return task.make_examples(self.plan.notes, 1000 + self.seed, reserved_notes(self.plan))

    def arguments(self, kind: Any, arm: str, **more: Any) -> Any:
        return kind(**settings(self.home / slug(arm), seed=self.seed, **more))

    def warm_up(self) -> dict[str, float]:
        """The teacher's sampled labels, and a new student trained on them."""
        shared = self.shared()
        say(f"seed {self.seed}: the teacher labels {self.plan.notes} notes")
        generate_pseudolabels(
            shared["teacher"],
            self.unlabeled(),
            out=self.home / "labels",
            template_names=["what gets packed"],
            decoding=Decoding("sample", LIMITS["max_new_tokens"]),
            options=RunOptions(seed=self.seed, batch_tokens=16_384, overwrite=True),
        )
        student = build_model(shared["tokenizer"], width=32, seed=self.seed)
        return self.seqkd(student, WARM_UP, shared, max_steps=self.plan.warmup_steps, learning_rate=3e-2)

    def seqkd(self, student: Any, arm: str, shared: dict[str, Any], **more: Any) -> dict[str, float]:
        labels = load_pseudolabels(self.home / "labels")
        arguments = self.arguments(SupervisedArguments, arm, **ADAFACTOR, **more)
        trainer = SupervisedTrainer(student, arguments, train_dataset=labels, **shared)
        return judge(trainer, train(trainer, f"seed {self.seed}, {arm}"))

    def warm_student(self) -> Any:
        return load_model(str(self.home / slug(WARM_UP)), "student")

    def reinforce(self) -> dict[str, float]:
        arguments = self.arguments(
            ReinforceArguments, "REINFORCE", max_steps=self.plan.reinforce_steps, baseline="teacher", **RL
        )
        trainer = ReinforceTrainer(self.warm_student(), arguments, train_examples=self.unlabeled(), **self.shared())
        return judge(trainer, train(trainer, f"seed {self.seed}, REINFORCE"))

    def ppo(self) -> dict[str, float]:
        arguments = self.arguments(PPOArguments, "PPO", max_steps=self.plan.ppo_steps, **RL)
        trainer = PPOTrainer(self.warm_student(), arguments, train_examples=self.unlabeled(), **self.shared())
        return judge(trainer, train(trainer, f"seed {self.seed}, PPO"))

    def seqkd_on(self, seconds: float, warmup_seconds: float) -> dict[str, float]:
        """The warm start trained on as it was, for about `seconds` of CPU."""
        steps = max(1, round(self.plan.warmup_steps * seconds / warmup_seconds))
        return self.seqkd(self.warm_student(), AS_LONG, self.shared(), max_steps=steps, learning_rate=1e-2)


def run_seeds(seeds: list[Seed]) -> dict[str, list[dict[str, float]]]:
    """Every stage of every seed, one process per seed; metrics per arm, in the order of the seeds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(seeds), mp_context=context) as pool:

        def stage(*calls: Any) -> list[dict[str, float]]:
            return [future.result() for future in [pool.submit(*call) for call in calls]]

        warm = stage(*((seed.warm_up,) for seed in seeds))
        both = stage(*((run,) for seed in seeds for run in (seed.reinforce, seed.ppo)))
        reinforce, ppo = both[::2], both[1::2]
        longest = [max(pair[0]["cpu_seconds"], pair[1]["cpu_seconds"]) for pair in zip(reinforce, ppo, strict=True)]
        as_long = stage(
            *((seed.seqkd_on, s, w["cpu_seconds"]) for seed, s, w in zip(seeds, longest, warm, strict=True))
        )
    return {WARM_UP: warm, AS_LONG: as_long, "REINFORCE": reinforce, "PPO": ppo}


def slug(arm: str) -> str:
    return arm.lower().replace(", ", "-").replace(" ", "-")


def print_table(results: dict[str, Any], seeds: list[int], split: str) -> None:
    """Teacher and arms; mean over seeds, and (lowest, highest)."""
    table = Table(title=f"{split} notes: mean and (lowest, highest) of {len(seeds)} seed(s)")
    table.add_column("")
    for title, _, unit in COLUMNS.values():
        table.add_column(f"{title}\n{unit}", justify="right")
    for arm in ("teacher", *ARMS):
        cells = []
        for name, (_, factor, unit) in COLUMNS.items():
            values = [factor * run[name] for run in results[arm] if name in run]
            digits = 2 if unit == "nats" else 1
            spread = f"\n({min(values):.{digits}f}, {max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        table.add_row(arm, *cells)
    Console(width=120).print(table)


def verdict(results: dict[str, Any]) -> dict[str, dict[str, int]]:
    """On how many seeds each RL arm beats SeqKD trained as long, in accuracy and in regret of greedy answers."""
    rival = results[AS_LONG]
    return {
        arm: {
            "accuracy": sum(
                run["accuracy"] > other["accuracy"] for run, other in zip(results[arm], rival, strict=True)
            ),
            "regret": sum(run["regret"] < other["regret"] for run, other in zip(results[arm], rival, strict=True)),
        }
        for arm in ("REINFORCE", "PPO")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--split", choices=HELD_OUT, default="test", help="held-out notes the table is of")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, teaches nothing")
    options = parser.parse_args()
    plan, out, seeds = (QUICK if options.quick else FULL), options.out, list(range(1, options.seeds + 1))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()

    torch.set_num_threads(1)  # models this small gain nothing from more
    say(f"training the teacher, {plan.teacher_steps} steps")
    results = {"teacher": [train_teacher(out / "teacher", plan, options.split)]}
    say(f"teacher: accuracy {results['teacher'][0]['accuracy']:.3f} on the {options.split} notes")
    results |= run_seeds([Seed(out, plan, options.split, seed) for seed in seeds])

    print_table(results, seeds, options.split)
    wins = verdict(results)
    report = {
        "split": options.split,
        "seeds": seeds,
        "plan": asdict(plan),
        "wall_seconds": round(time.monotonic() - started, 1),
        "seeds_won_against_seqkd_as_long": wins,
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(report, indent=2))
    for arm, won in wins.items():
        print(
            f"{arm} beats SeqKD trained as long on {won['accuracy']} of {len(seeds)} seeds in accuracy, "
            f"{won['regret']} in regret"
        )
    print(f"run folder: {out}  (results.json, the teacher, every student and its metrics.jsonl)")
    print(f"PPO student of seed 1: {out / 'seed-1' / 'ppo'}")
    print(f"did RL help, at what cost, where does it fail:  rlkd report {out}")


if __name__ == "__main__":
    main()
