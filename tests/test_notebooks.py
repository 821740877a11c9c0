"""The notebooks: stripped, and each running from top to bottom."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users|tmp)/|[A-Z]:\\")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def problems(notebook: dict[str, Any]) -> list[str]:
    """What should have been stripped before the commit."""
    found = []
    if set(notebook["metadata"]) != {"kernelspec"} or notebook["metadata"]["kernelspec"]["name"] != "python3":
        found.append(f"metadata: {notebook['metadata']}")
    for cell in notebook["cells"]:
        if cell["metadata"]:
            found.append(f"{cell['id']}: metadata {cell['metadata']}")
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None):
            found.append(f"{cell['id']}: outputs or execution count")
    if MACHINE.search("\n".join("".join(cell["source"]) for cell in notebook["cells"])):
        found.append("a path of one machine")
    return found


@each
def test_notebooks_are_stripped(path):
    assert not problems(read(path))


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}]},
        {"execution_count": 1},
        {"metadata": {"collapsed": True}},
        {"source": ["open('/" + "home/someone/x')"]},
    ],
)
def test_what_is_not_stripped_is_found(change):
    notebook = read(NOTEBOOKS[0])
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not problems(notebook)
    cell.update(change)
    assert problems(notebook)


@each
def test_notebooks_begin_and_end_with_words(path):
    first, *_, last = read(path)["cells"]
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert re.search(r"minute|seconds", "".join(first["source"])), "say how long it takes"
    assert "".join(last["source"]).startswith("## Next")
    assert path.name in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """A copy of the recipes, so that what the notebooks train is shared among them and left nowhere."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "recipes"


@pytest.mark.slow
@each
def test_notebooks_run(path, recipes):
    """As `jupyter execute` does, in another process: kernels talk over local ports, which tests may not open."""
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--timeout=500", "--startup_timeout=300"]
    done = subprocess.run(
        [*command, str(recipes / "notebooks" / path.name)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
