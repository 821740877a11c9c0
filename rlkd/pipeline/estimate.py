"""`rlkd distill --dry-run`: what there is to do, how long about, and how much disk; no weights are loaded.

A token costs 2 operations per parameter forward, and 6 when it trains the model (Kaplan et al. 2020, arXiv 2001.08361,
sec. 2.1). This machine's operations a second are measured in a matrix product, of which models reach `EFFICIENCY`. A
step of decoding a batch costs at least `STEP_SECONDS` per layer, whatever its size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..models.spec import default_device

if TYPE_CHECKING:
    from .run import Plan

EFFICIENCY, STEP_SECONDS = 0.3, 3e-4
DECODED_ROWS = 32
SAMPLE = 100  # rows whose prompts are counted
MEASURED_SECONDS, SIZE = 0.3, 1024
BYTES = 4  # of a parameter; Adam keeps two more numbers


def estimate(plan: Plan) -> list[str]:
    """The stages with their size, time and disk, as lines."""
    sizes, counts = plan.pair.sizes(), plan.rows.counts()
    lines = [f"{role}: {sizes[role]:,} parameters" for role in ("teacher", "student")]
    lines.append(", ".join(f"{count} {part} rows" for part, count in counts.items()))
    speed = operations_per_second()
    for stage in plan.stages:
        operations, steps, what, megabytes = _Costs(plan, sizes, counts).of(stage)
        seconds = operations / (speed * EFFICIENCY) + steps
        done = "finished" if plan.record.finished(stage) else f"about {in_words(seconds)}"
        lines.append(f"{stage.name:<20} {what}; {done}, {megabytes:,.0f} MB")
    lines.append(
        "Times are guesses, to tell minutes from days: 2 operations per parameter and token read, 6 per token trained, "
        f"at {EFFICIENCY:.0%} of the {speed / 1e9:,.0f} G operations a second of a matrix product on "
        f"{default_device()}, measured now. The warm-up ends when regret stops falling."
    )
    return lines


def operations_per_second() -> float:
    """Floating-point operations a second of a matrix product on the device that is used, measured for 0.3 s."""
    device = default_device()
    one = torch.ones(SIZE, SIZE, device=device)
    _ = float((one @ one).sum())
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < MEASURED_SECONDS:
        _ = float((one @ one)[0, 0])
        count += 1
    return count * 2 * SIZE**3 / (time.perf_counter() - started)


def in_words(seconds: float) -> str:
    """A rough time."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Costs:
    """What stages cost. tokens: of a prompt of the teacher (all its templates) and an input of the student, means over
    some rows; an answer is taken to be half as long as the longest.
    """

    def __init__(self, plan: Plan, sizes: dict[str, int], counts: dict[str, int]):
        self.plan, self.sizes, self.counts = plan, sizes, counts
        rows = [plan.rows.train[i] for i in range(min(SAMPLE, len(plan.rows.train)))]
        most = plan.args.max_input_tokens

        def mean(tokenizer: Any, texts: Iterator[str]) -> float:
            found = [min(len(tokenizer(text, verbose=False)["input_ids"]), most) for text in texts]
            return sum(found) / len(rows)

        self.prompt = mean(plan.pair.teacher.tokenizer, (text for row in rows for text in row.teacher_inputs))
        self.input = mean(plan.pair.tokenizer, (row.student_input for row in rows))
        self.answer = plan.args.max_new_tokens / 2

    def of(self, stage: Any) -> tuple[float, float, str, float]:
        """(operations, seconds of decoding steps, what is done, MB on disk)."""
        teacher, student = self.sizes["teacher"], self.sizes["student"]
        kind, settings = stage.name.split("/")[0], stage.settings
        read, answer = 2 * teacher * (self.prompt + self.answer), self.answer
        saved = student * BYTES / 1e6
        if kind.startswith("labels"):
            rows = self.counts["train" if kind == "labels" else kind.removeprefix("labels-")]
            templates = len(self.plan.rows.train.template_names)
            ranked = settings["strategy"] == "rank"
            steps = 0.0 if ranked else rows * templates / DECODED_ROWS * self.plan.args.max_new_tokens
            return rows * read, steps * self._step("teacher"), f"{rows * templates} answers of the teacher", rows * 1e-3
        held_out = self.counts["validation"]
        if kind in ("warm-up", "training"):
            updates = settings.get("max_steps") or settings["num_train_epochs"] * max(self.counts["train"] // 16, 1)
            batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
            rows = updates * batch
            what = f"at most {updates} updates on {batch} labels"
            return rows * 6 * student * (self.input + answer), 0.0, what, saved * 7
        if kind == "rl":
            updates = settings["max_steps"]
            batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
            fresh = updates * batch / settings.get("epochs_per_rollout", 1)
            trained = updates * batch * 6 * student * (self.input + answer)
            steps = fresh / batch * self.plan.args.max_new_tokens * self._step("student")
            what = f"{updates} updates on {batch} answers, {held_out} validation rows now and then"
            return trained + fresh * read, steps, what, saved * 7
        if kind == "evaluation":
            rows = self.counts["test"]
            steps = 3 * rows / 64 * self.plan.args.max_new_tokens
            return 2 * rows * read, steps * self._step("teacher"), f"{rows} test rows answered and scored", rows * 2e-3
        return (
            0.0,
            0.0,
            {"data": "rows split and written", "start": "layers cut"}.get(kind, "written"),
            saved * (kind in ("start", "student")),
        )

    def _step(self, role: str) -> float:
        """Least seconds of a step of decoding."""
        config = self.plan.pair.teacher.model.config if role == "teacher" else self.plan.pair.config
        return STEP_SECONDS * (getattr(config, "num_hidden_layers", None) or 12)
