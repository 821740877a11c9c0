"""What the benchmarks share: interleaved timing, peak memory, the table and the JSON line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# All times are CPU seconds of one thread, in this process and in those it starts.
torch.set_num_threads(1)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repetitions, within 3 minutes on 2 cores")
    parser.add_argument("--once", action="store_true", help="one repetition: shows that it runs, measures nothing")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def repetitions(args: argparse.Namespace, *, quick: int, full: int) -> int:
    """How often a measurement is repeated under the options of `arguments`."""
    return 1 if args.once else quick if args.quick else full


def layers(args: argparse.Namespace, shape: Mapping[str, int]) -> dict[str, int]:
    """The shape of a model: with a single layer under --once."""
    return {**shape, "num_layers": 1} if args.once else dict(shape)


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call (user and system, so page faults count) and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def interleave(variants: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each variant. They take turns, so that a slow minute of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, function in variants.items():
            seconds[name].append(cpu_seconds(function)[0])
    return {name: median(values) for name, values in seconds.items()}


def peak_extra_memory(function: Callable[[], Any]) -> int:
    """Bytes by which resident memory peaked above its level before the call, for a process that does nothing else.

    The kernel's high-water mark misses nothing between two samples and sees what an allocator keeps for itself, which a
    profiler's list of tensors would not. It is reset first, or the process's own start would hide behind it (Linux).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS, resident; VmHWM, at their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def show(title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
    """Print one table."""
    table = Table(*columns, title=title, caption=note or None, title_justify="left", caption_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def report(figures: Mapping[str, float]) -> None:
    """The last line of output: every figure by its name, as JSON."""
    print(json.dumps({name: float(f"{value:.5g}") for name, value in figures.items()}))
