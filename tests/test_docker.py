"""The images, as far as they can be tested without a Docker engine: what the Dockerfiles say, and their build stage."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

import rlkd

ROOT = Path(__file__).parents[1]
FILES = {kind: ROOT / "docker" / f"Dockerfile.{kind}" for kind in ("cpu", "gpu")}
SETTINGS = ["XDG_CACHE_HOME", "HF_HOME", "RLKD_CACHE", "TRITON_CACHE_DIR"]


def instructions(kind: str) -> list[tuple[str, str]]:
    """(NAME, value) of a Dockerfile, comments left out."""
    with FILES[kind].open("rb") as file:
        return [
            (i["instruction"], i["value"])
            for i in DockerfileParser(fileobj=file).structure
            if i["instruction"] != "COMMENT"
        ]


def stages(kind: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM on."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(kind):
        found += [[]] if instruction[0] == "FROM" else []
        found[-1].append(instruction)
    return found


def environment(kind: str) -> dict[str, str]:
    """ENV of the final stage."""
    pairs = [pair for name, value in stages(kind)[-1] if name == "ENV" for pair in shlex.split(value)]
    return dict(pair.split("=", 1) for pair in pairs)


def copied(kind: str) -> set[str]:
    """What is copied from the checkout."""
    values = [value.split() for name, value in instructions(kind) if name == "COPY" and "--from" not in value]
    return {source for *sources, _ in values for source in sources}


@pytest.mark.parametrize("kind", FILES)
def test_images_are_pinned_run_unprivileged_and_keep_data_outside(kind):
    build, final = stages(kind)
    for stage in (build, final):
        assert re.match(r"python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}\b", stage[0][1])
    said = dict(final)
    assert said["USER"] == "1000:1000"
    names = [name for name, _ in final]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert (said["ENTRYPOINT"], said["CMD"]) == ('["rlkd"]', '["--help"]')
    assert all(environment(kind)[name].startswith("/cache") for name in SETTINGS)
    assert said["VOLUME"] == '["/cache", "/home/rlkd/runs"]'
    words = " ".join(value for name, value in instructions(kind) if name in ("ARG", "ENV"))
    assert not re.search("token|secret|passw|key", words, re.IGNORECASE)


def test_images_differ_in_torch_alone():
    cpu, gpu = (instructions(kind) for kind in ("cpu", "gpu"))
    assert [i for i in cpu if i not in gpu] == [("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu")]
    assert [name for name, value in gpu if (name, value) not in cpu] == ["ARG", "ENV"]


@pytest.mark.parametrize("kind", FILES)
def test_the_build_sees_what_is_copied_and_nothing_else(kind):
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines[1:] if line.startswith("!")} == copied(kind)
    assert all((ROOT / source).exists() for source in copied(kind))


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A folder everyone may read, with what the build stage makes: opt/rlkd. Packages come from this environment."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root = Path(name)
        root.chmod(0o755)
        packages = sysconfig.get_path("purelib")
        variables = os.environ | {"PYTHONPATH": packages, "TORCH_INDEX": ""}
        for instruction, value in stages("cpu")[0]:
            if instruction == "COPY":
                *sources, target = value.split()
                for source in sources:
                    copy(ROOT / source, root / "src" / target)
            elif instruction == "RUN":
                command = re.sub(r"--mount=\S+|\bPIP_CACHE_DIR=\S+", "", value).replace("/opt/", f"{root}/opt/")
                done = subprocess.run(
                    command, shell=True, cwd=root / "src", env=variables, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stdout + done.stderr
        yield root


def copy(source: Path, target: Path) -> None:
    """As COPY does: a folder's content, or a file into a folder that ends with a slash."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run_without_rights(image: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In the image's environment, with a home of its own, bound by permissions even if this process is root's."""
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root is not bound by permissions, and there is no setpriv to bind it")
        command = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", *command)
    home = image / "home"
    home.mkdir(exist_ok=True)
    variables = {name: value.replace("/cache", f"{home}/cache") for name, value in environment("cpu").items()}
    variables |= {
        "PATH": f"{image}/opt/rlkd/bin:{os.defpath}",
        "HOME": str(home),
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }
    return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, check=False)


LOOK_AROUND = """
import os, sys, rlkd, huggingface_hub.constants
from pathlib import Path
from rlkd.templates.sources import cache_folder
prefix, home = Path(sys.prefix), Path.home()
assert Path(rlkd.__file__).is_relative_to(prefix), rlkd.__file__
writable = [str(path) for path in (prefix, *prefix.rglob("*")) if not path.is_symlink() and os.access(path, os.W_OK)]
assert not writable, writable[:5]
for folder in (cache_folder(), huggingface_hub.constants.HF_HUB_CACHE):
    assert Path(folder).is_relative_to(home / "cache"), folder
"""


@pytest.mark.slow
def test_what_the_build_stage_makes_runs_without_rights(image):
    version = run_without_rights(image, "rlkd", "--version")
    assert rlkd.__version__ in version.stdout, version.stderr
    prompts = run_without_rights(image, "rlkd", "prompts", "list")
    assert "dialogsum" in prompts.stdout, prompts.stderr
    looked = run_without_rights(image, "python", "-c", LOOK_AROUND)
    assert looked.returncode == 0, looked.stderr
