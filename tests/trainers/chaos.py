"""Kills trainers at every file event of a checkpoint's save and at random moments, resumes, and compares.

python tests/trainers/chaos.py [--events N] [--moments N] [--seed N] [TRAINER ...]      prints one table; default: all
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_tkd import make as make_tkd  # noqa: E402

from rlkd.runs.checkpoints import LOGS  # noqa: E402
from rlkd.runs.files import HELD_OUT  # noqa: E402
from tiny_runs import examples, make, tiny_teacher, weights  # noqa: E402

# Rotation begins at the third save: that is the one they are killed in.
RUNS = {
    "ppo": {"epochs_per_rollout": 1, "kl_target": 0.01, "max_steps": 8, "save_steps": 2},
    "reinforce": {"sync_every": 3, "max_steps": 4, "save_steps": 1},
    "supervised": {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1},
    "tkd": {"preset": "rand", "auto_scale": True, "max_steps": 4, "save_steps": 1},
}
# Three epochs of 12 prompts: from the second one on, the teacher's cache knows them. Trainer, and its settings.
EPOCHS = {
    "reinforce": ("reinforce", {"sync_every": 2, "max_steps": 9, "save_steps": 1}),
    "ppo": (
        "ppo",
        {"kl_target": 0.01, "imitation_coef": 0.3, "per_device_train_batch_size": 4, "max_steps": 36, "save_steps": 4},
    ),
    "gkd": ("gkd", {"on_policy_fraction": 0.5, "per_device_train_batch_size": 4, "max_steps": 9, "save_steps": 1}),
    "opd": (
        "reinforce",
        {"reward_value": "lse", "lam": 0.0, "entropy_coef": 1.0, "kl_coef": 0.0, "baseline": "teacher"}
        | {"rollouts_per_prompt": 1, "per_device_train_batch_size": 4, "max_steps": 9, "save_steps": 1},
    ),
    "divergence": (
        "supervised",
        {"objective": "forward_kl", "per_device_train_batch_size": 4, "max_steps": 9, "save_steps": 1},
    ),
    "tkd": ("tkd", {"preset": "rand", "max_steps": 9, "save_steps": 1}),
}
# Of log lines: clocks, and what the Trainer counts from where a process began.
UNEQUAL = ("time", "seconds", "per_second", "train_", "total_flos")
MODIFYING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def build(kind: str, folder: Path, *callbacks: TrainerCallback, **more: Any) -> Any:
    """A trainer of `kind`; its run takes a second."""
    options = {**RUNS[kind], "save_strategy": "steps", "save_total_limit": 2, **more}
    if kind == "tkd":
        trainer = make_tkd(folder, **options)
    else:
        evaluation = {"eval_strategy": "steps", "eval_steps": 4, "eval_examples": examples(3)}
        trainer = make(kind, folder, n=12, **options, **evaluation)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_epochs(case: str, folder: Path, **teacher: Any) -> Any:
    """A trainer of `EPOCHS`; `teacher` are fields of `Teacher`."""
    kind, options = EPOCHS[case]
    options = {**options, "save_strategy": "steps"}
    if kind == "tkd":
        return make_tkd(folder, **options)
    # Prompts of 4 to 22 tokens: batches of them are padded.
    rows = [replace(e, teacher_inputs=(e.teacher_inputs[0] + " a b c" * (i % 6),)) for i, e in enumerate(examples(12))]
    names = {"label": "student_input", "student_input": "student_input", "id": "id"}
    labels = [{k: getattr(e, v) for k, v in names.items()} | {"teacher_input": e.teacher_inputs[0]} for e in rows]
    evaluation = {"eval_strategy": "steps", "eval_steps": 4 * options["save_steps"], "eval_examples": rows[:5]}
    data = labels if kind == "supervised" else rows
    if kind == "gkd" or "imitation_coef" in options:
        evaluation["labels"] = labels[:7]  # fewer than inputs: their passes end elsewhere
    return make(kind, folder, data=data, teacher=tiny_teacher(**teacher), **options, **evaluation)


def outcome(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, list[dict[str, Any]]]]:
    """Weights and lines of each log, clocks left out, that two runs which are the same run have in common."""
    return weights(trainer.trained), {name: lines(trainer.run_folder / name) for name in (*LOGS, HELD_OUT)}


def lines(log: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{k: v for k, v in row.items() if not any(part in k for part in UNEQUAL)} for row in rows]


def difference(one: Any, other: Any) -> str:
    """The first thing in which two outcomes differ, '' if they are equal."""
    for name, tensor in one[0].items():
        if not torch.equal(tensor, other[0][name]):
            return f"weights {name}"
    for name, rows in one[1].items():
        if rows != other[1][name]:
            return f"{name}: {rows} became {other[1][name]}"
    return ""


class Killer:
    """Counts the events that change files; sends SIGKILL to its own process at one of them."""

    def __init__(self, at: int | None):
        self.at, self.events = at, []

    def install(self) -> None:
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync, "fsync")
        safetensors.torch.serialize_file = self._torn(safetensors.torch.serialize_file, 1)
        torch.save = self._torn(torch.save, 1)

    def event(self, name: str, before: Callable[[], Any] = lambda: None) -> None:
        if self.at == len(self.events):
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        self.events.append(name)

    def _audit(self, name: str, args: tuple[Any, ...]) -> None:
        if name in MODIFYING:
            self.event(f"{name} {Path(os.fsdecode(args[0])).name}")
        elif (
            name == "open"
            and isinstance(args[0], str)
            and (set(args[1] or "") & set("wax+") if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR))
        ):
            self.event(f"open {Path(args[0]).name}")

    def _before(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.event(name)
            return function(*args)

        return call

    def _torn(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        """Two events more: before anything is written, and with half of the file written."""

        def call(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[position])
            self.event(f"write {path.name}")
            result = function(*args, **kwargs)
            self.event(f"half of {path.name}", lambda: os.truncate(path, path.stat().st_size // 2))
            return result

        return call


class Fork(TrainerCallback):
    """At the end of some steps: `action(step, go_on)`; in the fork that it makes with `go_on(folder)` training
    continues there.
    """

    def __init__(self, steps: set[int], action: Callable[[int, Callable[..., int]], None]):
        self.steps, self.action, self.killer = steps, action, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps and self.killer is None:
            self.action(state.global_step, lambda folder, at: self._fork(args, Path(folder), at))

    def _fork(self, args: Any, folder: Path, at: int | None) -> int:
        shutil.copytree(args.output_dir, folder)
        if child := os.fork():
            return child
        args.output_dir = str(folder)
        self.killer = Killer(at)
        self.killer.install()
        return 0

    def on_save(self, args: Any, *_: Any, **__: Any) -> None:
        if self.killer is not None:
            Path(args.output_dir + ".events").write_text(json.dumps(self.killer.events))
            os._exit(0)


def killed_in_a_save(kind: str, root: Path, events: int | None, seed: int) -> dict[str, str]:
    """Run folders of runs killed in the third save, by what they were about to do; `events` of them, or all."""
    step = RUNS[kind]["save_steps"] * 3
    killed: dict[str, str] = {}

    def action(_: int, go_on: Callable[..., int]) -> None:
        dry = go_on(root / "dry", None)
        if not dry:
            return
        os.waitpid(dry, 0)
        names = json.loads((root / "dry.events").read_text())
        chosen = range(len(names))
        if events is not None:
            chosen = sorted(random.Random(seed).sample(chosen, min(events, len(names))))
        for n in chosen:
            child = go_on(root / f"event {n}", n)
            if not child:
                return
            _, status = os.waitpid(child, 0)
            assert status == signal.SIGKILL, (names[n], status)
            killed[str(root / f"event {n}")] = names[n]

    build(kind, root / "mother", Fork({step}, action)).train()
    return killed


def killed_at_moments(kind: str, root: Path, moments: int, seed: int) -> dict[str, str]:
    """Run folders of runs killed from outside, a random time after a random step."""
    draw = random.Random(seed)
    steps = Counter(draw.randrange(1, RUNS[kind]["max_steps"]) for _ in range(moments))
    killed: dict[str, str] = {}
    clock = {"last": time.monotonic()}

    def action(step: int, go_on: Callable[..., int]) -> None:
        for n in range(steps[step]):
            folder = root / f"step {step} {n}"
            child = go_on(folder, None)
            if not child:
                return
            delay = draw.uniform(0, 2 * clock["step"]) if "step" in clock else 0.0
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed[str(folder)] = f"{1000 * delay:.0f} ms after step {step}"

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock["step"] = time.monotonic() - self.begun

    fork = Fork(set(steps), action)
    fork.on_save = lambda *_, **__: None  # type: ignore[method-assign]
    build(kind, root / "steps mother", Clock(), fork).train()
    return killed


def resume(kind: str, folder: str, reference: Any) -> str:
    """Repeat the killed command in a fork: '' if the run then equals the reference, else what differs."""
    report = Path(folder + ".report")
    child = os.fork()
    if not child:
        os.dup2(os.open(folder + ".log", os.O_WRONLY | os.O_CREAT), 2)
        try:
            trainer = build(kind, Path(folder))
            trainer.train(resume_from_checkpoint="auto")
            report.write_text(difference(reference, outcome(trainer)))
        except BaseException as error:
            report.write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(child, 0)
    return report.read_text() if report.exists() else "died"


def trial(kind: str, root: Path, events: int | None, moments: int, seed: int = 0) -> dict[str, Any]:
    """Kill and resume one trainer. Returns counts, seconds, and the failures by kill point."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # all forks share tqdm's lock, and a killed one may hold it
    begun = time.monotonic()
    root.mkdir(parents=True)
    first = build(kind, root / "reference")
    first.train()
    reference = outcome(first)
    result: dict[str, Any] = {"trainer": kind}
    failures = {}
    for name, killed in (
        ("events", killed_in_a_save(kind, root, events, seed)),
        ("moments", killed_at_moments(kind, root, moments, seed)),
    ):
        wrong = {where: problem for folder, where in killed.items() if (problem := resume(kind, folder, reference))}
        result |= {f"{name}_killed": len(killed), f"{name}_resumed": len(killed) - len(wrong)}
        failures |= wrong
    return result | {"seconds": round(time.monotonic() - begun, 1), "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", choices=[*RUNS, []], help="default: all four")
    parser.add_argument("--events", type=int, help="kill points within a save; default: every file event")
    parser.add_argument("--moments", type=int, default=20, help="random moments outside")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("trainer      killed in a save  same run  killed at random  same run  seconds", flush=True)
    failed = False
    for kind in args.trainers or RUNS:
        with tempfile.TemporaryDirectory() as root:
            got = trial(kind, Path(root) / "chaos", args.events, args.moments, args.seed)
        counts = [got[f"{name}_{what}"] for name in ("events", "moments") for what in ("killed", "resumed")]
        print(
            f"{kind:<12} {counts[0]:>16} {counts[1]:>9} {counts[2]:>17} {counts[3]:>9} {got['seconds']:>8}", flush=True
        )
        for where, problem in got["failures"].items():
            failed = True
            print(f"  {where}: {problem[:400]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
