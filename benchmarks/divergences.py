"""The loss head of distillation: divergences and policy gradient in chunks of logits against all logits [N, V].

    python benchmarks/divergences.py --quick

Student and teacher heads, random weights, forward and backward, gradients of the student's weight and hidden states.
Chunks are `Head.loss`, as the trainers call it; full logits are the same formulas under plain autograd. Memory is the
peak above inputs and weights, each variant in a fresh process; time is CPU seconds of one thread, variants taking
turns. Both compute the same numbers; the largest difference is printed, and the run stops if it is not rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from common import arguments, interleave, peak_extra_memory, repetitions, report, show
from rlkd.models.heads import Head
from rlkd.objectives.divergences import DIVERGENCES
from rlkd.objectives.policy import token_statistics
from rlkd.objectives.rewards import expected_advantage

PADDED_VOCAB, VALID_VOCAB = 32_128, 32_100
ROWS, TOKENS = 32, 64
WIDTHS = ((512, 768), (768, 1024))  # student and teacher: T5-small of T5-base, T5-base of T5-large
ENTROPY_WEIGHT = 0.01
POLICY_GRADIENT = "policy_gradient"
TERMS = (*DIVERGENCES, POLICY_GRADIENT)
QUICK = ("forward_kl", "reverse_kl", POLICY_GRADIENT)
LARGEST_DIFFERENCE = 1e-4
# The gradient of |p - pi| jumps where the two are equal, and rounding decides on which side they are.
LARGEST_OF_TERM = {"total_variation": 2e-3}
# (teacher's logits, student's) [n, V] -> the terms of the sum, for divergences that rlkd does not leave to autograd.
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, pi: p.softmax(-1) * (p.log_softmax(-1) - pi.log_softmax(-1)),
    "reverse_kl": lambda p, pi: (log_pi := pi.log_softmax(-1)).exp() * (log_pi - p.log_softmax(-1)),
    "total_variation": lambda p, pi: (p.softmax(-1) - pi.softmax(-1)).div_(2).abs(),
    "best_token": lambda p, pi: -pi.log_softmax(-1).gather(-1, p.argmax(-1, keepdim=True)),
}


@dataclass
class Case:
    """Head inputs of both models for rows of TOKENS tokens, their head weights, and both ways to the loss of a term."""

    term: str
    widths: tuple[int, int]
    rows: int
    seed: int

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        n, (width, teacher_width) = self.rows * TOKENS, self.widths
        self.weight = torch.randn(PADDED_VOCAB, width, generator=random).requires_grad_()
        self.hidden = torch.randn(n, width, generator=random).requires_grad_()
        self.teacher_weight = torch.randn(PADDED_VOCAB, teacher_width, generator=random)
        self.states = torch.randn(n, teacher_width, generator=random)
        self.ids = torch.randint(0, VALID_VOCAB, (n,), generator=random)
        self.advantages, self.teacher_value = torch.randn(2, n, generator=random)
        self.head = Head(self.weight, None, width**-0.5, VALID_VOCAB)
        self.teacher = Head(self.teacher_weight, None, teacher_width**-0.5, VALID_VOCAB)

    def full(self) -> Tensor:
        """Plain PyTorch, all logits at once."""
        self._clear()
        with torch.no_grad():
            teacher = torch.nn.functional.linear(self.states * self.teacher.scale, self.teacher_weight[:VALID_VOCAB])
        logits = torch.nn.functional.linear(self.hidden * self.head.scale, self.weight[:VALID_VOCAB])
        if self.term in PLAIN:
            loss = PLAIN[self.term](teacher, logits).sum(-1).mean()
        elif self.term in DIVERGENCES:
            loss = DIVERGENCES[self.term](logits, teacher).mean()
        else:
            log_probs = logits.log_softmax(-1)
            probs = log_probs.exp()
            logps = log_probs.gather(-1, self.ids[:, None]).squeeze(-1)
            entropy = -(probs * log_probs).sum(-1)
            expected = (probs * teacher).sum(-1) - self.teacher_value
            loss = (-self.advantages * logps - expected - ENTROPY_WEIGHT * entropy).mean()
        loss.backward()
        return loss.detach()

    def chunked(self) -> Tensor:
        """`Head.loss`, with log-probability and entropy beside the term, as the trainers log them."""
        self._clear()
        n = len(self.ids)

        def statistics(logits: Tensor, ids: Tensor, value: Tensor, states: Tensor) -> tuple[Tensor, ...]:
            teacher = self.teacher.logits(states)
            if self.term != POLICY_GRADIENT:
                return *token_statistics(logits, ids), DIVERGENCES[self.term](logits, teacher)
            return *token_statistics(logits, ids), expected_advantage(logits, teacher, value)

        def loss_of(rows: slice, outputs: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, None]:
            logps, entropy, term = outputs
            if self.term != POLICY_GRADIENT:
                return term.sum() / n, None
            advantages = self.advantages[rows.start * TOKENS : rows.stop * TOKENS]
            return (-advantages * logps - term - ENTROPY_WEIGHT * entropy).sum() / n, None

        args = self.ids, self.teacher_value, self.states
        rows, values = [TOKENS] * self.rows, torch.zeros(n)
        loss, _ = self.head.loss(statistics, loss_of, self.hidden, *args, row_tokens=rows, values=values)
        loss.backward()
        return loss.detach()

    def difference(self) -> float:
        """The largest relative difference of the loss and of the gradients between the two ways."""

        def found(way: Callable[[], Tensor]) -> list[Tensor]:
            return [way(), self.hidden.grad, self.weight.grad]  # type: ignore[list-item]

        pairs = zip(found(self.full), found(self.chunked), strict=True)
        return max(((a - b).norm() / a.norm()).item() for a, b in pairs)

    def _clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def measure_memory(way: str, term: str, widths: tuple[int, int], rows: int, seed: int) -> int:
    """Peak extra bytes of one way; to be run in a process of its own."""
    # One row of a narrow head first: loading kernels belongs to the process, not to the variant.
    getattr(Case(term, (8, 8), 1, seed), way)()
    return peak_extra_memory(getattr(Case(term, widths, rows, seed), way))


def measure_time(term: str, widths: tuple[int, int], rows: int, turns: int, seed: int) -> tuple[float, ...]:
    """Median CPU seconds of full logits and of chunks, and how far they differ."""
    case = Case(term, widths, rows, seed)
    difference = case.difference()  # warms up
    seconds = interleave({"full": case.full, "chunked": case.chunked}, turns)
    return seconds["full"], seconds["chunked"], difference


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    time_rows = 1 if args.once else ROWS // 4 if args.quick else ROWS
    turns = repetitions(args, quick=3, full=5)
    # --quick: every term at one width, three at the other, and the memory of those three.
    cases = [
        (term, widths) for widths in WIDTHS for term in TERMS if widths == WIDTHS[0] or term in QUICK or not args.quick
    ]
    cases = [case for case in cases if case[1] == WIDTHS[0] or not args.once]
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["rlkd.models.heads", "rlkd.objectives.divergences"])
    # A fresh process for every job, two at a time; their imports are those of one server.
    with ProcessPoolExecutor(2, processes, max_tasks_per_child=1) as pool:
        timing = {case: pool.submit(measure_time, *case, time_rows, turns, args.seed) for case in cases}
        memory = {
            (way, *case): pool.submit(measure_memory, way, *case, ROWS, args.seed)
            for case in cases
            for way in ("full", "chunked")
            if case[0] in QUICK or not args.quick
        }
    figures: dict[str, float] = {}
    lines, differences, disagree = [], [], []
    for case in cases:
        term, widths = case
        full, chunked, difference = timing[case].result()
        differences.append(difference)
        if difference > LARGEST_OF_TERM.get(term, LARGEST_DIFFERENCE):
            disagree.append(f"{term} at width {widths[0]} by {difference:.1e}")
        name = f"{term}_d{widths[0]}"
        figures[f"speedup_{name}"] = full / chunked
        line = [f"{widths[0]}, {widths[1]}", term, f"{full:.2f}", f"{chunked:.2f}", f"{full / chunked:.2f}"]
        if ("full", *case) in memory:
            high, low = (memory[way, *case].result() for way in ("full", "chunked"))
            figures[f"memory_ratio_{name}"] = high / low
            line += [f"{high / 1e6:,.0f}", f"{low / 1e6:,.0f}", f"{high / low:.1f}"]
        lines.append(line + [""] * (8 - len(line)))
    worst = {
        kind: min(value for name, value in figures.items() if name.startswith(f"{kind}_"))
        for kind in ("memory_ratio", "speedup")
    }
    figures = {**worst, "max_rel_diff": max(differences), **figures}

    show(
        f"Loss head: rows of {TOKENS} tokens, V {PADDED_VOCAB:,} ({VALID_VOCAB:,} valid), float32",
        ["d, teacher's", "term", "full s", "chunks s", "speed-up", "full MB", "chunks MB", "ratio"],
        lines,
        f"CPU seconds of {time_rows} rows, peak extra memory of {ROWS} rows, gradients included on both sides. "
        f"Largest relative difference {figures['max_rel_diff']:.1e}.",
    )
    if disagree:
        raise SystemExit(f"the two ways disagree, so their times cannot be compared: {', '.join(disagree)}")
    report(figures)


if __name__ == "__main__":
    main()
