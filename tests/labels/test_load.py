"""A million rows through the pipeline with a stub teacher: flat memory, and the cost of everything but the teacher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In a separate process: the resident memory of a test process is not informative.
SCRIPT = """
import json, sys, time
from pathlib import Path
from common import _status, cpu_seconds
from label_pipeline import StubEngine, label, write_rows
folder = Path(sys.argv[1])
write_rows(folder / "small.jsonl", 200_000)
write_rows(folder / "rows.jsonl", 1_000_000)
label(folder / "small.jsonl", folder / "small", StubEngine())
before = _status("VmRSS")
seconds, totals = cpu_seconds(lambda: label(folder / "rows.jsonl", folder / "out", StubEngine()))
grown = (_status("VmRSS") - before) / 2**20
log = folder / "out" / "manifest.jsonl"
log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
again, _ = cpu_seconds(lambda: label(folder / "rows.jsonl", folder / "out", StubEngine()))
print(json.dumps([totals["status"]["ok"], 1_000_000 / seconds, grown, again]))
"""


@pytest.mark.load
def test_a_million_rows(tmp_path):
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert done.returncode == 0, done.stderr
    rows, speed, grown, again = json.loads(done.stdout.splitlines()[-1])
    assert rows == 1_000_000
    assert grown <= 10, f"{grown} MB more after a million rows"
    assert speed >= 20_000, f"{speed} rows per CPU second"
    assert again < 5, f"{again} s to resume"
