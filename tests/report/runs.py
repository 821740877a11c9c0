"""Run folders as trainers leave them, with numbers that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}<b>\u202e"


def lines(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def held_out(step: int, scores: Sequence[float], regrets: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    """Rows of one evaluation: task score `accuracy` and regret of each."""
    return [
        {
            "step": step, "id": f"row {i}", "input": "word " * (1 + i % 9), "teacher": "a b", "student": "a c",
            "tokens": ["a", " c"], "rewards": [-0.25 * regret, -0.75 * regret], "regret": regret, "length": 2,
            "finish_rate": float(i % 4 > 0), "match": float(regret == 0), "accuracy": score, "sample_accuracy": score,
            "sample_regret": regret, **more,
        }
        for i, (score, regret) in enumerate(zip(scores, regrets, strict=True))
    ]  # fmt: skip


def write_run(
    folder: Path, kind: str, rows: list[dict[str, Any]], *, steps: int = 100, cpu: float = 50.0, **record: Any
) -> Path:
    """A run of `kind` (PPOTrainer, ...) with these held-out rows, 10 log lines, and one line per evaluation."""
    trained = [
        {"step": s, "time": 0.0, "loss": 1 / s, "entropy": 0.5, "tokens": 40.0, "tokens_per_second": 9.0}
        for s in range(steps // 10, steps + 1, steps // 10)
    ]
    if kind in ("PPOTrainer", "ReinforceTrainer"):
        for line in trained:
            line |= {"regret": 3 - line["step"] / steps, "kl": 0.01, "length": 2.0, "finish_rate": 1.0}
            line |= {"clip_fraction": 0.1, "explained_variance": 0.6} if kind == "PPOTrainer" else {}
    evaluated = []
    for step in sorted({row["step"] for row in rows}):
        own = [row for row in rows if row["step"] == step]
        names = ("accuracy", "regret", "length", "finish_rate", "match", "sample_accuracy", "sample_regret")
        evaluated.append({"step": step} | {f"eval_{n}": float(np.mean([row[n] for row in own])) for n in names})
    end = {"step": steps, "train_runtime": 60.0, "train_cpu_seconds": cpu, "tokens": 5}
    lines(folder / "metrics.jsonl", [*trained, *evaluated, end])
    lines(folder / "held_out.jsonl", rows)
    settings = {"learning_rate": 1e-3, "lam": 0.2} | record.pop("settings", {})
    (folder / "run.json").write_text(json.dumps({"trainer": kind, "settings": settings, "rlkd": "0"} | record))
    return folder


def arms(folder: Path, *, shift: float, seeds: int = 2, n: int = 60) -> Path:
    """SeqKD and PPO on the same rows: PPO's regret is lower by `shift` (with noise), its accuracy higher."""
    for seed in range(1, seeds + 1):
        random = np.random.default_rng(seed)
        regret = random.gamma(2.0, 1.0, n) + 2
        noise = random.normal(0, 0.3, n)
        draws = random.random(n)
        for arm, kind, gain in (("seqkd", "SupervisedTrainer", 0.0), ("ppo", "PPOTrainer", shift)):
            rows = held_out(100, (draws < 0.5 + gain / 4).astype(float), regret - gain + (noise if gain else 0.0))
            write_run(folder / f"seed-{seed}" / arm, kind, rows, settings={"lam": 0.2 if arm == "ppo" else None})
    return folder
