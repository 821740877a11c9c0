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
from published_arms import small_runs
from safetensors.torch import load_file
from two_arms import after_one_update, arm, needs_labels

from rlkd.evaluation.task_metrics import exact_match
from rlkd.sampling.decode import decode, greedy
from rlkd.trainers.supervised import SupervisedTrainer
from tiny_runs import examples, labels, logged, make, tiny_teacher

RUNS = small_runs()
QUICK = ("SeqKD", "REINFORCE")  # the others take the same path with other numbers


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


# A student that is its teacher

# Labels, and rewards whose best answer is not a draw of the teacher's, go on sharpening it.
AT_REST = [name for name in RUNS if name not in ("SeqKD", "ImitKD", "LLMR", "KETCHUP", "ENGINE", "REINFORCE", "PPO")]


@pytest.mark.parametrize("name", AT_REST)
def test_a_student_that_is_the_teacher_has_no_gradient(tmp_path, name):
    """On any answers, sampled or not; test_published.py has the expectation of the others."""
    teacher = tiny_teacher()
    data = [replace(e, teacher_inputs=(e.student_input,)) for e in examples()]
    rows = [{**row, "teacher_input": row["student_input"]} for row in labels()]
    inputs = {"data": rows if RUNS[name][0] == "supervised" else data}
    if needs_labels(name):
        inputs |= {"imitation_coef": 0.0} if name == "MiniLLM" else {"labels": rows}
    trainer = arm(name, tmp_path, model=copy.deepcopy(teacher.lm.model).requires_grad_(), teacher=teacher, **inputs)
    assert float(gradient(trainer, micro_batches(trainer, 1)).abs().max()) < 1e-5  # log p - log pi in float32


# A teacher that answers the inputs of other rows


def answered_by_others(teacher, n):
    """Inputs and labels of which each has the teacher's prompt of another row; and the inputs as they should be, with
    the teacher's greedy answers as references.
    """
    rows = [replace(e, teacher_inputs=(e.student_input,)) for e in examples(n)]
    decoded = decode(teacher.lm, teacher.prompt_states([e.student_input for e in rows]), greedy, max_new_tokens=5)
    texts = teacher.tokenizer.batch_decode(decoded.ids, skip_special_tokens=True)
    others = [(i + 5) % n for i in range(n)]
    data = [replace(e, teacher_inputs=rows[k].teacher_inputs) for e, k in zip(rows, others, strict=True)]
    wrong = [
        {"id": e.id, "student_input": e.student_input, "teacher_input": e.teacher_inputs[0], "label": texts[k]}
        for e, k in zip(data, others, strict=True)
    ]
    return data, wrong, [replace(e, references=(text,)) for e, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_shuffled_teacher_does_not_lower_the_true_regret_and_raises_an_alarm(tmp_path, name):
    """From a student that is the teacher, so that all of the true regret is what training did."""
    teacher = tiny_teacher(seed=9)  # one whose answers depend on the input
    data, wrong, held_out = answered_by_others(teacher, 32)
    kind, settings = RUNS[name]
    inputs = {"data": wrong if kind == "supervised" else data}
    if needs_labels(name):
        inputs["labels"] = wrong
    make(
        kind, tmp_path, model=copy.deepcopy(teacher.lm.model).requires_grad_(), teacher=teacher, **inputs,
        eval_examples=held_out, task_metric=exact_match, eval_strategy="steps", eval_steps=5, eval_on_start=True,
        **{"max_steps": 15, "learning_rate": 2e-3, "per_device_train_batch_size": 16, **settings},
    ).train()  # fmt: skip
    start, *later = [line["eval_regret"] for line in logged(tmp_path) if "eval_regret" in line]
    assert start == pytest.approx(0, abs=1e-5)
    assert min(later) > 1.0
    raised = [json.loads(line)["alarm"] for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert "held_out_worse" in raised
