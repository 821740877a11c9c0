"""One RL step (rollout, teacher scores, student gradient): rlkd against a straightforward loop over padded batches.

    python benchmarks/rl_step.py --quick

t5-small-shaped student, t5-base-shaped teacher, random weights. Answers are predetermined, so that both ways score and
learn from the same tokens; both still draw from the student's distribution at every step. The optimizer is left out: it
is the same on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import exp
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from common import arguments, interleave, layers, repetitions, report, show
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.policy import Policy
from rlkd.models.teacher import Teacher
from rlkd.objectives.advantages import discounted_sum
from rlkd.objectives.policy import reduce_tokens, reinforce_loss, token_logps
from rlkd.objectives.rewards import induced_advantage
from rlkd.sampling.decode import decode, sampler
from rlkd.tensors import pad_rows

PADDED_VOCAB, VALID_VOCAB = 32_128, 32_100
PAD, EOS = 0, 1
ROWS, LONGEST_PROMPT, LONGEST_ANSWER = 8, 128, 64
STUDENT = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
TEACHER = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


def t5(shape: dict[str, int]) -> T5ForConditionalGeneration:
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=PADDED_VOCAB, dropout_rate=0.0, **shape, **special)).eval()


def log_normal_lengths(longest: int, rows: int, spread: float = 0.6) -> list[int]:
    """Evenly spaced quantiles of a log-normal distribution, scaled so that the last one is `longest`."""
    normal = NormalDist(sigma=spread)
    quantiles = [normal.inv_cdf((i + 0.5) / rows) for i in range(rows)]
    return [max(2, round(longest * exp(q - quantiles[-1]))) for q in quantiles]


@dataclass(frozen=True)
class Batch:
    """Prompts and predetermined answers [B, R], end-of-sequence last, padded."""

    prompts: list[list[int]]
    answers: Tensor

    @classmethod
    def draw(cls, seed: int) -> Batch:
        random = torch.Generator().manual_seed(seed)

        def texts(longest: int) -> list[list[int]]:
            lengths = torch.tensor(log_normal_lengths(longest, ROWS))[torch.randperm(ROWS, generator=random)]
            draw = partial(torch.randint, EOS + 1, VALID_VOCAB, generator=random)
            return [[*draw((n - 1,)).tolist(), EOS] for n in lengths.tolist()]

        answers = [torch.tensor(a) for a in texts(LONGEST_ANSWER)]
        return cls(texts(LONGEST_PROMPT), torch.nn.utils.rnn.pad_sequence(answers, True, PAD))


# A: the published loop, as one would write it with transformers alone.


class ForceAnswers(LogitsProcessor):
    def __init__(self, answers: Tensor):
        self.answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self.answers[:, input_ids.shape[1] - 1, None]
        return scores.scatter(1, wanted, 1e9)


def plain_step(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Rollout, rewards [B, R] (returned) and gradients on padded batches; every phase encodes its prompts."""
    prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in batch.prompts], True, PAD)
    prompt_mask = (prompts != PAD).long()
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST_ANSWER,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    with torch.no_grad():
        force = LogitsProcessorList([ForceAnswers(batch.answers)])
        sequences = student.generate(
            input_ids=prompts, attention_mask=prompt_mask, generation_config=settings, logits_processor=force
        )
        decoder_input, answers = sequences[:, :-1], sequences[:, 1:]
        mask = answers != PAD
        logits = teacher(input_ids=prompts, attention_mask=prompt_mask, decoder_input_ids=decoder_input).logits
        log_probs = logits[..., :VALID_VOCAB].log_softmax(-1)
        rewards = (log_probs.gather(-1, answers[..., None]).squeeze(-1) - log_probs.amax(-1)) * mask
        advantages = rewards.flip(1).cumsum(1).flip(1)
    logits = student(input_ids=prompts, attention_mask=prompt_mask, decoder_input_ids=decoder_input).logits
    logps = logits[..., :VALID_VOCAB].log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    loss = -(advantages * logps * mask).sum() / mask.sum()
    loss.backward()
    return rewards


# B: rlkd's pieces.


def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """Texts of the benchmark are their token ids in writing."""
    return {"input_ids": [[int(token) for token in text.split()] for text in texts]}


def rlkd_step(policy: Policy, teacher: Teacher, batch: Batch) -> Tensor:
    """The same rewards and gradients through decode, Teacher.score and Policy.forward."""
    lm = policy.lm
    draw = sampler(list(range(len(batch.prompts))), LONGEST_ANSWER, lm.device)

    def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
        draw(log_probs, rows, step)
        return batch.answers[rows, step]

    with torch.no_grad():
        states = lm.prompt_states(batch.prompts)
    rollout = decode(lm, states, choose, max_new_tokens=LONGEST_ANSWER)
    texts = [(" ".join(map(str, prompt)),) for prompt in batch.prompts]
    rewards = induced_advantage(teacher.score(texts, rollout.ids, rollout.mask))
    advantages = discounted_sum(rewards, rollout.mask, 1.0)
    tokens = float(rollout.mask.sum())

    def loss_of(rows: slice, statistics: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, None]:
        mask = rollout.mask[rows]
        loss = reinforce_loss(statistics[0], advantages[rows], mask.float())
        return reduce_tokens(loss, mask, "token_mean", tokens), None

    total, _ = policy(*pad_rows(batch.prompts, lm.pad_id), rollout.ids, rollout.mask, token_logps, loss=loss_of)
    total.backward()
    return rewards


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    student, teacher_model = t5(layers(args, STUDENT)), t5(layers(args, TEACHER))
    policy = Policy(EncoderDecoder(student, VALID_VOCAB))
    teacher = Teacher(EncoderDecoder(teacher_model, VALID_VOCAB), tokenizer)
    batch = Batch.draw(args.seed)

    def plain() -> Tensor:
        student.zero_grad()
        return plain_step(student, teacher_model, batch)

    def warm() -> Tensor:
        student.zero_grad()
        return rlkd_step(policy, teacher, batch)

    def cold() -> Tensor:
        teacher.cache = type(teacher.cache)(teacher.cache_bytes)
        return warm()

    variants = {"plain": plain, "cold": cold, "warm": warm}
    # The first round, unmeasured in time, counts operations and compares results; cold leaves the cache full for warm.
    results: dict[str, tuple[int, Tensor, Tensor]] = {}
    for name, step in variants.items():
        rewards: list[Tensor] = []
        count = flops(lambda step=step, rewards=rewards: rewards.append(step()))
        results[name] = count, rewards[0], gradient(student)
    seconds = interleave(variants, repetitions(args, quick=3, full=9))

    work, rewards, grads = (dict(zip(results, column, strict=True)) for column in zip(*results.values(), strict=True))
    cosine = torch.nn.functional.cosine_similarity
    figures = {
        "step_speedup_cold": seconds["plain"] / seconds["cold"],
        "step_speedup_warm": seconds["plain"] / seconds["warm"],
        "flops_ratio_cold": work["plain"] / work["cold"],
        "flops_ratio_warm": work["plain"] / work["warm"],
        "reward_max_abs_diff": max((rewards[n] - rewards["plain"]).abs().max().item() for n in ("cold", "warm")),
        "gradient_cosine": min(
            cosine(grads[n].double(), grads["plain"].double(), dim=0).item() for n in ("cold", "warm")
        ),
        "gradient_norm_ratio": (grads["warm"].norm() / grads["plain"].norm()).item(),
    }
    prompts, answers = [len(p) for p in batch.prompts], (batch.answers != PAD).sum(1).tolist()
    show(
        f"RL step: B {ROWS}, prompt lengths {sorted(prompts)}, answer lengths {sorted(answers)}",
        ["variant", "CPU s", "GFLOP", "speed-up", "FLOP ratio"],
        [
            [name, f"{seconds[key]:.2f}", f"{work[key] / 1e9:.0f}"]
            + [f"{of['plain'] / of[key]:.2f}" for of in (seconds, work)]
            for key, name in [
                ("plain", "padded batches, full logits, encoders in every phase"),
                ("cold", "rlkd, teacher's prompt cache empty"),
                ("warm", "rlkd, teacher's prompt cache holds the prompts"),
            ]
        ],
        f"Rewards differ by at most {figures['reward_max_abs_diff']:.1e} nats; "
        f"gradients' cosine {figures['gradient_cosine']:.6f}.",
    )
    if figures["reward_max_abs_diff"] > 1e-3 or figures["gradient_cosine"] < 0.999:
        raise SystemExit("the two ways disagree: their times cannot be compared")
    report(figures)


if __name__ == "__main__":
    main()
