import hashlib
import io
import tarfile

import pytest

from rlkd.errors import DataError
from rlkd.templates.download import download
from rlkd.templates.sources import PROMPTSOURCE_SHA256 as SHA256
from rlkd.templates.sources import cached_archive


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder pip takes for the only index, with a package that demands another Python and refuses to be built."""
    folder = tmp_path / "index"
    folder.mkdir()
    members = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: toyprompts\nVersion: 1.0\nRequires-Python: <3.0\n",
        "setup.py": f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit('setup.py ran')",
        "toyprompts/templates/toy/templates.yaml": "templates: {}",
    }
    with tarfile.open(folder / "toyprompts-1.0.tar.gz", "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"toyprompts-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    return folder


def toy(index, **options):
    digest = hashlib.sha256((index / "toyprompts-1.0.tar.gz").read_bytes()).hexdigest()
    return download(**{"package": "toyprompts", "version": "1.0", "sha256": digest} | options)


def test_pip_fetches_the_archive_and_runs_none_of_its_code(index, tmp_path):
    path, fetched = toy(index)
    assert (path, fetched) == (cached_archive(), True)
    assert path.read_bytes() == (index / "toyprompts-1.0.tar.gz").read_bytes()
    assert not (tmp_path / "ran").exists()
    assert list(path.parent.iterdir()) == [path]
    (index / "toyprompts-1.0.tar.gz").rename(index / "gone")
    assert download(package="toyprompts", version="1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest()) == (
        path,
        False,
    )


def test_another_file_in_its_place_is_kept(index, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rlkd.templates.download._pip_download", lambda *_: index / "toyprompts-1.0.tar.gz")
    cached_archive().parent.mkdir()
    cached_archive().write_text("mine")
    assert toy(index) == (cached_archive(), True)
    old = cached_archive().with_name(f"{cached_archive().name}.old")
    assert old.read_text() == "mine"
    assert f"was another file: it is now {old}" in caplog.text


def test_another_archive_is_refused_and_not_kept(index, tmp_path):
    with pytest.raises(
        DataError, match=r"pip could not fetch toyprompts==1\.0:(\n.*)+HASH(.*\n)+.*--templates-dir toyp"
    ):
        toy(index, sha256="0" * 64)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "ran").exists()


def test_a_package_that_is_not_there_and_a_cache_that_cannot_be_written(index, monkeypatch, tmp_path):
    with pytest.raises(
        DataError, match=r"pip could not fetch toyprompts==9(.|\n)*No matching distribution(.|\n)*Check"
    ):
        toy(index, version="9")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written: .* Set RLKD_CACHE to a folder"):
        toy(index)


@pytest.mark.net
@pytest.mark.enable_socket
def test_the_archive_of_promptsource_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    path, _ = download()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def test_what_pip_lets_through_is_checked_again(index, tmp_path, monkeypatch):
    archive = index / "toyprompts-1.0.tar.gz"
    monkeypatch.setattr("rlkd.templates.download._pip_download", lambda *_: archive)
    with pytest.raises(
        DataError, match=r"^toyprompts-1\.0\.tar\.gz has sha256 \w+, expected 0{64}\. Nothing was kept\.$"
    ):
        toy(index, sha256="0" * 64)
    assert not (tmp_path / "cache").exists()
