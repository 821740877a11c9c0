"""Label folders from elsewhere: nothing outside them is moved or written, and no recorded command runs by itself."""

import json
import os
import shutil
from pathlib import Path

import pytest

import stub
from rlkd.cli import labels as commands
from rlkd.cli.main import main
from rlkd.errors import DataError
from rlkd.inspection.labels import from_labels
from rlkd.io.files import write_durably
from rlkd.io.lock import writer_lock
from rlkd.jobs.rewards import view_of_labels
from rlkd.labels.folder import check_output
from rlkd.labels.maintenance import merge, repair, verify
from rlkd.labels.manifest import _encode
from rlkd.labels.store import labels_finished, load_pseudolabels
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The source, a whole folder, and a part of two."""
    folder = tmp_path_factory.mktemp("labels")
    source = stub.write_rows(folder / "rows.jsonl", 24)
    stub.label(source, folder / "out")
    stub.label(source, folder / "part", part=(0, 2))
    return source, folder / "out", folder / "part"


def rewrite(folder: Path, which: str, **changes) -> None:
    """Other values in the first line of a kind, with a checksum that fits."""
    log = next(folder.glob("manifest*.jsonl"))
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    at = next(i for i, entry in enumerate(lines) if entry["kind"] == which)
    lines[at] |= changes
    entries = [{name: value for name, value in entry.items() if name != "check"} for entry in lines]
    log.write_bytes(b"".join(map(_encode, entries)))


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]  # no locks
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


PATHS = ["../VICTIM.txt", "/tmp/VICTIM.txt", "..\\VICTIM.txt", "sub/labels-00000.parquet", "./labels-00000.parquet",
         "labels-00000.parquet/", "LABELS-00000.parquet", "labels-00001.parquet", "labels-0.parquet", "README.md", "",
         "labels-00000.parquet\x00", "C:\\labels-00000.parquet", None, 5, ["labels-00000.parquet"]]  # fmt: skip
LINES = [
    *(("shard", {"file": path}) for path in PATHS),
    ("shard", {"shard": -1, "file": "labels--0001.parquet"}),
    ("shard", {"shard": "../x"}),
    ("shard", {"shard": True, "file": "labels-00001.parquet"}),
    ("shard", {"rows": -8}),
    ("shard", {"rows": "8"}),
    ("shard", {"status": {"ok": "many"}}),
    ("shard", {"templates": {"some": 1.5}}),
    ("shard", {"sha256": None}),
    ("shard", {"kind": "command"}),
    ("shard", {"kind": ["shard"]}),
    ("header", {"part": [2, 2]}),
    ("header", {"part": "0/2"}),
    ("header", {"request": "rm -rf"}),
    ("header", {"vocabulary": "t5"}),
    ("header", {"settings": None}),
    ("header", {"rows_per_shard": 1.5}),
    ("header", {"format": 2}),
    ("finished", {"rows": None}),
]


@pytest.mark.parametrize(("kind", "changes"), LINES, ids=repr)
def test_lines_that_rlkd_does_not_write_are_refused_by_everyone(made, tmp_path, kind, changes):
    source, whole, part = made
    (tmp_path / "VICTIM.txt").write_text("mine")
    for name, origin in (("out", whole), ("part", part)):
        shutil.copytree(origin, tmp_path / name)
        rewrite(tmp_path / name, kind, **changes)
    out = tmp_path / "out"
    before = everything(tmp_path)
    for use in (
        lambda: load_pseudolabels(out),
        lambda: labels_finished(out),
        lambda: verify(out),
        lambda: repair(out),
        lambda: from_labels(out, tiny_tokenizer()),
        lambda: check_output(out, overwrite=False),
        lambda: stub.label(source, out),
        lambda: merge(tmp_path / "merged", [tmp_path / "part"]),
    ):
        with pytest.raises(DataError, match=r"jsonl:\d+: .*\. Get the labels from their source again") as error:
            use()
        assert len(str(error.value)) < 600
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"kind": "\\ud800", "check": "x"}', b'{"kind": 1' + b"0" * 5000 + b"}"]
)
def test_lines_that_no_parser_likes_are_damage(made, tmp_path, line):
    _, whole, _ = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with (out / "manifest.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=r"manifest\.jsonl, line 6, differs from its checksum"):
        load_pseudolabels(out)


def test_numbers_without_end_do_not_fill_the_memory(made, tmp_path):
    _, whole, part = made
    out = tmp_path / "out"
    for name, changes in (("scan", {"scan": {"rows": 10**18}}), ("size", {"rows_per_shard": 0})):
        shutil.copytree(whole, out)
        rewrite(out, "header", **changes)
        with pytest.raises(DataError):
            load_pseudolabels(out)
        assert verify(out), name
        shutil.rmtree(out)
    shutil.copytree(whole, out)
    rewrite(out, "shard", inputs=10**18)
    with pytest.raises(DataError):
        load_pseudolabels(out)
    assert verify(out)
    shutil.copytree(part, tmp_path / "part")
    rewrite(tmp_path / "part", "header", part=[0, 10**18])
    with pytest.raises(DataError, match=r"1 of 1000000000000000000 parts found; missing: 1/1000000000000000000, "):
        merge(tmp_path / "merged", [tmp_path / "part"])


def test_nothing_is_written_through_links(made, tmp_path):
    source, whole, part = made
    victim = tmp_path / "VICTIM"
    victim.write_text("mine")
    (tmp_path / "elsewhere").mkdir()

    def unchanged():
        assert victim.read_text() == "mine"
        assert not list((tmp_path / "elsewhere").iterdir())

    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "labels-00000.parquet").write_bytes(b"x")
    (out / "damaged").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"damaged is a link to .*elsewhere.*Copy the folder first"):
        repair(out)
    unchanged()
    (out / "damaged").unlink()

    # The log itself, which repairing and continuing append to.
    log = tmp_path / "log.jsonl"
    shutil.move(out / "manifest.jsonl", log)
    before = log.read_bytes()
    (out / "manifest.jsonl").symlink_to(log)
    for change in (
        lambda: repair(out),
        lambda: stub.label(source, out),
        lambda: stub.label(source, out, overwrite=True),
    ):
        with pytest.raises(DataError, match=r"manifest\.jsonl is a link to"):
            change()
    assert log.read_bytes() == before

    # Files with names that rlkd uses for a moment.
    for name in ("README.md.tmp", ".run.lock", ".run.owner"):
        (tmp_path / name).symlink_to(victim)
    write_durably(tmp_path / "README.md", b"card")
    with writer_lock(tmp_path / "run"):
        unchanged()
    unchanged()
    assert (tmp_path / "README.md").read_bytes() == b"card"

    # What merging copies without a checksum.
    shutil.copytree(part, tmp_path / "0")
    stub.label(source, tmp_path / "1", part=(1, 2))
    (tmp_path / "0" / "bad_rows.jsonl").symlink_to(victim)
    with pytest.raises(DataError, match=r"bad_rows\.jsonl is a link"):
        merge(tmp_path / "merged", [tmp_path / "0", tmp_path / "1"])
    assert not any(content == b"mine" for content in everything(tmp_path / "merged").values())


def test_a_link_to_a_shard_is_read(made, tmp_path):
    """A hub cache holds its files so."""
    _, whole, _ = made
    out = tmp_path / "out"
    out.mkdir()
    for file in whole.iterdir():
        os.symlink(file, out / file.name)
    assert load_pseudolabels(out).to_list() == load_pseudolabels(whole).to_list()


@pytest.mark.parametrize("name", ["teacher", "max_input_tokens", "append_eos"])
@pytest.mark.parametrize("value", [None, ["x"]])
def test_settings_that_a_view_needs(made, tmp_path, name, value):
    _, whole, _ = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    header = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
    rewrite(out, "header", settings=header["settings"] | {name: value})
    request = {"labels": out, "reward_value": "max", "teacher": None, "limit": 5}
    with pytest.raises(DataError, match=rf"its manifest's settings have no {name}\. Get the labels again"):
        view_of_labels(request)


REQUEST = {"teacher": "t", "dataset": "rows.jsonl", "input_column": "text", "seed": 3, "input_eos": False,
           "shard": None, "gold_input": True, "templates": ["a b", "c"], "folder": "/data"}  # fmt: skip


def test_the_recorded_command_is_shown_and_runs_only_when_asked(made, tmp_path, capsys, monkeypatch):
    _, whole, _ = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    rewrite(out, "header", request=REQUEST)
    (out / "labels-00000.parquet").write_bytes(b"x")
    ran = []
    monkeypatch.setattr(
        "rlkd.jobs.pseudolabels.label", lambda request, *_, **__: ran.append(request) or {"status": {"failed": 0}}
    )
    before = everything(out)
    with pytest.raises(SystemExit) as end:
        main(["data", "repair", str(out)])
    command = (
        "cd /data && rlkd generate-pseudolabels --teacher=t --dataset=rows.jsonl --input-column=text --seed=3 "
        f"--no-input-eos --gold-input '--templates=a b' --templates=c --out={out}"
    )
    printed = capsys.readouterr()
    assert (end.value.code, ran) == (3, [])
    assert command in printed.out
    assert "was not changed. If you trust the recorded command, repeat with --run" in printed.err
    assert everything(out) == before
    with pytest.raises(SystemExit) as end:
        main(["data", "repair", str(out), "--run", "--quiet"])
    assert (end.value.code or 0) == 0
    (request,) = ran
    # What is not recorded has its default, and every value was checked as if typed.
    assert request["templates"] == ["a b", "c"]
    assert (request["seed"], request["input_eos"], request["on_long"]) == (3, False, "truncate")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"hook": "rm"}, 3, "the recorded command has an unknown option 'hook'"),
        ({"out": "/tmp/x"}, 3, "the recorded command has an unknown option 'out'"),
        ({"overwrite": True}, 3, "the recorded command has an unknown option 'overwrite'"),
        ({"limit": "many"}, 2, "Invalid value for '--limit'"),
        ({"teacher": None}, 2, "Missing option '--teacher'"),
        (
            {"dataset": "https://<redacted>@h/x"},
            3,
            "--dataset=https://<redacted>@h/x held a secret, which is not recorded",
        ),
    ],
)
def test_recorded_commands_that_no_one_typed(made, tmp_path, capsys, changes, code, message):
    _, whole, _ = made
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    rewrite(out, "header", request=REQUEST | changes)
    (out / "labels-00000.parquet").write_bytes(b"x")
    with pytest.raises(SystemExit) as end:
        main(["data", "repair", str(out), "--run"])
    printed = capsys.readouterr().err
    assert end.value.code == code
    assert message in printed
    assert "Traceback" not in printed


def test_control_characters_of_a_recorded_command_do_not_reach_the_terminal():
    shown = commands.shown(REQUEST | {"teacher": "\x1b[2Jx\r\n", "folder": "/a\x07"}, Path("out"))
    assert shown.isprintable()
    assert "\\x1b[2Jx\\r\\n" in shown
