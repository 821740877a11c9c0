"""Architecture rules: imports point down, files stay small, docstrings tell shapes, no machine leaks in."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlkd"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Every package and module of rlkd, from the bottom up: each imports from the layers below its own only.
LAYERS = (
    {"choices", "errors", "records", "sharding", "tensors"},
    {"checks", "io"},
    {"metrics", "objectives", "settings", "templates"},
    {"data", "models", "runs"},
    {"sampling"},
    {"evaluation", "labels"},
    {"inspection", "trainers"},
    {"jobs", "report"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8  # outside the command line, where every option is a parameter
SKIPPED_DIRECTORIES = {".git", "build", "dist", "wandb", "node_modules", "venv", "__pycache__"}
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:" + "|".join(["work", "root"]) + ")/")


def show(problems: list[str]) -> None:
    """Fail with one offending place per line."""
    if problems:
        pytest.fail("\n".join(["", *problems]), pytrace=False)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported name as an absolute dotted path, wherever in the file it is imported."""
    folders = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def package(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def own_imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """The packages and modules of rlkd that a module imports from."""
    for node, name in imports(path):
        parts = name.split(".")
        if parts[0] == "rlkd" and not name.startswith("rlkd.__"):
            yield node, parts[1] if len(parts) > 1 else ""


def import_allowed(here: str, there: str) -> bool:
    return here == there or LAYER[there] < LAYER[here]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(parse(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the docstring: a command's signature declares its options, and may be long."""
    lines = (function.end_lineno or 0) - function.body[0].lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def test_every_package_has_a_layer():
    found = {package(path) for path in MODULES} - {"__init__"}
    show([f"rlkd/{name}: give it a layer in LAYERS" for name in sorted(found - LAYER.keys())])
    show([f"LAYERS names {name}, which rlkd does not have" for name in sorted(LAYER.keys() - found)])


def test_imports_point_down():
    problems = []
    for path in MODULES:
        here = package(path)
        for node, there in own_imports(path):
            if there not in LAYER:
                problems.append(
                    f"{place(path, node)}: name the module inside rlkd, not the package ({there or 'rlkd'})"
                )
            elif here in LAYER and not import_allowed(here, there):
                problems.append(
                    f"{place(path, node)}: {here} (layer {LAYER[here]}) imports {there} (layer {LAYER[there]})"
                )
    show(problems)


def test_layers_are_as_low_as_they_can_be():
    """A package one layer above the highest it imports: the list states what is, not what was once planned."""
    lowest = dict.fromkeys(LAYER, 0)
    for _ in LAYERS:
        for path in MODULES:
            for _, there in own_imports(path):
                here = package(path)
                if here in LAYER and there in LAYER and here != there:
                    lowest[here] = max(lowest[here], lowest[there] + 1)
    show([f"{name} is in layer {LAYER[name]}: {low} is enough" for name, low in lowest.items() if low != LAYER[name]])


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    folder = tmp_path / "rlkd" / "data"
    folder.mkdir(parents=True)
    lines = ["import rlkd.cli, torch", "from rlkd import models, __version__", "from ..trainers.ppo import X"]
    lines += ["from .. import errors", "from . import a", "def f():", "    from rlkd.report import Y"]
    (folder / "b.py").write_text("\n".join(lines))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [there for _, there in own_imports(folder / "b.py")]
    assert sorted(found) == ["cli", "data", "errors", "models", "report", "trainers"]


def test_objectives_are_pure_torch():
    banned = {"transformers", "trl", "peft", "accelerate", "datasets", "logging", "wandb"}
    show(
        [
            f"{place(path, node)}: objectives import {name}"
            for path in MODULES
            if package(path) == "objectives"
            for node, name in imports(path)
            if name.split(".")[0] in banned
        ]
    )


def test_trl_is_imported_in_one_module():
    show(
        [
            f"{place(path, node)}: import {name} in rlkd/settings/trl_compat.py instead"
            for path in [*MODULES, *sorted((ROOT / "recipes").rglob("*.py"))]
            if path.name != "trl_compat.py"
            for node, name in imports(path)
            if name.split(".")[0] == "trl"
        ]
    )


def recipe_code() -> Iterator[tuple[Path, ast.Module]]:
    """Every recipe, every code cell of the notebooks, and the Python blocks of README and the documents."""
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        yield path, parse(path)
    for path in sorted((ROOT / "recipes").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))]
                yield path, ast.parse("\n".join(lines))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            yield path, ast.parse(block)


def test_recipes_use_public_names():
    """`from rlkd import NAME` with a public name, and nothing else of rlkd."""
    import rlkd

    problems = []
    for path, tree in recipe_code():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names if alias.name.split(".")[0] == "rlkd"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlkd" and not node.level:
                public = node.module == "rlkd"
                named = [a.name for a in node.names if not public or a.name not in rlkd.__all__]
            else:
                continue
            problems += [f"{place(path, node)}: {name} is not public: import it from rlkd" for name in named]
    show(problems)


def test_files_and_functions_are_short():
    problems = []
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines >= MAX_FILE_LINES:
            problems.append(f"{place(path)}: {lines} lines, the limit is {MAX_FILE_LINES}")
        problems += [
            f"{place(path, function)}: {function.name} has {length(function)} lines, the limit is {MAX_FUNCTION_LINES}"
            for function in functions(path)
            if length(function) >= MAX_FUNCTION_LINES
        ]
    show(problems)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function declares, `self`, `cls` and `ctx` left out."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls", "ctx"))


def test_functions_take_few_parameters():
    show(
        [
            f"{place(path, function)}: {function.name} has {count} parameters, the limit is {MAX_PARAMETERS}"
            for path in MODULES
            if package(path) != "cli"
            for function in functions(path)
            if (count := parameters(function)) > MAX_PARAMETERS
        ]
    )


def test_length_leaves_the_docstring_out():
    function = ast.parse('def f():\n    """One\n\n    two."""\n    a = 1\n    return a').body[0]
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 2


def test_every_module_says_what_it_is_for():
    show([f"{place(path)}: no module docstring" for path in MODULES if not ast.get_docstring(parse(path))])


def test_objectives_tell_shapes():
    """Public functions and classes that handle tensors name their shapes; those of plain numbers have none to name."""
    show(
        [
            f"{place(path, node)}: the docstring of {node.name} gives no shape in [brackets]"
            for path in MODULES
            if package(path) == "objectives"
            for node in parse(path).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if "Tensor" in ast.unparse(node) and "[" not in (ast.get_docstring(node) or "")
        ]
    )


def test_importing_the_package_loads_no_torch():
    script = "import rlkd, sys; print(*{'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def text_files() -> Iterator[tuple[Path, str]]:
    """Every text file of the tree outside version control, environments, caches and outputs."""
    for folder, directories, names in os.walk(ROOT):
        directories[:] = [
            name
            for name in directories
            if name not in SKIPPED_DIRECTORIES
            and Path(folder) / name != ROOT / "runs"  # outputs; rlkd/runs is code
            and not re.search(r"^\.venv|_cache$|^\.cache$|\.egg-info$|^\.hypothesis$|^\.ipynb_checkpoints$", name)
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        ]
        for name in set(names) - SKIPPED_DIRECTORIES:  # .git is a file in a second worktree
            path = Path(folder) / name
            try:
                yield path, path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def test_no_paths_of_one_machine():
    show(
        [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for path, text in text_files()
            for number, line in enumerate(text.splitlines(), start=1)
            if MACHINE_PATH.search(line)
        ]
    )


@pytest.mark.parametrize("prefix", ["", "'", "file://", "cd ", "=", ":"])
@pytest.mark.parametrize("folder", ["work", "root"])
def test_machine_paths_are_recognised(prefix, folder):
    assert MACHINE_PATH.search(f"{prefix}/{folder}/x")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/x")
    assert not MACHINE_PATH.search(f"./{folder}/x")


def test_pre_commit_works_without_a_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    assert [hook["id"] for hook in hooks[0]["hooks"]] == [
        "ruff-check",
        "ruff-format",
        "mypy",
        "codespell",
        "nbstripout",
    ]
