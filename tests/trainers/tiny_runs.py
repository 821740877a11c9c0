"""Small runs: a seven-word language in which random students end their answers at different places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.teacher import Teacher
from rlkd.records import Example
from rlkd.trainers.arguments import GKDArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from rlkd.trainers.gkd import GKDTrainer
from rlkd.trainers.ppo import PPOTrainer
from rlkd.trainers.reinforce import ReinforceTrainer
from rlkd.trainers.supervised import SupervisedTrainer
from tiny import tiny_t5, tiny_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "copy", ":"]
VALID = len(WORDS)
PADDED = VALID + 4
EOS = 1

ARGUMENTS = {
    "ppo": PPOArguments, "reinforce": ReinforceArguments, "gkd": GKDArguments, "supervised": SupervisedArguments,
}  # fmt: skip
TRAINERS = {"ppo": PPOTrainer, "reinforce": ReinforceTrainer, "gkd": GKDTrainer, "supervised": SupervisedTrainer}
TINY = {
    "per_device_train_batch_size": 8,
    "max_new_tokens": 5,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "weak_start": "ignore",
    "rollouts_per_prompt": 2,
}


def student(seed: int = 11, **options: Any) -> Any:
    return tiny_t5(seed=seed, vocab=PADDED, **options)


def tiny_teacher(seed: int = 2, **options: Any) -> Teacher:
    lm = EncoderDecoder(tiny_t5(seed=seed, tied=False, vocab=PADDED), VALID)
    return Teacher(lm, tiny_tokenizer(WORDS), **options)


def examples(n: int = 8) -> list[Example]:
    """Inputs of 1 to 4 words; the teacher sees another template than the student."""
    out = []
    for i in range(n):
        words = " ".join("abc"[i // 3**j % 3] for j in range(1 + i % 4))
        out.append(Example(f"row {i}", words, (f"copy : {words}",), (words,)))
    return out


def labels(n: int = 8) -> list[dict[str, Any]]:
    """Pseudo-label rows: the answer to every input is the input itself."""
    return [
        {"id": e.id, "student_input": e.student_input, "label": e.student_input, "teacher_input": e.teacher_inputs[0]}
        for e in examples(n)
    ]


def make(kind: str, folder: Path, *, model: Any = None, teacher: Any = None, n: int = 8, **options: Any) -> Any:
    """A trainer of `kind`; `options` are its arguments, or `data`, `tokenizer`, `labels`, `eval_examples`,
    `task_metric`, `callbacks`.
    """
    names = ("labels", "eval_examples", "task_metric", "callbacks")
    inputs = {name: options.pop(name) for name in names if name in options}
    data, tokenizer = options.pop("data", None), options.pop("tokenizer", None)
    settings = {**TINY, **options}
    if kind == "gkd":
        settings.pop("weak_start")
    if kind == "supervised":
        for name in ("weak_start", "rollouts_per_prompt"):
            settings.pop(name)
        inputs["train_dataset"] = data or labels(n)
    else:
        inputs["train_examples"] = data or examples(n)
    args = ARGUMENTS[kind](output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings)
    return TRAINERS[kind](
        student() if model is None else model,
        args,
        teacher=teacher or tiny_teacher(),
        tokenizer=tokenizer or tiny_tokenizer(WORDS),
        **inputs,
    )


def weights(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0.0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
