"""The wheel: complete, described, and a program of its own outside the clone."""

from __future__ import annotations

import json
import os
import re
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
    """A folder with the sdist, and with the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
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
    run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    # Editable installations of the clone are .pth files, which a folder named in a .pth file does not activate.
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_the_installed_package_trains_and_exports_outside_the_clone(installed):
    python = str(installed / "env/bin/python")
    quiet = {"OMP_NUM_THREADS": "1", "RLKD_CACHE": str(installed / "cache"), "PYTHONPATH": ""}

    def rlkd_(*words: str) -> str:
        return run(str(installed / "env/bin/rlkd"), *words, cwd=installed, **quiet)

    where = run(python, "-c", "import rlkd; print(rlkd.__file__)", cwd=installed, **quiet)
    package = Path(where.strip()).parent
    assert package.is_relative_to(installed)
    assert "generate-pseudolabels" in rlkd_("--help")
    assert "--learning_rate" in rlkd_("train", "seqkd", "--help")
    assert "reward_value: " in rlkd_("config", "show", "ppo_t0_to_t5.yaml", "--recipe", "ppo", "--bf16", "false")
    assert "dialogsum" in rlkd_("prompts", "list")
    run(python, str(package / "recipes/tiny_models.py"), "--to", "runs/tiny", cwd=installed, **quiet)
    templates = str(package / "recipes/tiny_templates.yaml")
    rlkd_(
        *("generate-pseudolabels", "--teacher", "runs/tiny/teacher", "--dataset", "runs/tiny/train.jsonl"),
        *("--input-column", "note", "--templates", templates, "--strategy", "sample", "--limit", "16"),
        *("--max-new-tokens", "8", "--quiet", "--out", "runs/tiny/labels"),
    )
    rlkd_("train", "seqkd", "--config", "seqkd_t0_to_t5.tiny.yaml", "--templates", templates)
    rlkd_("export", "runs/tiny/seqkd", "--to", "ctranslate2", "--out", "served")
    assert json.loads((installed / "served/export.json").read_text())["inputs"] == 8
    rlkd_("report", "runs/tiny/seqkd", "--out", "report.html")
    assert (installed / "report.html").is_file()
