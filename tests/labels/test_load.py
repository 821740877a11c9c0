"""A million rows through the pipeline with a stub teacher: flat memory, and no row is labelled again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In a separate process: the resident memory of a test process is not informative.
SCRIPT = """
import json, sys
from pathlib import Path
from common import status
from label_pipeline import StubEngine, label, write_rows
class Counting(StubEngine):
    asked = 0

    def answer(self, prompts, seeds, decoding):
        self.asked += len(prompts)
        return super().answer(prompts, seeds, decoding)

folder = Path(sys.argv[1])
write_rows(folder / "small.jsonl", 200_000)
write_rows(folder / "rows.jsonl", 1_000_000)
label(folder / "small.jsonl", folder / "small", StubEngine())
before = status("VmRSS")
totals = label(folder / "rows.jsonl", folder / "out", StubEngine())
grown = (status("VmRSS") - before) / 2**20
log = folder / "out" / "manifest.jsonl"
log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
engine = Counting()
totals = label(folder / "rows.jsonl", folder / "out", engine)
print(json.dumps([totals["status"]["ok"], grown, engine.asked]))
"""


@pytest.mark.load
def test_a_million_rows(tmp_path):
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert done.returncode == 0, done.stderr
    rows, grown, asked_again = json.loads(done.stdout.splitlines()[-1])
    assert rows == 1_000_000
    assert grown <= 10, f"{grown} MB more after a million rows"
    assert asked_again == 5000, "rows of the one shard whose line the manifest lost"
