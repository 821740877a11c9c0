"""The published methods that docs/method.md lists, read from there, and each as a small run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

DOCUMENT = Path(__file__).parents[1] / "docs" / "method.md"
KINDS = {"SupervisedTrainer": "supervised", "GKDTrainer": "gkd", "ReinforceTrainer": "reinforce", "PPOTrainer": "ppo"}


def read_table() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (trainer, settings) of each row."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Published methods as settings\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and (trainer := re.fullmatch("`(.*Trainer)`", cells[1])):
            settings = yaml.safe_load("\n".join(re.findall(r"`(\w+: [^`]+)`", cells[2])))
            rows[cells[0].split(" (")[0]] = (trainer[1], settings)
    return rows


def small_runs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (kind, settings) of each row, of the defaults of RL and of layers, for `tiny_runs.make`."""
    runs = {name: (KINDS[trainer], dict(settings)) for name, (trainer, settings) in read_table().items()}
    runs["REINFORCE"], runs["PPO"] = ("reinforce", {}), ("ppo", {})
    runs["layers"] = ("supervised", {"objective": "forward_kl", "hidden_coef": 1.0, "attention_coef": 1.0})
    for kind, settings in runs.values():
        if kind == "ppo":  # one update on each rollout batch
            settings |= {"minibatches_per_rollout": 1, "epochs_per_rollout": 1}
        if kind == "gkd":
            settings |= {"rollouts_per_prompt": 1}
        if kind in ("reinforce", "ppo"):
            settings |= {"weak_start": "ignore"}
    return runs
