"""Files as people have them: every encoding, delimiter, compression and folder gives the rows; the rest its reason."""

import bz2
import gzip
import json
import lzma
import zipfile

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlkd.data.files import splits_of
from rlkd.data.glue import load_labelled
from rlkd.data.rows import RowStream, load_rows
from rlkd.data.text import TextFormat, text_format
from rlkd.errors import ConfigError, DataError

ROWS = [{"text": "a, b; c", "label": 1}, {"text": 'naïve "£" | 日本', "label": 0}, {"text": "two\nlines", "label": 12}]
LATIN = [{"text": "naïve; £", "label": 1}, {"text": "b", "label": 0}]
WIDE = ("utf-16", "utf-32")


def read(source, **options):
    """The rows as a table and as a stream, which must agree."""
    table = load_rows(str(source), **options).to_list()
    stream = RowStream(str(source), **options)
    streamed = [row for _, _, block in stream.blocks(stream.scan(), 2, lambda k: True) for row in block]
    assert streamed == table
    return table


def csv_bytes(rows, encoding="utf-8", **options) -> bytes:
    return pandas.DataFrame(rows).to_csv(**{"index": False} | options).encode(encoding)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", *WIDE])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_compression_and_encodings_give_the_same_rows(tmp_path, kind, encoding, suffix):
    if kind == "json":
        content = json.dumps(ROWS, ensure_ascii=False, indent=1).encode(encoding)
    elif kind in ("csv", "tsv"):
        content = csv_bytes(ROWS, encoding, sep="," if kind == "csv" else "\t")
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(encoding)
    file = tmp_path / f"rows.{kind}{suffix}"
    file.write_bytes(COMPRESS[suffix](content))
    assert read(file) == ROWS


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_and_said(tmp_path, name, delimiter, caplog):
    (tmp_path / name).write_bytes(csv_bytes(ROWS, sep=delimiter))
    assert read(tmp_path / name) == ROWS
    usual = "," if name == "rows.csv" else "\t"
    assert [("separated by" in line) for line in caplog.messages] == [True] * (delimiter != usual)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        # A column of texts is one column, whatever stands in its lines.
        ("text\nhello; you\na|b\n", [{"text": "hello; you"}, {"text": "a|b"}]),
        ("text;score\nhi, you;3,5\nbye;4,0\n", [{"text": "hi, you", "score": "3,5"}, {"text": "bye", "score": "4,0"}]),
        ("sep=;\r\ntext;label\r\na;1\r\n", [{"text": "a", "label": 1}]),  # Excel names it
        ("text,label\ra,1\r\"b\rc\",0\r", [{"text": "a", "label": 1}, {"text": "b\rc", "label": 0}]),  # old Macs
        ("\n\ntext,label\na,1\n", [{"text": "a", "label": 1}]),
        ("text,label,\na,1,\nb,0,\n", [{"text": "a", "label": 1}, {"text": "b", "label": 0}]),  # Excel's last comma
        (",text,label\n0,a,1\n1,b,0\n", [{"text": "a", "label": 1}, {"text": "b", "label": 0}]),  # pandas' index
    ],
)  # fmt: skip
def test_other_shapes_of_csv(tmp_path, content, rows):
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert read(tmp_path / "a.csv") == rows


def test_columns_without_a_name_are_said_and_hide_no_text(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label,\na,1,\nb, c,0\nd, e,0,\n")
    rows = load_rows(str(tmp_path / "a.csv"), on_bad_row="skip").to_list()
    assert rows == [{"text": "a", "label": 1}]  # a shifted cell is not dropped in silence
    assert "a.csv:1 has a column without a name, which is not read" in caplog.text
    with pytest.raises(DataError, match=r"a\.csv:3 has '0' in its last cell, which has no column name\. Quote a cell"):
        load_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le", "utf-16-be", "mac_roman"])
def test_a_named_encoding(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(csv_bytes(LATIN, encoding, sep=";"))
    assert read(tmp_path / "a.csv", text_format=TextFormat(encoding=encoding)) == LATIN
    with pytest.raises(DataError, match=r"a\.csv.* is not UTF-8"):
        load_rows(str(tmp_path / "a.csv"))


def test_a_named_delimiter_and_columns(tmp_path):
    (tmp_path / "a.csv").write_text("a~1\nb~0\n")
    settings = {"delimiter": "~", "columns": "text, label"}
    assert read(tmp_path / "a.csv", text_format=text_format(settings)) == [
        {"text": "a", "label": 1}, {"text": "b", "label": 0}
    ]  # fmt: skip
    assert text_format(settings, beside="a.csv", path="b.jsonl") == TextFormat()
    assert text_format(settings, beside="a.csv", path="b.csv.gz").delimiter == "~"
    (tmp_path / "b.csv").write_text("a;b|c\n1;2|3\n")
    with pytest.raises(DataError, match=r"b\.csv: columns may be separated by a semicolon or a bar\. Name the delim"):
        load_rows(str(tmp_path / "b.csv"))
    for wrong in ({"delimiter": ",,"}, {"delimiter": "a"}, {"encoding": "utf-88"}, {"encoding": "rot13"}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} = '{next(iter(wrong.values()))}'"):
            TextFormat(**wrong)


def workbook(path, member="xl/workbook.xml"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(member, "x")
    return path.read_bytes()


def test_what_is_not_text_is_named(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    contents = {
        r"an Excel workbook \(\.xlsx\): save it as CSV": workbook(tmp_path / "w"),
        "a zip archive: unpack it": workbook(tmp_path / "w", "rows.csv"),
        "an old Excel workbook": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a parquet file: rename it to": (tmp_path / "t.parquet").read_bytes(),
        r"compressed with gzip: add \.gz": gzip.compress(b"text\n"),
        r"compressed with zstandard: add \.zst": zstd(b"text\n"),
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "a web page": b"\n<!DOCTYPE html>\n<html>",
        "an SQLite database": b"SQLite format 3\0",
    }
    for words, content in contents.items():
        for name in ("a.csv", "a.jsonl", "a.tsv", "a.json"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=rf"a\.\w+ is {words}"):
                load_rows(str(tmp_path / name))
        if "parquet" not in words:
            (tmp_path / "a.parquet").write_bytes(content)
            with pytest.raises(DataError, match=rf"is not a readable parquet file: it is {words}"):
                load_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_archives(tmp_path, suffix):
    lines = b"".join(b'{"a": %d}\n' % (i * 7919 % 1000) for i in range(5000))
    for name, content in (("cut", COMPRESS[suffix](lines)[:-40]), ("other", b"x" * 500)):
        file = tmp_path / f"{name}.jsonl{suffix}"
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\{suffix} cannot be decompressed: .*fetch it again"):
            load_rows(str(file))


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        else:
            (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        ({"b.jsonl": '{"a": 2}\n', "a.jsonl": '{"a": 1}\n', "README.md": "#"}, [{"a": 1}, {"a": 2}]),
        ({"a.csv": "t,n\nx,1\n", "b.csv": "n,t\n2,y\n"}, [{"t": "x", "n": 1}, {"t": "y", "n": 2}]),
        ({"train.jsonl": '{"a": 1}\n', "test.jsonl": '{"a": 2}\n'}, [{"a": 1}]),
        ({"train/x.csv": "a\n1\n", "test/x.csv": "a\n2\n"}, [{"a": 1}]),
        (
            {"y=2023/l=en%20us/p.parquet": pa.table({"t": ["a"]}), "y=2024/l=fr/p.parquet": pa.table({"t": ["b"]})},
            [{"t": "a", "l": "en us", "y": 2023}, {"t": "b", "l": "fr", "y": 2024}],
        ),
        ({"y=1/p.jsonl": '{"t": "a"}\n', "y=2/p.jsonl": '{"t": "b"}\n'}, [{"t": "a", "y": 1}, {"t": "b", "y": 2}]),
    ],
)
def test_folders(tmp_path, files, rows):
    assert read(put(tmp_path, files)) == rows


def test_the_splits_of_a_folder(tmp_path):
    line = '{"a": 1}\n'
    cases = {
        ("train-0.jsonl", "test.jsonl", "other.jsonl"): {"train", "test"},
        ("train/x.jsonl", "validation/x.jsonl"): {"train", "validation"},
        ("a.jsonl", "train/x.jsonl"): set(),
        ("y=1/x.jsonl",): set(),
    }
    for i, (files, splits) in enumerate(cases.items()):
        assert splits_of(put(tmp_path / str(i), dict.fromkeys(files, line))) == splits
    assert splits_of(tmp_path / "0" / "test.jsonl") == set()
    with pytest.raises(DataError, match=r"no shards of split 'dev'\. Splits found: train, validation\."):
        load_rows(str(tmp_path / "1"), split="dev")


def test_patterns_and_folders_that_cannot_be_read(tmp_path):
    put(tmp_path, {"a.jsonl": '{"a": 1}\n', "b.jsonl": '{"a": 2}\n', "c.csv": "a\n3\n"})
    assert read(tmp_path / "*.jsonl") == [{"a": 1}, {"a": 2}]
    assert read(tmp_path / "[b-z].jsonl") == [{"a": 2}]
    with pytest.raises(DataError, match=r"no file matches '.*\*\.tsv'"):
        load_rows(str(tmp_path / "*.tsv"))
    with pytest.raises(DataError, match=r"has files of several formats: \.csv, \.jsonl\. Name those that are meant"):
        load_rows(str(tmp_path))
    put(tmp_path / "two", {"a.csv": "t,n\nx,1\n", "b.csv": "t,m\nx,1\n"})
    with pytest.raises(DataError, match=r"b\.csv and a\.csv have different columns"):
        load_rows(str(tmp_path / "two"))
    assert read(tmp_path / "two", only={"t"}) == [{"t": "x"}, {"t": "x"}]


def test_errors_in_several_files_name_the_file_and_the_line(tmp_path):
    put(tmp_path, {"a.jsonl": '{"a": 1}\n', "b.jsonl": '{"a": 2}\n{"a": }\n{"a": "x"}\n{"a": 3}\n'})
    with pytest.raises(DataError, match=r"b\.jsonl:2:7 is not valid JSON"):
        load_rows(str(tmp_path))
    assert read(tmp_path, on_bad_row="skip") == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_data_sets_saved_to_disk(tmp_path):
    one = datasets.Dataset.from_dict({"a": ["x", "y"], "n": [0, 1]})
    one.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [{"a": "x", "n": 0}, {"a": "y", "n": 1}]
    assert read(tmp_path / "one", only={"n"}) == [{"n": 0}, {"n": 1}]
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict", split="test") == [{"a": "y", "n": 1}]
    with pytest.raises(
        DataError, match=r"no shards of split 'tests'\. Splits found: test, train\. Did you mean 'test'"
    ):
        load_rows(str(tmp_path / "dict"), split="tests")
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(DataError, match=r"cannot be read as saved by datasets: .*Save it again"):
        load_rows(str(tmp_path / "one"))


def typed(values, kind) -> pa.Table:
    return pa.table({"a": pa.array(values, kind)})


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        (typed([None], pa.null()), typed(["x"], pa.string()), [None, "x"]),
        (typed([1], pa.int32()), typed([2**40], pa.int64()), [1, 2**40]),
        (typed(["x"], pa.string()), typed(["y"], pa.large_string()), ["x", "y"]),
        (typed(["x"], pa.dictionary(pa.int8(), pa.string())), typed(["y"], pa.string()), ["x", "y"]),
        (typed(["x"], pa.string_view()), typed(["y"], pa.string()), ["x", "y"]),
        (typed([[1]], pa.list_(pa.int8())), typed([[]], pa.list_(pa.null())), [[1], []]),
        (typed([1], pa.int8()), typed([2.5], pa.float64()), [1.0, 2.5]),
    ],
)
def test_shards_whose_types_join_without_loss(tmp_path, first, second, values):
    put(tmp_path, {"1.parquet": first, "2.parquet": second})
    assert [row["a"] for row in read(tmp_path)] == values


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (typed([1], pa.int64()), typed(["x"], pa.string())),
        (typed(["x"], pa.string()), typed([b"x"], pa.binary())),
        (typed([2**53 + 1], pa.int64()), typed([0.5], pa.float64())),
        (typed([2**64 - 1], pa.uint64()), typed([-1], pa.int64())),
    ],
)
def test_shards_that_would_lose_something_are_refused(tmp_path, first, second):
    put(tmp_path, {"1.parquet": first, "2.parquet": second})
    with pytest.raises(DataError, match=r"different columns|cannot be joined with the other files without loss"):
        load_rows(str(tmp_path))


def test_only_the_columns_that_are_read_must_be_readable(tmp_path):
    bytes_ = pa.array([b"\xff", b"ok"])
    text = pa.StringArray.from_buffers(2, bytes_.buffers()[1], bytes_.buffers()[2])  # the first is no UTF-8
    odd = {"m": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), "s": text}
    day = pa.array([2**31 - 1, 0], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"t": ["x", "y"], "d": day, **odd}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", only={"t"}) == [{"t": "x"}, {"t": "y"}]
    for name in ("s", "d"):
        with pytest.raises(DataError, match=r"a\.parquet, row 1 cannot be read"):
            load_rows(str(tmp_path / "a.parquet"), only={name})
        assert len(read(tmp_path / "a.parquet", only={"t", name}, on_bad_row="skip")) == 1
    with pytest.raises(DataError, match=r"column 'm' has the type map<.*Convert it to text"):
        load_rows(str(tmp_path / "a.parquet"), only={"m"})
    (tmp_path / "a.jsonl").write_text('{"t": "x", "o": 1}\n{"t": "y", "o": "z"}\n')
    assert read(tmp_path / "a.jsonl", only={"t"}) == [{"t": "x"}, {"t": "y"}]
    (tmp_path / "a.csv").write_text("t,o,o\nx,1,2\n")
    assert read(tmp_path / "a.csv", only={"t"}) == [{"t": "x"}]
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has 2 columns named 'a'\. Rename one"):
        load_rows(str(tmp_path / "b.parquet"))


def test_what_is_said_of_the_file_and_is_not_so(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text, label\na,1\n")
    assert read(tmp_path / "a.csv", text_format=TextFormat(columns=("text", "label"))) == [{"text": "a", "label": 1}]
    assert "a.csv:1 is the header, not a row" in caplog.text
    (tmp_path / "b.csv").write_bytes(csv_bytes(LATIN, "utf-8-sig"))
    assert read(tmp_path / "b.csv", text_format=TextFormat(encoding="cp1252")) == LATIN
    assert "b.csv is read as UTF-8, which its byte order mark says, not as cp1252" in caplog.text
    (tmp_path / "c.csv").write_bytes(csv_bytes(LATIN))
    assert read(tmp_path / "c.csv", text_format=TextFormat(encoding="latin-1")) != LATIN
    assert "c.csv is read as latin-1, as asked for, but it looks like UTF-8" in caplog.text


def test_other_extensions(tmp_path):
    workbook(tmp_path / "a.xlsx")
    for name, content, words in (
        ("a.txt", "x", "rename it to .csv or .tsv"),
        ("a.zip", None, "a zip archive: unpack it"),
    ):
        (tmp_path / name).write_bytes(workbook(tmp_path / "w", "rows.csv") if content is None else content.encode())
        with pytest.raises(DataError, match=rf"{name} has the unknown extension '\.\w+'\. .*{words}"):
            load_rows(str(tmp_path / name))
    with pytest.raises(DataError, match=r"a\.xlsx has the unknown extension '\.xlsx'\. It is an Excel workbook"):
        load_rows(str(tmp_path / "a.xlsx"))


def test_hidden_files_are_no_data_but_any_folder_is(tmp_path):
    line = '{"a": 1}\n'
    folder = put(tmp_path / "_export", {"a.jsonl": line, ".a.jsonl": "x", "_SUCCESS": "", "dataset_info.json": "{}"})
    assert read(folder) == [{"a": 1}]
    hive = put(
        tmp_path / ".hive", {"y=1/a.jsonl": line, "y=1/_tmp/b.jsonl": "x", "y=1/.ipynb_checkpoints/a.jsonl": "x"}
    )
    assert read(hive) == [{"a": 1, "y": 1}]


def test_what_the_remedy_is(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    for orient in ("columns", "index", "split"):
        frame.to_json(tmp_path / "a.json", orient=orient)
        with pytest.raises(DataError, match=r"a\.json is one object of lists or objects .*orient='records'"):
            load_rows(str(tmp_path / "a.json"))
    frame.to_json(tmp_path / "a.json", orient="records")
    assert len(read(tmp_path / "a.json")) == 2
    (tmp_path / "a.csv").write_text("hello,1\nbye,0\n")
    with pytest.raises(
        DataError, match=r"(?s)missing  text_column: 'text'.*If the file has no header, name its columns"
    ):
        load_labelled(str(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b\.jsonl' does not exist\. It is a link to a file that is not there"):
        load_rows(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet"])
def test_files_that_may_not_be_read(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("gzip.open", refuse)
    with pytest.raises(DataError, match=rf"{name} cannot be read: Permission denied"):
        load_rows(str(tmp_path / name))


def test_formats_that_do_not_fit_the_file(tmp_path):
    put(tmp_path, {"a.parquet": pa.table({"a": [1]})})
    with pytest.raises(DataError, match="only text files have an encoding"):
        load_rows(str(tmp_path / "a.parquet"), text_format=TextFormat(encoding="cp1252"))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet\.gz: a \.gz file around a parquet file: unpack it"):
        load_rows(str(tmp_path / "a.parquet.gz"))
    for content in ("\n\n", "\ufeff"):
        (tmp_path / "a.csv").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.csv is empty"):
            load_rows(str(tmp_path / "a.csv"))
