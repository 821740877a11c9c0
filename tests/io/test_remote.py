"""Rows and label folders are read from object storage; nothing is written there."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from rlkd.cli.main import main
from rlkd.data.rows import RowStream, load_rows
from rlkd.errors import ConfigError, DataError, RlkdError
from rlkd.io import remote
from rlkd.io.files import check_folder, make_folder
from rlkd.io.folders import check_page
from rlkd.settings.paths import refuse_remote_paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKD_REMOTE_CACHE", str(tmp_path / "cache"))
    remote.local_copy.cache_clear()
    yield tmp_path / "cache"
    remote.local_copy.cache_clear()


@pytest.fixture
def bucket():
    """Writes files into a store in memory."""
    store = fsspec.filesystem("memory")

    def put(**files):
        for name, rows in files.items():
            with store.open(f"/bucket/{name}.jsonl", "wb") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    yield put
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_rows_and_their_identity_are_those_of_local_files(bucket, tmp_path):
    rows = [{"a": i, "text": f"row {i}"} for i in range(5)]
    bucket(one=rows[:2], two=rows[2:])
    for name, part in (("one", rows[:2]), ("two", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for here, there in (("one.jsonl", "one.jsonl"), ("*.jsonl", "*.jsonl"), ("", "")):
        local = load_rows(str(tmp_path / here) if here else str(tmp_path / "*.jsonl"))
        assert load_rows(f"memory://bucket/{there}").to_list() == local.to_list() != []
    identities = [RowStream(source).identity() for source in (f"{tmp_path}/*.jsonl", "memory://bucket/*.jsonl")]
    assert identities[0] == identities[1]
    assert load_rows(f"file://{tmp_path}/two.jsonl").to_list() == rows[2:]


def test_files_that_change_are_read_anew_and_those_that_did_not_are_not_copied_again(bucket, cache, monkeypatch):
    bucket(one=[{"a": 1}])
    first = remote.local_copy("memory://bucket/one.jsonl")
    remote.local_copy.cache_clear()
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get_file", None)  # a copy would fail
    assert remote.local_copy("memory://bucket/one.jsonl") == first
    monkeypatch.undo()
    monkeypatch.setenv("RLKD_REMOTE_CACHE", str(cache))
    bucket(one=[{"a": 2}])
    remote.local_copy.cache_clear()
    assert load_rows("memory://bucket/one.jsonl").to_list() == [{"a": 2}]


def test_a_copy_that_was_cut_short_is_not_used(bucket, cache, monkeypatch):
    def cut(self, name, target, **_):
        Path(target).write_bytes(b"{")

    bucket(one=[{"a": 1}])
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get_file", cut)
    with pytest.raises(DataError, match="1 of its 9 bytes arrived"):
        load_rows("memory://bucket/one.jsonl")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("memory://bucket/none.jsonl", "there is no such file or folder"),
        ("ftp://host/rows.jsonl", "ftp:// is not read. Allowed: s3, gs"),
        ("memory://bucket/../rows.jsonl", "there is no such file|has '..' in it"),
    ],
)
def test_what_cannot_be_read_is_said(source, words):
    with pytest.raises(DataError, match=words):
        load_rows(source)


def test_a_name_that_would_leave_the_cache_is_refused():
    with pytest.raises(DataError, match=r"has '\.\.' in it"):
        remote._inside("bucket/../../rows.jsonl")


def test_a_full_disk_is_said(bucket, monkeypatch):
    def full(self, name, target, **_):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    bucket(one=[{"a": 1}])
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get_file", full)
    with pytest.raises(RlkdError, match="no space left for"):
        load_rows("memory://bucket/one.jsonl")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_driver_is_named(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(DataError, match=f"the driver of {scheme}:// is not installed: pip install {package}"):
        load_rows(f"{scheme}://bucket/rows.jsonl")


def test_a_driver_that_fails_says_why_and_tells_no_secret(bucket, monkeypatch):
    def fail(self, *_, **__):
        raise PermissionError("403 for key AKIAABCDEFGHIJKLMNOP")

    bucket(one=[{"a": 1}])
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get_file", fail)
    with pytest.raises(DataError, match="cannot be read: PermissionError: 403 for key <redacted>") as caught:
        load_rows("memory://bucket/one.jsonl")
    assert "AKIA" not in str(caught.value)

    def refuse(*_, **__):
        raise ValueError("no credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    remote.local_copy.cache_clear()
    with pytest.raises(DataError, match="cannot be opened: ValueError: no credentials"):
        load_rows("memory://bucket/one.jsonl")


@pytest.mark.slow
def test_a_label_folder_is_read(tmp_path, monkeypatch):
    from rlkd.labels.store import load_pseudolabels
    from tiny import save_pair

    monkeypatch.chdir(tmp_path)
    teacher, _ = save_pair(tmp_path / "models")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in "abc"))
    store = fsspec.filesystem("memory")
    with store.open("/bucket/rows.jsonl", "wb") as file:
        file.write(Path("rows.jsonl").read_bytes())
    label = [
        "generate-pseudolabels",
        "--teacher",
        teacher,
        "--input-column",
        "text",
        "--max-new-tokens",
        "4",
        "--quiet",
    ]
    with pytest.raises(SystemExit) as end:
        main([*label, "--strategy", "sample", "--dataset", "memory://bucket/rows.jsonl", "--out", "labels"])
    assert end.value.code == 0
    store.put("labels", "/bucket/labels", recursive=True)
    assert load_pseudolabels("memory://bucket/labels").to_list() == load_pseudolabels("labels").to_list() != []
    record = Path("labels/manifest.jsonl").read_text()
    assert "memory://bucket/rows.jsonl" in record
    assert str(tmp_path / "cache") not in record
    store.store.clear()


# Every command that takes a path that is no input, the path last.
OUTPUTS = [
    "generate-pseudolabels --teacher t --dataset d --input-column a --out", "evaluate m --dataset d --out",
    "predict m --dataset d --out", "report", "report runs --out", "compare a b --out", "inspect-rewards --out",
    "merge-adapter a", "export m --out", "export-onnx m", "train-vocabulary d --out", "cut-vocabulary m --out",
    "data merge", "data verify", "data repair", "data filter labels --out", "train ppo --output_dir",
    "train tkd --output_dir", "train ppo --pseudo_labels memory://b/labels --logging_dir", "distill --out",
    "probe --out",    "train ppo --teacher", "train ppo --model_name_or_path", "generate-pseudolabels --templates-dir",
    "config check",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf", "memory", "file"])
def test_outputs_are_refused_by_every_command(scheme, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in OUTPUTS:
        with pytest.raises(SystemExit) as end:
            main([*command.split(), f"{scheme}://bucket/place"])
        assert end.value.code == ConfigError.exit_code, command
        error = capsys.readouterr().err
        assert f"'{scheme}://bucket/place': object storage is only read" in error, command
        assert error.count("\n") == 1
        assert ("aws s3 sync" in error) == (scheme == "s3")
    assert list(tmp_path.iterdir()) == []


def test_outputs_in_a_settings_file_are_refused_and_inputs_are_not(tmp_path):
    file = tmp_path / "ppo.yaml"
    file.write_text("dataset: s3://bucket/rows.jsonl\npseudo_labels: gs://bucket/labels\noutput_dir: runs/a\n")
    for words in (["train", "ppo", "--config", str(file)], ["--config", str(file)]):
        refuse_remote_paths(words)
    file.write_text("dataset: s3://bucket/rows.jsonl\noutput_dir: s3://bucket/run\n")
    with pytest.raises(ConfigError, match="output_dir = 's3://bucket/run'"):
        refuse_remote_paths(["train", "ppo", "--config", str(file)])
    refuse_remote_paths(["--server_url", "http://localhost:8000/v1", "--server-url=https://key@host/v1"])


@pytest.mark.parametrize("write", [check_folder, make_folder, check_page])
def test_a_path_made_of_a_url_is_refused_before_a_folder_is_named_after_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="object storage is only read"):
        write(Path("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_refuses_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(ROOT / "recipes/ppo_t0_to_t5.py"), "--output_dir", "s3://bucket/run"]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "object storage is only read" in done.stderr
