"""What every arm must and must not do: the published methods of docs/method.md, our defaults, and layers."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from published_arms import small_runs
from rlkd.evaluation.task_metrics import exact_match
from rlkd.sampling.decode import decode, greedy
from rlkd.trainers.supervised import SupervisedTrainer
from tiny_runs import WORDS, examples, labels, logged, make, tiny_teacher, weights
from two_arms import after_one_update, arm

RUNS = small_runs()
# One of each kind of trainer; the others take the same path with other numbers.
QUICK = ("SeqKD", "REINFORCE")


def of_every_arm(quick=tuple(RUNS)):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


def gradient(trainer, batches):
    """The gradient of one update, of all its micro-batches."""
    trainer.policy.zero_grad()
    for batch in batches:
        (trainer.compute_loss(trainer.policy, *batch) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])


def micro_batches(trainer, splits):
    """The same eight answers or labels as `splits` micro-batches, as the Trainer hands them to `compute_loss`."""
    trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = splits
    trainer.args.per_device_train_batch_size = 8 // splits
    if isinstance(trainer, SupervisedTrainer):
        rows = trainer.train_dataset
        parts = iter([trainer.collate(rows[i::splits]) for i in range(splits)])
        batches, count = trainer.get_batch_samples(parts, splits, trainer.args.device)
        return [(batch, False, count) for batch in batches]
    batch = trainer.annotate(trainer.sample(0))
    return [({"minibatch": part},) for part in trainer.minibatches(batch, 0)]


@pytest.mark.parametrize("name", RUNS)
def test_a_gradient_is_the_same_however_a_batch_is_split(tmp_path, name):
    trainer = arm(name, tmp_path)
    whole = gradient(trainer, micro_batches(trainer, 1))
    assert float(whole.abs().max()) > 1e-3
    for splits in (2, 4, 8):
        batches = micro_batches(trainer, splits)
        assert len(batches) == splits
        torch.testing.assert_close(gradient(trainer, batches), whole, rtol=0, atol=1e-6)


@pytest.mark.multi
def test_two_processes_take_the_same_update(tmp_path):
    """All arms in one launch: plain descent by a rate of 1, so that weights differ by what gradients differ."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "two_arms.py",
        str(tmp_path / "two"),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name in RUNS:
        before, one = after_one_update(name, tmp_path / "one")
        two = load_file(tmp_path / "two" / f"{name}.safetensors")
        assert any(float((one[key] - before[key]).abs().max()) > 1e-3 for key in one), name
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6, msg=lambda m, at=(name, key): f"{at}: {m}")


# A teacher that reads the prompts of other rows


def prompted_alike(n):
    """Inputs that both models read as they are."""
    return [replace(e, teacher_inputs=(e.student_input,)) for e in examples(n)]


def shuffled(rows):
    return [replace(e, teacher_inputs=rows[(i + 5) % len(rows)].teacher_inputs) for i, e in enumerate(rows)]


def answers_of(teacher, rows):
    """The teacher's greedy answers, as texts."""
    states = teacher.prompt_states([e.teacher_inputs[0] for e in rows])
    decoded = decode(teacher.lm, states, greedy, max_new_tokens=5)
    return teacher.tokenizer.batch_decode(decoded.ids, skip_special_tokens=True)
