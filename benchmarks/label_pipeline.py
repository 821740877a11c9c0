"""What the label pipeline costs besides the teacher: rows per CPU second and memory with an engine that answers at
once, and the speed-up of two processes that share one job.

    python benchmarks/label_pipeline.py [--quick]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from common import arguments, cpu_seconds, report, show, status
from rlkd.data.examples import PromptedRows, RowRenderer
from rlkd.data.rows import RowStream
from rlkd.labels.maintenance import merge, part_of
from rlkd.labels.manifest import Manifest, manifest_name
from rlkd.labels.options import RunOptions
from rlkd.labels.pseudolabels import label_rows
from rlkd.sampling.engines.protocol import Answer, Decoding

WORDS = [f"w{i}" for i in range(1000)]
ANSWER = Answer([5, 6, 7, 8, 1], [-0.5, -0.25, -0.125, -0.5, -0.1], True)


class StubEngine:
    """The same answer to everything; `seconds` of work for each prompt stand in for a teacher."""

    name, exact = "stub", True

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def identity(self) -> dict[str, Any]:
        return {"teacher": "stub", "teacher_weights": "none", "dtype": "none"}

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        end = time.process_time() + self.seconds * len(prompts)
        while time.process_time() < end:
            pass
        return [[ANSWER] * decoding.labels_per_input for _ in prompts]

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        return [[-1.0] * len(answer) for answer in answers]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def write_rows(path: Path, rows: int) -> None:
    """Rows of 5 to 20 words, the same every time."""
    with path.open("w") as file:
        for i in range(rows):
            words = " ".join(WORDS[(i * 7 + j * 13) % len(WORDS)] for j in range(5 + i % 16))
            file.write(json.dumps({"text": words, "n": i}) + "\n")


def label(source: Path, out: Path, engine: StubEngine, part: tuple[int, int] | None = None) -> dict[str, Any]:
    """Label every row greedily, as the command does, the teacher reading the raw input."""
    stub = SimpleNamespace(tokenizer=tokenizer(), max_input_tokens=512, append_eos=True)
    manifest = Manifest.read(out / manifest_name(part))
    earlier = manifest.header["scan"] if manifest.headers else None
    rows = PromptedRows(RowStream(str(source)), RowRenderer((), student_column="text"), earlier=earlier)
    options = RunOptions(shard_rows=5000, part=part, quiet=True)
    return label_rows(stub, rows, out=out, decoding=Decoding("greedy", 16), options=options, make_engine=lambda: engine)


def overhead(rows: int = 200_000) -> dict[str, float]:
    """overhead_rows_per_s, with an engine that costs nothing; rss_mb_per_100k_rows, resident memory after all rows less
    that after the first fifth. Reading, checking, tokenizing and writing are included.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, small = Path(folder, "rows.jsonl"), Path(folder, "small.jsonl")
        write_rows(source, rows)
        write_rows(small, rows // 5)
        label(small, Path(folder, "warm"), StubEngine())
        before = status("VmRSS")
        seconds, totals = cpu_seconds(lambda: label(source, Path(folder, "out"), StubEngine()))
        grown = status("VmRSS") - before
    assert totals["status"]["ok"] == rows
    return {"overhead_rows_per_s": rows / seconds, "rss_mb_per_100k_rows": max(grown, 0) / 2**20 / (rows / 100_000)}


def two_processes(rows: int = 40_000, seconds: float = 4e-4, repetitions: int = 3) -> dict[str, float]:
    """two_process_speedup: CPU seconds of one process over those of the slower of two, `--shard 0/2` and `1/2`.

    They take turns, and the merged shards are compared with those of one process. `seconds` of work for each row stand
    in for a teacher.
    """
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        write_rows(source, rows)
        for repetition in range(repetitions):
            for n in times:
                out = Path(folder, f"{repetition}-{n}")
                times[n].append(_run_processes(source, out, n, seconds))
            merge(out, [])
            one = Path(folder, f"{repetition}-1")
            for shard in one.glob("labels-*.parquet"):
                assert pq.read_table(shard).equals(pq.read_table(out / shard.name)), shard.name
    return {"two_process_speedup": median(times[1]) / median(times[2])}


def _run_processes(source: Path, out: Path, n: int, seconds: float) -> float:
    """CPU seconds of the slowest of n processes, without their start."""
    command = [sys.executable, __file__, "--worker", str(source), str(out), str(seconds)]
    workers = [subprocess.Popen([*command, f"{i}/{n}"], stdout=subprocess.PIPE, text=True) for i in range(n)]
    spent = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a worker failed")
    return max(map(float, spent))


def _work(source: str, out: str, seconds: str, part: str) -> None:
    share = part_of(part)
    engine = StubEngine(float(seconds))
    print(cpu_seconds(lambda: label(Path(source), Path(out), engine, share if share[1] > 1 else None))[0])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return _work(*sys.argv[2:])
    quick = arguments(__doc__).parse_args().quick
    figures = overhead(100_000 if quick else 1_000_000) | two_processes(repetitions=1 if quick else 3)
    show("The label pipeline", ["figure", "value"], [[name, f"{value:.4g}"] for name, value in figures.items()])
    report(figures)


if __name__ == "__main__":
    main()
