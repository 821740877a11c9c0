"""Reward views in a terminal, coloured by rich."""

from __future__ import annotations

from typing import Any

from ..evaluation.samples import Sample
from .markup import sums, visible
from .reward_view import RewardView
from .scale import legend, step

# Steps of the scale as ANSI-256 backgrounds, with a readable text colour.
STYLES = {
    **{f"n{k}": f"{ink} on color({colour})" for k, (ink, colour) in enumerate(
        [("black", 230), ("black", 223), ("black", 222), ("black", 215), ("black", 208), ("black", 202)], 1)},
    **{f"p{k}": f"{ink} on color({colour})" for k, (ink, colour) in enumerate(
        [("black", 195), ("black", 153), ("black", 117), ("black", 75), ("black", 39), ("black", 33)], 1)},
    "z": "default",
    "u": "underline",
}  # fmt: skip


def show(view: RewardView, console: Any = None) -> None:
    """Print every case: the input, then each answer with its coloured tokens and sums."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    scale = Text("nats  ")
    for name, numbers in legend(above_zero=view.above_zero):
        scale.append(f" {numbers} ", STYLES[name])
        scale.append(" ")
    console.print(Text(f"{view.title}, V = {view.value}", style="bold"), scale, sep="\n")
    for case in view.cases():
        console.print()
        console.rule(Text(visible(case.id)), align="left")
        console.print(Text(visible(case.input)))
        for sample in case.samples:
            console.print(_heading(sample), _tokens(sample), sep="\n")


def _heading(sample: Sample) -> Any:
    from rich.text import Text

    line = Text("\n")
    line.append(visible(sample.source), "bold")
    line.append(f"  {visible(sample.template)}" if sample.template else "", "italic")
    line.append("  " + ", ".join(f"{visible(name)} {value}" for name, value in sums(sample)), "dim")
    return line


def _tokens(sample: Sample) -> Any:
    from rich.text import Text

    line = Text() if sample.tokens else Text(visible(sample.text) or "(no tokens)", "italic")
    for reward, piece in zip(sample.rewards or [None] * len(sample), sample.tokens, strict=True):
        line.append(visible(piece) or "·", STYLES[step(reward)])
    return line
