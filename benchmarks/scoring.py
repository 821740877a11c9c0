"""Scoring answers from hidden states, and the loss head in training: chunks of logits against all logits [B, T, V].

    python benchmarks/scoring.py --quick

Memory is the peak above inputs and weights, each variant in a fresh process; time is CPU seconds of one thread,
variants taking turns in one process per width. Both compute the same numbers; the largest difference is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from common import arguments, interleave, peak_extra_memory, repetitions, report, show
from rlkd.models.heads import Head
from rlkd.objectives.policy import token_statistics
from rlkd.objectives.rewards import token_scores

PADDED_VOCAB, VALID_VOCAB = 32_128, 32_100
ROWS, TOKENS = 32, 128
WIDTHS = (1024, 2048)
ENTROPY_WEIGHT = 0.01


class Case:
    """Random head inputs [rows, TOKENS, width], answers and head weights, and both ways to use them."""

    def __init__(self, width: int, rows: int, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(PADDED_VOCAB, width, generator=random)
        self.hidden = torch.randn(rows, TOKENS, width, generator=random)
        self.ids = torch.randint(0, VALID_VOCAB, (rows, TOKENS), generator=random)
        self.advantages = torch.randn(rows, TOKENS, generator=random)
        self.all = torch.ones(rows, TOKENS, dtype=torch.bool)
        self.half = torch.rand(rows, TOKENS, generator=random).argsort(-1) < TOKENS // 2
        self.head = Head(self.weight, None, width**-0.5, VALID_VOCAB)

    def full_logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden * self.head.scale, self.weight[:VALID_VOCAB])

    @torch.no_grad()
    def score_full(self) -> tuple[Tensor, ...]:
        logits = self.full_logits()
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        chosen = logits.gather(-1, self.ids[..., None]).squeeze(-1)
        return chosen, logits.amax(-1), logits.logsumexp(-1), logits.mean(-1), entropy

    @torch.no_grad()
    def score_chunked(self, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        mask = self.all if mask is None else mask
        return self.head.map(token_scores, self.hidden[mask], self.ids[mask])

    @torch.no_grad()
    def score_packed(self) -> tuple[Tensor, ...]:
        """`score_chunked` of tokens that are already packed: what it holds beyond inputs and outputs."""
        return self.head.map(token_scores, self.hidden.flatten(0, 1), self.ids.flatten())

    def train_full(self) -> Tensor:
        self._require_gradients()
        log_probs = self.full_logits().log_softmax(-1)
        logps = log_probs.gather(-1, self.ids[..., None]).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        loss = (-self.advantages * logps - ENTROPY_WEIGHT * entropy).mean()
        loss.backward()
        return loss.detach()

    def train_chunked(self) -> Tensor:
        self._require_gradients()
        tokens = self.ids.numel()

        def loss_of(rows: slice, outputs: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, None]:
            logps, entropy = (output.view(-1, TOKENS) for output in outputs)
            return (-self.advantages[rows] * logps - ENTROPY_WEIGHT * entropy).sum() / tokens, None

        hidden, ids, values = self.hidden.flatten(0, 1), self.ids.flatten(), torch.zeros(tokens)
        row_tokens = [TOKENS] * len(self.ids)
        loss, _ = self.head.loss(token_statistics, loss_of, hidden, ids, row_tokens=row_tokens, values=values)
        loss.backward()
        return loss.detach()

    def _require_gradients(self) -> None:
        for tensor in (self.hidden, self.weight):
            tensor.requires_grad_().grad = None


def measure_memory(variant: str, width: int, rows: int, seed: int) -> int:
    """Peak extra bytes of one variant; to be run in a process of its own."""
    # One short row first: loading kernels and starting the matrix library belongs to the process, not to the variant.
    getattr(Case(8, 1, seed), variant)()
    function: Callable[[], object] = getattr(Case(width, rows, seed), variant)
    return peak_extra_memory(function)


def measure_times(width: int, rows: int, turns: int, seed: int) -> tuple[dict[str, float], float, float]:
    """Median CPU seconds of each variant, and how far the two ways differ (scores, gradients)."""
    case = Case(width, rows, seed)
    chunked, full = case.score_chunked(), case.score_full()
    score_difference = max((a - b.flatten()).abs().max().item() for a, b in zip(chunked, full, strict=True))
    case.train_full()
    gradient = case.weight.grad
    case.train_chunked()
    gradient_difference = ((case.weight.grad - gradient).norm() / gradient.norm()).item()
    variants = {
        "score_full": case.score_full,
        "score_chunked": case.score_chunked,
        "score_half": lambda: case.score_chunked(case.half),
        "train_full": case.train_full,
        "train_chunked": case.train_chunked,
    }
    return interleave(variants, turns), score_difference, gradient_difference


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    all_rows, widths = (8, WIDTHS[:1]) if args.once else (ROWS, WIDTHS)
    time_rows, turns = all_rows // 8 if args.quick else all_rows, repetitions(args, quick=3, full=5)
    jobs = [
        (variant, width, rows)
        for width in widths
        for variant, rows in [
            ("score_full", all_rows),
            ("score_packed", all_rows),
            ("score_packed", all_rows // 2),
            ("train_full", all_rows),
            ("train_chunked", all_rows),
        ]
    ]
    # A fresh process for every job, two at a time.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        timing = {width: pool.submit(measure_times, width, time_rows, turns, args.seed) for width in widths}
        memory = {job: pool.submit(measure_memory, *job, args.seed) for job in jobs}

    figures: dict[str, float] = {}
    lines = []
    for width in widths:
        seconds, score_difference, gradient_difference = timing[width].result()
        full, chunked, halved, train_full, train_chunked = (memory[job].result() for job in jobs if job[1] == width)
        outputs = 5 * 4 * all_rows * TOKENS  # five float32 per token
        figures |= {
            f"scoring_memory_ratio_d{width}": full / chunked,
            f"scoring_speedup_d{width}": seconds["score_full"] / seconds["score_chunked"],
            f"scoring_speedup_half_valid_d{width}": seconds["score_full"] / seconds["score_half"],
            f"scoring_growth_d{width}": (chunked - outputs) / (halved - outputs / 2),
            f"head_memory_ratio_d{width}": train_full / train_chunked,
            f"head_speedup_d{width}": seconds["train_full"] / seconds["train_chunked"],
            f"scoring_peak_mb_d{width}": chunked / 1e6,
            f"head_peak_mb_d{width}": train_chunked / 1e6,
            f"score_max_abs_diff_d{width}": score_difference,
            f"gradient_rel_diff_d{width}": gradient_difference,
        }
        for name, memories, times in [
            ("scoring, full logits", full, seconds["score_full"]),
            ("scoring, chunks", chunked, seconds["score_chunked"]),
            ("scoring, chunks, half the tokens valid", None, seconds["score_half"]),
            (f"scoring, chunks, B {all_rows // 2}", halved, None),
            ("loss head, full logits", train_full, seconds["train_full"]),
            ("loss head, chunks", train_chunked, seconds["train_chunked"]),
        ]:
            lines.append(
                [str(width), name, f"{memories / 1e6:,.0f}" if memories else "", f"{times:.2f}" if times else ""]
            )
    worst = {
        "scoring_memory_ratio": min,
        "scoring_speedup": min,
        "scoring_speedup_half_valid": min,
        "scoring_growth": max,
    }
    worst |= {"head_memory_ratio": min, "head_speedup": min, "scoring_peak_mb": max, "head_peak_mb": max}
    worst |= {"score_max_abs_diff": max, "gradient_rel_diff": max}
    figures = {name: pick(figures[f"{name}_d{width}"] for width in widths) for name, pick in worst.items()} | figures

    show(
        f"Vocabulary head: B {all_rows}, T {TOKENS}, V {PADDED_VOCAB:,} ({VALID_VOCAB:,} valid), float32",
        ["d", "variant", "peak extra MB", f"CPU s (B {time_rows})"],
        lines,
        "Peak extra memory: everything above inputs and weights, the gradients of both included.",
    )
    show("Worst case over d", ["figure", "value"], [[name, f"{figures[name]:.4g}"] for name in worst])
    report(figures)


if __name__ == "__main__":
    main()
