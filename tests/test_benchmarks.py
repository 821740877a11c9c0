"""Every benchmark that README quotes runs, in its smallest form, and ends with its figures as JSON."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [(ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md")]
QUOTED = sorted({name for text in TEXTS for name in re.findall(r"python benchmarks/(\w+)\.py", text)})


def test_readme_quotes_benchmarks_that_exist():
    assert QUOTED
    assert [name for name in QUOTED if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUOTED, pytest.param("scaling", marks=pytest.mark.load)])
def test_a_benchmark_runs_and_reports_its_figures(name):
    small = ["--inputs", "20", "--tokens", "16"] if name == "page" else ["--once"]
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--quick", *small],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures
    # The page's paint time is null without a browser.
    assert all(value is None or math.isfinite(value) for value in figures.values())
