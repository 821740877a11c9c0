"""One update of every arm; run by test_canaries.py under torchrun, where each process has half of the rows."""

import os
import sys
from pathlib import Path

from published_arms import small_runs
from safetensors.torch import save_file

from tiny_runs import labels, make, weights

RUNS = small_runs()


def needs_labels(name):
    """Whether an on-policy arm learns from labels, too."""
    kind, settings = RUNS[name]
    return kind != "supervised" and (settings.get("imitation_coef", 0) > 0 or settings.get("on_policy_fraction", 1) < 1)


def arm(name, folder, **options):
    """A trainer of the arm on eight rows, however many processes share them."""
    kind, settings = RUNS[name]
    rows = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"per_device_train_batch_size": rows, **settings, **options}
    if needs_labels(name) and settings.get("imitation_coef", 1) > 0:
        settings.setdefault("labels", labels(5))
    return make(kind, folder, **settings)


def after_one_update(name, folder):
    """The weights before and after."""
    trainer = arm(
        name, folder, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        alarms="off",
    )  # fmt: skip
    before = weights(trainer.policy)
    trainer.train()
    return before, weights(trainer.policy)


def main() -> None:
    folder = Path(sys.argv[1])
    for name in RUNS:
        _, after = after_one_update(name, folder / name)
        if os.environ["RANK"] == "0":
            save_file(after, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
