"""A teacher that is arithmetic, and a run with it in a process of its own that tests can kill."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock  # noqa: F401  what a run imports late: a forked child has it at once
import rich.progress  # noqa: F401

from rlkd.data.examples import PromptedRows, RowRenderer
from rlkd.data.rows import RowStream
from rlkd.labels.manifest import Manifest, manifest_name
from rlkd.labels.options import RunOptions
from rlkd.labels.pseudolabels import label_rows
from rlkd.sampling.engines.protocol import Answer, Decoding
from rlkd.settings.parsing import run_main
from rlkd.templates.template import Template
from tiny import EOS, tiny_tokenizer

WORDS = "abcdefghijklm0123456789"
# Row 3, 10, 17 ...: skipped by one template; row 5, 16, 27 ...: the other one fails on it.
TEMPLATES = (
    Template("some", "{% if n % 7 != 3 %}copy {{ text }}{% endif %}", id="t1"),
    Template("fails", "answer {{ text }} {{ 1 // (n % 11 - 5) }}", id="t2"),
)
SHARD_INPUTS = 8


class StubEngine:
    """Answers depend on prompt and seed only. `journal` notes every prompt answered; `seconds` is spent on a batch."""

    name, exact = "stub", True

    def __init__(self, journal: Path | None = None, seconds: float = 0.0, weights: str = "w"):
        self.journal, self.seconds, self.weights = journal, seconds, weights

    def identity(self) -> dict[str, Any]:
        return {"teacher": "stub", "teacher_weights": self.weights, "dtype": "none"}

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        time.sleep(self.seconds)
        if self.journal:
            with self.journal.open("a") as file:
                file.write("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
        return [[self._one(prompt, seed) for seed in row] for prompt, row in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: list[int], seed: int) -> Answer:
        ids = [3 + (sum(prompt) * 31 + seed + i) % len(WORDS) for i in range(1 + sum(prompt) % 4)] + [EOS]
        return Answer(ids, [-(i + 1) / (7 + sum(prompt)) for i in range(len(ids))], True)

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        return [
            [-((sum(p) * token) % 17) / 16 - 0.01 for token in answer]
            for p, answer in zip(prompts, answers, strict=True)
        ]


def write_rows(path: Path, rows: int = 100) -> Path:
    def text(i: int) -> str:
        return " ".join(WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(1 + i % 9))

    path.write_text("".join(json.dumps({"text": text(i), "n": i}) + "\n" for i in range(rows)))
    return path


def label(source: Path, out: Path, engine: StubEngine | None = None, **options: Any) -> dict[str, Any]:
    """Two samples of two templates for each row; shards of SHARD_INPUTS rows."""
    decoding = options.pop("decoding", Decoding("sample", 8, labels_per_input=2))
    templates = options.pop("templates", TEMPLATES)
    teacher = SimpleNamespace(
        tokenizer=tiny_tokenizer(), max_input_tokens=options.pop("max_input_tokens", 64), append_eos=True
    )
    stream = RowStream(str(source), on_bad_row=options.pop("on_bad_row", "fail"), limit=options.pop("limit", None))
    manifest = Manifest.read(out / manifest_name(options.get("part")))
    earlier = manifest.header["scan"] if manifest.headers else None
    render = RowRenderer(templates, student_column="text", with_choices=decoding is None)
    settings = {"seed": 1, "shard_rows": SHARD_INPUTS * 4, "batch_tokens": 200, "quiet": True} | options
    rows = PromptedRows(stream, render, earlier=earlier)
    return label_rows(
        teacher,  # type: ignore[arg-type]
        rows,
        out=out,
        decoding=decoding,
        options=RunOptions(**settings),
        make_engine=lambda: engine or StubEngine(),
    )


def run(source: str, out: str, journal: str, seconds: float, log: str) -> None:
    """The run of a child process; it ends as the command does."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
    run_main(lambda: label(Path(source), Path(out), StubEngine(Path(journal), seconds)) and None)


def shards(folder: Path) -> dict[str, bytes]:
    """Every shard's name and bytes."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("labels-*.parquet"))}


def entries(folder: Path, name: str = "manifest.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a manifest, read without the code under test."""
    path = folder / name
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
