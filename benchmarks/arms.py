"""What an update of each arm costs: seconds per update over those of sequence-level distillation (SeqKD).

    python benchmarks/arms.py --quick

An update is one optimizer step on ROWS answers of ANSWER tokens, with everything it takes: the evidence of the teacher
and of the reference policy, loss, gradient and AdamW. On-policy arms also sample their answers. They do so as their
settings say: REINFORCE once for every update, four answers to a prompt; PPO and MiniLLM once for two updates, which
share the cost; exact on-policy distillation (OPD) and LLMR once for every update, one answer to a prompt; GKD for every
other update, the others are on labels. MiniLLM has its three devices: teacher-mixed sampling, length normalisation, and
labels beside the answers. KETCHUP costs what LLMR does, and GKD with reverse KL what it does with forward KL. What is
made once for every input is counted as given: the labels, and the teacher's states of the prompts. What those add to
the updates of a first pass over the inputs is measured apart (`first_pass`). Random weights, and a learning rate of 0
so that all updates do the same work; they go through the trainers' own code, without logging, evaluation and
checkpoints.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from overhead import number_tokenizer
from transformers.utils import logging

from common import arguments, interleave, layers, repetitions, report, show
from rl_step import EOS, VALID_VOCAB, t5
from rlkd.models.architectures import language_model
from rlkd.models.teacher import Teacher
from rlkd.records import Example
from rlkd.trainers.arguments import GKDArguments, PPOArguments, ReinforceArguments, SupervisedArguments
from rlkd.trainers.gkd import GKDTrainer
from rlkd.trainers.ppo import PPOTrainer
from rlkd.trainers.reinforce import ReinforceTrainer
from rlkd.trainers.supervised import SupervisedTrainer

ROWS, PROMPT, ANSWER = 32, 64, 32  # as many answers an update as in our recipes
# 15.6M and 37M parameters: a teacher 2.4 times as large, as in the figures published for GKD and MiniLLM (7B -> 3B).
STUDENT = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}
TEACHER = {"d_model": 384, "d_kv": 64, "d_ff": 1536, "num_layers": 6, "num_heads": 6}
# KL(pi || p) over the vocabulary at the student's own prefixes, as recipes/opd_t0_to_t5.yaml has it.
OPD = {
    "rollouts_per_prompt": 1, "reward_value": "lse", "lam": 0.0, "entropy_coef": 1.0, "kl_coef": 0.0,
    "baseline": "teacher",
}  # fmt: skip

# One rollout batch of ROWS answers, seen twice: a share of the sampling like that of PPO's defaults.
TWICE = {"minibatches_per_rollout": 1, "epochs_per_rollout": 2}
# As docs/method.md has them.
MINILLM = {
    "rollouts_per_prompt": 1, "reward_value": "lse", "lam": 1.0, "entropy_coef": 1.0, "entropy_in": "reward",
    "length_normalised": True, "baseline": "teacher", "imitation_coef": 1.0, "teacher_mix": 0.2,
    "importance_weight": "token", "kl_coef": 0.0, **TWICE,
}  # fmt: skip
LLMR = {"rollouts_per_prompt": 1, "lam": 1.0, "one_step": "sampled", "baseline": "none", "kl_coef": 0.0}

SEQKD = "seqkd"
ARMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    SEQKD: (SupervisedTrainer, SupervisedArguments, {}),
    "forward_kl": (SupervisedTrainer, SupervisedArguments, {"objective": "forward_kl"}),
    "opd": (ReinforceTrainer, ReinforceArguments, OPD),
    "reinforce": (ReinforceTrainer, ReinforceArguments, {}),
    "ppo": (PPOTrainer, PPOArguments, TWICE),
    "gkd": (GKDTrainer, GKDArguments, {"objective": "forward_kl", "on_policy_fraction": 0.5}),
    "minillm": (PPOTrainer, PPOArguments, MINILLM),
    "llmr": (ReinforceTrainer, ReinforceArguments, LLMR),
}
ON_POLICY = ("opd", "reinforce")  # a rollout batch for every update


class Arm:
    """A trainer whose updates are taken one by one."""

    def __init__(self, name: str, folder: str, examples: list[Example], labels: list[dict[str, Any]], args: Namespace):
        trainer, settings, options = ARMS[name]
        torch.manual_seed(args.seed)
        student, teacher, tokenizer = t5(layers(args, STUDENT)), t5(layers(args, TEACHER)), number_tokenizer()
        with torch.no_grad():  # hardly an answer ends by itself: rollouts are as long as labels
            student.shared.weight[EOS] = -4 * student.shared.weight.mean(0)
        supervised, mixed = settings is SupervisedArguments, settings is GKDArguments
        arguments = settings(
            output_dir=str(Path(folder) / name), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=ROWS,
            max_input_tokens=PROMPT, max_new_tokens=ANSWER, learning_rate=0.0, save_strategy="no", seed=args.seed,
            **({} if supervised or mixed else {"weak_start": "ignore"}), **options,
        )  # fmt: skip
        given = {"train_dataset": labels} if supervised else {"train_examples": examples}
        if not supervised and arguments.reads_labels:
            given["labels"] = labels
        self.trainer = trainer(
            student,
            arguments,
            teacher=Teacher(language_model(teacher, tokenizer), tokenizer),
            tokenizer=tokenizer,
            **given,
        )
        self.trainer.create_optimizer()
        # One rollout batch's: PPO takes several updates on it. GKD's two: every other one is on labels, by turns here.
        self.turn = 1 if supervised else arguments.updates_per_rollout
        self.prompts = ROWS if supervised else arguments.rows_per_rollout // arguments.rollouts_per_prompt / self.turn
        if mixed:
            self.turn *= 2
            self.trainer.on_policy = lambda index: index % 2 == 0
        self.trainer.current_gradient_accumulation_steps = 1  # set by the loop that this one stands for
        self.batches: Iterator[Any] = self.labelled() if supervised else self.trainer.experience()

    def labelled(self) -> Iterator[Any]:
        """Endless batches of labels."""
        while True:
            yield from self.trainer.get_train_dataloader()

    def encode(self, texts: list[str]) -> None:
        """The teacher's states of prompts, new to its cache."""
        teacher = self.trainer.teacher
        teacher.cache = type(teacher.cache)(teacher.cache_bytes)
        teacher.prompt_states(texts)

    def updates(self) -> None:
        """One turn of optimizer steps, each on ROWS x ANSWER tokens."""
        trainer, policy = self.trainer, self.trainer.policy
        for _ in range(self.turn):
            inputs = next(self.batches)
            mask = inputs["minibatch"].answers.answer_mask if "minibatch" in inputs else inputs["answer_mask"]
            if not 0.97 <= float(mask.sum()) / (ROWS * ANSWER) <= 1.0:
                raise SystemExit(f"{trainer.args.output_dir}: an update on {int(mask.sum())} tokens")
            policy.train()
            trainer.compute_loss(policy, inputs).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1


def texts(count: int, tokens: int, random: torch.Generator) -> list[str]:
    """Token ids in writing."""
    return [
        " ".join(map(str, row)) for row in torch.randint(3, VALID_VOCAB, (count, tokens), generator=random).tolist()
    ]


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    turns_each = repetitions(args, quick=3, full=9)
    random = torch.Generator().manual_seed(args.seed)
    prompts, answers = texts(ROWS, PROMPT, random), texts(ROWS, ANSWER - 1, random)
    examples = [Example(str(i), text, (text,)) for i, text in enumerate(prompts)]
    labels = [
        {"id": str(i), "student_input": prompt, "teacher_input": prompt, "label": answer}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    with TemporaryDirectory() as folder:
        arms = {name: Arm(name, folder, examples, labels, args) for name in ARMS}
        for arm in arms.values():
            arm.encode(prompts)
            if not args.once:
                arm.updates()  # warms up, and makes AdamW's state
        turns = {name: arm.updates for name, arm in arms.items()}
        encoder = arms[SEQKD]  # whose teacher is not asked otherwise
        seconds = interleave({**turns, "prompts": lambda: encoder.encode(prompts)}, turns_each)

    per_prompt = seconds.pop("prompts") / ROWS
    seconds = {name: value / arms[name].turn for name, value in seconds.items()}
    over = {name: value / seconds[SEQKD] for name, value in seconds.items()}
    first = {
        name: over[name] + (arm.prompts * per_prompt / seconds[SEQKD] if name != SEQKD else 0.0)
        for name, arm in arms.items()
    }
    figures = {
        "on_policy_over_seqkd": max(over[name] for name in ON_POLICY),
        "on_policy_over_seqkd_first_pass": max(first[name] for name in ON_POLICY),
        **{f"{name}_over_seqkd": value for name, value in over.items() if name != SEQKD},
        **{f"{name}_over_seqkd_first_pass": value for name, value in first.items() if name != SEQKD},
        "seqkd_cpu_seconds": seconds[SEQKD],
    }
    show(
        f"An update: {ROWS} answers of {ANSWER} tokens, prompts of {PROMPT}, rollouts included",
        ["arm", "CPU s", "over SeqKD", "in a first pass over the inputs"],
        [[name, f"{value:.3f}", f"{over[name]:.2f}", f"{first[name]:.2f}"] for name, value in seconds.items()],
        f"Medians of {turns_each} turns, CPU seconds of one thread.",
    )
    report(figures)


if __name__ == "__main__":
    main()
