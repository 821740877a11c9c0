"""What labelling, merging and repairing refuse: folders, parts, ids and settings that no other test meets."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import stub
from rlkd.cli.main import main
from rlkd.data.examples import PromptedRows, RowRenderer
from rlkd.data.rows import RowStream
from rlkd.errors import ConfigError, DataError, InterruptedRunError
from rlkd.io.files import sha256
from rlkd.labels.maintenance import merge, verify
from rlkd.labels.manifest import Manifest
from rlkd.labels.store import load_pseudolabels
from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine
from tiny import tiny_teacher


@pytest.fixture
def source(tmp_path):
    return stub.write_rows(tmp_path / "rows.jsonl", rows=24)


@pytest.fixture
def parts(source, tmp_path):
    folders = [tmp_path / "zero", tmp_path / "one"]
    for i, folder in enumerate(folders):
        stub.label(source, folder, part=(i, 2))
    return folders


def without_line(file: Path, number: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    del lines[number]
    file.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "id": "1"}, {"text": "b"}], {"id_column": "id"}, r"rows\.jsonl:2: id_column 'id' has no value"),
        (
            [{"text": "a", "id": "1"}, {"text": "b", "id": "1"}],
            {"id_column": "id"},
            r"rows\.jsonl:2: the id '1' is also used in .*rows\.jsonl:1\. Ids must be unique",
        ),
        (
            [{"text": "a", "answer_choices": "b", "n": 1}],
            {"templates": stub.TEMPLATES},
            r"a column is named 'answer_choices', a name reserved for templates\. Rename the column",
        ),
    ],
)
def test_rows_that_cannot_be_labelled(tmp_path, rows, options, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    render = RowRenderer(**{"templates": (), "student_column": "text"} | options)
    with pytest.raises(DataError, match=message):
        PromptedRows(RowStream(str(file)), render)


def test_folders_that_cannot_be_trusted(source, tmp_path):
    with pytest.raises(DataError, match=r"holds no labels: no manifest\.jsonl and no manifest of a part there"):
        verify(tmp_path)
    stub.label(source, tmp_path / "out")
    (tmp_path / "out" / "manifest.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds label shards without manifest\.jsonl, so they cannot be verified"):
        stub.label(source, tmp_path / "out")


def test_shards_of_another_version_lack_columns(source, tmp_path):
    out = tmp_path / "out"
    stub.label(source, out)
    manifest = Manifest.read(out / "manifest.jsonl")
    for shard in manifest.shards.values():
        file = out / shard["file"]
        pq.write_table(pq.read_table(file).drop(["finish_reason"]), file)
        shard["sha256"] = sha256(file)
    manifest.rewrite()
    with pytest.raises(DataError, match=r"lacks the columns finish_reason; found id, .*Generate the labels again"):
        load_pseudolabels(out)


def test_parts_that_do_not_make_a_whole(source, parts, tmp_path):
    zero, one = parts
    stub.label(source, tmp_path / "taken")
    with pytest.raises(DataError, match=r"taken already holds labels \(manifest\.jsonl\)\. Choose another folder"):
        merge(tmp_path / "taken", parts)
    stub.label(source, tmp_path / "third", part=(1, 3))
    with pytest.raises(DataError, match="have different shardings: use the same n and shard_rows"):
        merge(tmp_path / "out", [zero, tmp_path / "third"])
    without_line(zero / "manifest-0-of-2.jsonl", 1)
    with pytest.raises(DataError, match=r"manifest-0-of-2\.jsonl lacks the shards 0\. Repair that part first"):
        merge(tmp_path / "out", parts)
    without_line(one / "manifest-1-of-2.jsonl", -1)
    with pytest.raises(DataError, match=r"manifest-1-of-2\.jsonl is not finished: repeat its command, then merge"):
        merge(tmp_path / "out", parts)
    assert not (tmp_path / "out").exists()


def test_labels_that_the_command_line_did_not_make_are_not_made_again(source, tmp_path, capsys):
    out = tmp_path / "out"
    stub.label(source, out)
    (out / "labels-00001.parquet").write_bytes(b"x")
    with pytest.raises(SystemExit) as end:
        main(["data", "repair", str(out)])
    assert end.value.code == 3
    assert "was not written by the command line, so its command is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--labels-per-input", "2"], ["--top-k-logprobs", "3"]])
def test_ranking_gives_one_label(more, tmp_path, capsys):
    command = ["generate-pseudolabels", "--teacher", "t", "--dataset", "d", "--input-column", "c", "--strategy", "rank"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--out", str(tmp_path / "out"), *more])
    assert end.value.code == 2
    assert "strategy = 'rank' gives one label and its choices' scores" in capsys.readouterr().err


def test_a_precision_that_ctranslate2_lacks():
    with pytest.raises(ConfigError, match=r"engine = 'ctranslate2': .*Use --engine torch\."):
        CTranslate2Engine(tiny_teacher().lm, "float7")


def test_a_signal_ends_the_run_with_a_message(source, tmp_path):
    class Signalled(stub.StubEngine):
        def answer(self, *args):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().answer(*args)

    with pytest.raises(
        InterruptedRunError, match=r"stopped by SIGTERM: \d+ labels are committed in .*Repeat the"
    ) as end:
        stub.label(source, tmp_path / "out", Signalled())
    assert end.value.exit_code == 143
