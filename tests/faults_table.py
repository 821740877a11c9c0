"""The table of faults in docs/reliability.md, run again: how many cases of each fault were tried, and how many held.

python tests/faults_table.py [--only TEXT] [--write]

Runs every test that the table names (nothing that needs a GPU or a network), prints fault, cases, held; --write
puts the numbers into the table's last column.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
PROOF = re.compile(r"`(tests/[\w/]+\.py::test_\w+)`")


def rows(page: str) -> list[str]:
    """The lines of the table, without its header."""
    return [line for line in page.split("| fault |")[1].splitlines() if line.startswith("| ")][1:]


def run(proofs: list[str]) -> tuple[Counter[str], Counter[str]]:
    """Cases tried, and held, of each test: parametrised cases count one by one, skipped ones not at all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marks = "not gpu and not net"
        command = [sys.executable, "-m", "pytest", *proofs, "-m", marks, "--junitxml", str(report), "-o", "addopts="]
        options = ["-q", "-n", "2", "--dist", "loadfile", "--timeout", "600", "--disable-socket", "--allow-unix-socket"]
        # A test may run this: what pytest tells its own processes is not for others.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RLKD_MESSAGES"))
        }
        subprocess.run([*command, *options], cwd=ROOT, env=environment, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        tried: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for case in cases:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').split('[')[0]}"
            if case.find("skipped") is None:
                tried[name] += 1
                held[name] += case.find("failure") is None and case.find("error") is None
    return tried, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults that contain this text")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    wanted = [row for row in rows(page) if options.only in row.split("|")[1]]
    tried, held = run(sorted({proof for row in wanted for proof in PROOF.findall(row)}))
    failed = 0
    for row in wanted:
        proofs = PROOF.findall(row)
        cases, good = sum(tried[proof] for proof in proofs), sum(held[proof] for proof in proofs)
        failed += cases - good
        print(f"{good:4d} of {cases:4d}  {row.split('|')[1].strip()}")
        cells = row.strip("| ").split(" | ")
        page = page.replace(row, "| " + " | ".join([*cells[:3], f"{good} of {cases}" if cases else "not run"]) + " |")
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
