"""The whole method in one flat loop, from rlkd's pure functions and without a Trainer: REINFORCE on the reward that a
teacher induces (Hao et al. 2022). Read it to see what `ReinforceTrainer` does; a test holds the two equal step by step.
It has no evaluation, checkpoints, guards, processes or trackers: those are the trainer's.

python recipes/tiny_models.py --to runs/tiny
python recipes/rl_loop.py --teacher runs/tiny/teacher --student runs/tiny/student --data runs/tiny/train.jsonl \
    --input_column note --templates recipes/tiny_templates.yaml --steps 20 --out runs/tiny/rl_loop
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from rlkd import (
    BASELINES,
    DIVERGENCES,
    REWARDS,
    CreditInputs,
    Example,
    Examples,
    HeadOverStates,
    OneOf,
    Policy,
    Reward,
    Teacher,
    TeacherSignal,
    check_settings,
    language_model,
    load_model,
    load_rows,
    load_templates,
    load_tokenizer,
    parse_config,
    reduce_tokens,
    reinforce_loss,
    run_main,
    sample_rollouts,
    token_statistics,
)


@dataclass
class LoopArguments:
    """Settings of the loop; the defaults are those of `ReinforceArguments`."""

    teacher: str = field(metadata={"help": "Folder or hub id of the teacher."})
    student: str = field(metadata={"help": "Folder or hub id of the student, warmed up on the teacher's answers."})
    data: str = field(metadata={"help": "File of unlabeled inputs: .jsonl, .csv, .tsv or .parquet."})
    input_column: str = field(metadata={"help": "Column that the student reads."})
    templates: str = field(metadata={"help": "What the teacher is asked: dataset[:name] or file.yaml[:name]."})
    out: str = field(default="runs/rl_loop", metadata={"help": "Folder for the trained student."})
    steps: int = field(default=100, metadata={"help": "Updates."})
    prompts_per_step: int = field(default=4, metadata={"help": "Prompts of one update."})
    rollouts_per_prompt: int = field(default=4, metadata={"help": "Answers sampled for each of them."})
    max_input_tokens: int = field(default=512, metadata={"help": "Prompts are cut to this many tokens."})
    max_new_tokens: int = field(default=64, metadata={"help": "Answers are cut to this many tokens."})
    reward: Annotated[str, OneOf(REWARDS)] = field(default="max", metadata={"help": "What a token is worth."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.2, metadata={"help": "Credit horizon: 0 the next token only, 1 the whole answer."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty to the initial student."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Constant learning rate of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(default=42, metadata={"help": "Decides prompts and samples."})

    def __post_init__(self) -> None:
        check_settings(self)


def prompts_of(step: int, examples: Sequence[Example], args: LoopArguments) -> list[Example]:
    """The prompts of an update: each pass over the data has its own order."""
    epoch, position = divmod(step, len(examples) // args.prompts_per_step)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed + epoch))
    start = position * args.prompts_per_step
    return [examples[i] for i in order[start : start + args.prompts_per_step].tolist()]


def with_expectations(
    reward: Reward, signal: TeacherSignal, initial: HeadOverStates
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Of a chunk of the student's logits: log pi(a_t|s_t), the entropy, E_{a ~ pi}[r(s_t, a)], KL(pi || reference), [n]
    each.
    """
    kl, teacher = DIVERGENCES["reverse_kl"], signal.distribution

    def statistics(logits, ids, value, *states):
        split = len(teacher.token_args)
        expected = reward.expected(logits, teacher.logits(*states[:split]), value)
        return *token_statistics(logits, ids), expected, kl(logits, initial.logits(*states[split:]))

    return statistics


def reinforce(
    policy: Policy, teacher: Teacher, tokenizer: object, examples: Sequence[Example], args: LoopArguments
) -> Iterator[dict[str, float]]:
    """Train `policy` in place, one update per item: the regret, length, KL and loss of each update."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0)
    reward, baseline = REWARDS[args.reward], BASELINES["leave_one_out"]

    for step in range(args.steps):
        # Sample answers from the policy itself, with the log-probability of every token.
        policy.eval()
        answers = sample_rollouts(
            policy,
            tokenizer,
            prompts_of(step, examples, args),
            rollouts_per_prompt=args.rollouts_per_prompt,
            max_input_tokens=args.max_input_tokens,
            max_new_tokens=args.max_new_tokens,
            seed=(args.seed, "rollout", step),
        )
        mask = answers.answer_mask

        # Score them with the frozen teacher: r(s_t, a_t) = A_V(s_t, a_t), for `max` minus the regret of each token.
        teacher_inputs = [example.teacher_inputs for example in answers.examples]
        signal = teacher.score(teacher_inputs, answers.answer_ids, mask, distribution=True)
        rewards = reward.per_token(signal)

        # Credit: the discounted rewards after each token, less those of the prompt's other answers. The reward of the
        # token itself is left out: its exact gradient is in the loss.
        advantages, _ = baseline.credit(
            CreditInputs(
                reward=rewards,
                mask=mask,
                decay=args.gamma * args.lam,
                rollouts_per_prompt=args.rollouts_per_prompt,
                immediate=rewards,
            )
        )
        reference_logps, initial = reference.score(*answers.policy_inputs)

        # One forward of the student, whose logits exist for a chunk of tokens at a time.
        policy.train()
        statistics = with_expectations(reward, signal, initial)
        token_args = (reward.state_value(signal), *signal.distribution.token_args, *initial.token_args)
        (logps, _, expected, kl), _ = policy(*answers.policy_inputs, statistics, token_args)

        # -credit log pi(a_t|s_t) - E_{a ~ pi}[r(s_t, a)] + c KL(pi || reference), a mean over the batch's tokens.
        loss = reinforce_loss(logps, advantages * mask, mask) - expected + args.kl_coef * kl
        total = reduce_tokens(loss, mask, "token_mean")
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        yield {
            "step": step + 1,
            "regret": float(((signal.max - signal.chosen) * mask).sum(1).mean()),
            "length": float(mask.sum(1).float().mean()),
            "kl": float(((answers.behaviour_logps - reference_logps) * mask).sum() / mask.sum()),
            "loss": float(total.detach()),
        }


def main() -> None:
    (args,) = parse_config((LoopArguments,))
    tokenizer = load_tokenizer(args.student, "student")
    examples = Examples(load_rows(args.data), load_templates(args.templates), student_column=args.input_column)
    teacher = Teacher(language_model(load_model(args.teacher, "teacher"), tokenizer), tokenizer)
    policy = Policy(language_model(load_model(args.student, "student"), tokenizer))
    for numbers in reinforce(policy, teacher, tokenizer, examples, args):
        print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    policy.save(args.out)
    tokenizer.save_pretrained(Path(args.out))
    print(f"student saved in {args.out}")


if __name__ == "__main__":
    run_main(main)
