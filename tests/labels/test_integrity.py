"""Label folders with holes, repeated lines and edited totals: every reader refuses them, and repairing mends them."""

import json
import shutil

import pytest

import stub
from rlkd.errors import DataError
from rlkd.inspection.labels import from_labels
from rlkd.jobs.rewards import view_of_labels
from rlkd.jobs.setup import DataArguments, load_data
from rlkd.labels.integrity import finished_manifest
from rlkd.labels.maintenance import merge, repair, verify
from rlkd.labels.manifest import _encode
from rlkd.labels.store import labels_finished, load_pseudolabels
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    source = stub.write_rows(folder / "rows.jsonl", 40)
    stub.label(source, folder / "out")
    return source, folder / "out"


def flip(lines, at):
    return [*lines[:at], lines[at][:60] + bytes([lines[at][60] ^ 1]) + lines[at][61:], *lines[at + 1 :]]


def edited(lines, at, **changes):
    """The line with other values and a checksum that fits: it has no key."""
    entry = {name: value for name, value in json.loads(lines[at]).items() if name != "check"}
    return [*lines[:at], _encode(entry | changes), *lines[at + 1 :]]


# The log: a header, shards 0 to 4, finished.
HOLES = {
    "first line deleted": lambda lines: lines[1:],
    "first shard deleted": lambda lines: lines[:1] + lines[2:],
    "middle shard deleted": lambda lines: lines[:3] + lines[4:],
    "last shard deleted": lambda lines: lines[:-2] + lines[-1:],
    "all shards deleted": lambda lines: [lines[0], lines[-1]],
    "last line deleted": lambda lines: lines[:-1],
    "bit flipped in a shard": lambda lines: flip(lines, 3),
    "bit flipped in the totals": lambda lines: flip(lines, len(lines) - 1),
    "shard twice": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "another shard's line after the end": lambda lines: [*lines, lines[2]],
    "finished twice": lambda lines: [*lines, lines[-1]],
    "torn line after the end": lambda lines: [*lines, lines[2][:40]],
    "rows in the totals": lambda lines: edited(lines, len(lines) - 1, rows=7),
    "status in the totals": lambda lines: edited(lines, len(lines) - 1, status={"ok": 1}),
    "rows of a shard": lambda lines: edited(lines, 2, rows=4),
    "settings of a shard unknown": lambda lines: edited(lines, 2, generation="0123456789abcdef"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_every_reader_refuses_a_hole(whole, tmp_path, hole):
    source, reference = whole
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    log = out / "manifest.jsonl"
    log.write_bytes(b"".join(HOLES[hole](log.read_bytes().splitlines(keepends=True))))
    request = {"labels": out, "reward_value": "max", "teacher": None, "limit": 5}
    data = DataArguments(str(source), eval_dataset=str(source), input_column="text", reference_column=None,
                         templates=[], pseudo_labels=str(out))  # fmt: skip
    readers = {
        "load": lambda: load_pseudolabels(out),
        "all rows": lambda: load_pseudolabels(out, statuses=None),
        "recipe": lambda: load_data(data),
        "inspect": lambda: from_labels(out, tiny_tokenizer()),
        "inspect command": lambda: view_of_labels(request),
        "manifest": lambda: finished_manifest(out),
    }
    for name, read in readers.items():
        with pytest.raises(DataError) as error:
            read()
        assert "\n" not in str(error.value), name
    if hole in ("last line deleted", "bit flipped in the totals"):  # not finished, then
        assert not labels_finished(out)
    else:
        with pytest.raises(DataError):
            labels_finished(out)
    if hole == "first line deleted":
        with pytest.raises(DataError, match="its first line, the header, is not readable"):
            verify(out)
        return
    assert verify(out)
    repair(out)
    stub.label(source, out)
    assert verify(out) == []
    assert stub.shards(out) == stub.shards(reference)
    assert load_pseudolabels(out).to_list() == load_pseudolabels(reference).to_list()


def test_swapped_shards_and_edited_rows_are_seen_whatever_the_log_says(whole, tmp_path):
    """A checksum and counts that fit do not help: rows are compared with the shard's block."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from rlkd.io.files import sha256
    from rlkd.labels.manifest import Manifest

    _, reference = whole

    def changed(name, change):
        out = tmp_path / name
        shutil.copytree(reference, out)
        manifest = Manifest.read(out / "manifest.jsonl")
        change(out)
        for shard in manifest.shards.values():
            shard["sha256"] = sha256(out / shard["file"])
        manifest.rewrite()
        return out

    def swap(out):
        one, other = out / "labels-00001.parquet", out / "labels-00002.parquet"
        contents = one.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        one.write_bytes(contents[1])

    def rewrite(out, make):
        file = out / "labels-00001.parquet"
        pq.write_table(make(pq.read_table(file)), file)

    def all_ok(table):
        i = table.column_names.index("status")
        return table.set_column(i, "status", pc.if_else(pc.equal(table["status"], "ok"), "ok", "ok"))

    cases = {
        "swapped": (swap, "does not hold the labels of rows 8 .. 15"),
        "a row less": (lambda out: rewrite(out, lambda t: t.slice(0, len(t) - 1)), "does not hold the labels of rows"),
        "backwards": (
            lambda out: rewrite(out, lambda t: t.take(list(range(len(t)))[::-1])),
            "does not hold the labels",
        ),
        "status": (lambda out: rewrite(out, all_ok), "holds other rows than manifest.jsonl lists"),
        "column": (lambda out: rewrite(out, lambda t: t.drop(["row"])), "is not readable: No match for FieldRef"),
        "not parquet": (lambda out: (out / "labels-00001.parquet").write_bytes(b"x" * 99), "is not readable"),
    }
    for name, (change, message) in cases.items():
        out = changed(name, change)
        with pytest.raises(DataError, match=message):
            load_pseudolabels(out)
        assert any(message in problem for problem in verify(out)), name


def test_parts_with_a_hole_are_not_merged(whole, tmp_path):
    source, _ = whole
    for i in range(2):
        stub.label(source, tmp_path / str(i), part=(i, 2))
    log = tmp_path / "0" / "manifest-0-of-2.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for hole in (lines[:-2] + lines[-1:], [*lines, lines[1]], flip(lines, 1), edited(lines, len(lines) - 1, rows=1)):
        log.write_bytes(b"".join(hole))
        with pytest.raises(DataError, match="Repair that part first"):
            merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"])
        assert not (tmp_path / "out").exists()
