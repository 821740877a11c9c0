"""The wheel: complete, described, and a program of its own outside the clone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import rlkd
from rlkd.settings.paths import RECIPES, config_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BASE = PROJECT["project"]["urls"]["Homepage"]


def test_every_package_is_installed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "rlkd").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"rlkd.prompts", "rlkd.recipes"}


def test_one_version_is_told_everywhere():
    version = PROJECT["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert rlkd.__version__ == version == cited["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert cited["repository-code"] == BASE


def test_links_of_the_readme_work_on_a_package_index():
    """They are absolute, and name files and headings of this tree."""
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [link.removeprefix(BASE) for link in links if link.startswith(BASE)]
    assert len(ours) > 20
    for link in ours:
        kind, path, heading = re.fullmatch(r"/(blob|tree)/main/([^#]+)#?(.*)", link).groups()
        assert (ROOT / path).is_file() == (kind == "blob"), link
        assert not heading or heading in headings(ROOT / path), link


def headings(page):
    """The anchors of a page, as code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_public_workflow_runs_the_same_checks():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert ".ci/run" in [step.get("run") for job in jobs.values() for step in job["steps"]]


def test_shipped_settings_are_found_by_name_and_a_local_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ppo_t0_to_t5.yaml", "recipes/ppo_t0_to_t5.yaml"):
        assert config_file(name) == RECIPES / "ppo_t0_to_t5.yaml"
    assert config_file("mine/ppo_t0_to_t5.yaml") == Path("mine/ppo_t0_to_t5.yaml")
    assert config_file("ppo.yaml") == Path("ppo.yaml")
    (tmp_path / "ppo_t0_to_t5.yaml").write_text("lam: 0.5\n")
    assert config_file("ppo_t0_to_t5.yaml") == Path("ppo_t0_to_t5.yaml")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of what is under version control, and with the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return out


def run(*command: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*folders: str) -> set[str]:
    """Files under version control."""
    found = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a checkout")
    return set(found.stdout.split())


@pytest.mark.slow
def test_wheel_and_sdist_are_complete_and_valid(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist), cwd=built)
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = tracked("rlkd") | {f"rlkd/{name}" for name in tracked("prompts", "recipes/*.yaml") if "yaml" in name}
    assert wanted - held == set()
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if not name.startswith((".", "constraints"))} - files == set()


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A fresh environment outside the clone: the wheel, and what it needs from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    (purelib,) = (folder / "env").glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "env/bin/python")]
    run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder, PYTHONPATH="")
    # Editable installations of the clone are .pth files, which a folder named in a .pth file does not activate.
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


# One process: starting each command alone would take most of the time.
IN_TURN = """
import json, sys
from rlkd.cli.main import main
names = {}
for kind, block in json.loads(sys.argv[1]):
    if kind == "python":
        exec(block, names)
        continue
    sys.argv = ["rlkd", *block]
    try:
        main(block)
    except SystemExit as end:
        if end.code:
            raise
"""
FOUR = '{"max_steps": 4, "eval_steps": 4, "save_steps": 4}'
# The tutorial in seconds: fewer rows and updates.
SHORTER = {
    "--max_steps 200": "--max_steps 40 --eval_limit 8",
    "--out runs/notes\n": f"--out runs/notes --limit 60 --warm_up '{FOUR}' --rl '{FOUR}'\n",
    "--dataset notes.csv --input-column": "--limit 8 --dataset notes.csv --input-column",
}


def blocks(text: str) -> list[tuple[str, str | list[str]]]:
    """(python, source) and (shell, words of a command of rlkd) of a page, in its order."""
    found: list[tuple[str, str | list[str]]] = []
    for kind, block in re.findall(r"^```([a-z]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
        found += [(kind, block)] if kind else [("shell", words[1:]) for words in commands if words[0] == "rlkd"]
    return found


@pytest.mark.slow
def test_the_tutorial_runs_from_the_installed_package_outside_the_clone(installed):
    python = str(installed / "env/bin/python")
    quiet = {"OMP_NUM_THREADS": "1", "RLKD_CACHE": str(installed / "cache"), "PYTHONPATH": ""}
    assert "generate-pseudolabels" in run(str(installed / "env/bin/rlkd"), "--help", cwd=installed, **quiet)
    where = run(python, "-c", "import rlkd; print(rlkd.__file__)", cwd=installed, **quiet)
    assert Path(where.strip()).is_relative_to(installed)
    shipped = [
        ("shell", ["config", "show", "ppo_t0_to_t5.yaml", "--recipe", "ppo", "--bf16", "false"]),
        ("shell", ["prompts", "list"]),
    ]
    text = (ROOT / "docs/tutorial.md").read_text()
    for long, short in SHORTER.items():
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    steps = blocks(text)
    assert [words[0] for kind, words in steps if kind == "shell"] == [
        *("train-vocabulary", "train", "distill", "evaluate", "predict", "export"),
    ]
    steps.append(("python", "assert len(answers) == len(served) == len(texts)"))
    pandas, datasets = blocks((ROOT / "docs/howto.md").read_text().partition("## Read labels")[2])
    steps += [pandas, ("python", "read = dict(answers)"), datasets, ("python", "assert read == answers and read")]
    shown = run(python, "-c", IN_TURN, json.dumps([*shipped, *steps]), cwd=installed, **quiet)
    assert [told for told in ("reward_value: ", "dialogsum", "the student is that of") if told not in shown] == []
    made = installed / "runs"
    assert json.loads((made / "served/export.json").read_text())["settings"]["max_new_tokens"] == 16
    assert json.loads((made / "test/evaluation.json").read_text())["rows"] == 6
    assert (made / "notes/report.html").is_file()
