import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlkd.data.rows import RowStream, check_columns, check_text_column, load_rows
from rlkd.data.text import TextFormat
from rlkd.errors import ConfigError, DataError

ROWS = [
    {"text": 'He said "no", twice', "label": 0},
    {"text": "two\nlines, and a tab\there", "label": 1},
    {"text": "naïve \u2028 £ 日本", "label": 12},
]


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def quoted(delimiter: str) -> str:
    def cell(value):
        return '"' + str(value).replace('"', '""') + '"' if isinstance(value, str) else str(value)

    return "".join(f"{cell(row['text'])}{delimiter}{row['label']}\r\n" for row in ROWS)


def jsonl(rows=ROWS, end="\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def test_every_format_gives_the_same_rows(tmp_path):
    table = pa.table({"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS]})
    pq.write_table(table, tmp_path / "p.parquet")
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(table[:2], shards / "a-00000.parquet")
    pq.write_table(table[2:], shards / "a-00001.parquet")
    bom = "\ufeff"
    sources = [
        str(tmp_path / "p.parquet"),
        str(shards),
        write(tmp_path / "plain.jsonl", jsonl()),
        write(tmp_path / "windows.jsonl", bom + jsonl(end="\r\n") + "\r\n"),
        write(tmp_path / "lines.json", jsonl()),
        write(tmp_path / "array.json", bom + json.dumps(ROWS, indent=1)),
        write(tmp_path / "c.csv", bom + "text,label\r\n" + quoted(",")),
        write(tmp_path / "t.tsv", "text\tlabel\r\n" + quoted("\t")),
    ]
    for source in sources:
        rows = load_rows(source)
        assert isinstance(rows, datasets.Dataset)
        assert rows.to_list() == ROWS, source
        assert load_rows(source, limit=2).to_list() == ROWS[:2]
        assert len(load_rows(source, limit=9)) == 3


def test_csv_reads_only_whole_numbers_as_integers(tmp_path):
    rows = load_rows(write(tmp_path / "c.csv", "a,b,c,d\n1,007,1.5,\n-2,10,2,5\n"))
    assert rows.to_list() == [{"a": 1, "b": "007", "c": "1.5", "d": ""}, {"a": -2, "b": "10", "c": "2", "d": "5"}]


def test_columns_missing_in_the_first_row_are_kept(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2.5, "b": ["x"]}\n'))
    assert rows.to_list() == [{"a": 1.0, "b": None}, {"a": 2.5, "b": ["x"]}]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", "", ["a.jsonl is empty"]),
        ("a.jsonl", "\n\n", ["has no rows"]),
        ("a.csv", "text,label\n", ["has no rows"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1,}\n', ["a.jsonl:3:", "not valid JSON", '{"a": 1,}', "Fix or remove"]),
        ("a.jsonl", '{"a": 1}\n[1]\n', ["a.jsonl:2 is a JSON list", "{...}"]),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', ["a.jsonl:2 is not UTF-8 (byte 8)", "Save the file as UTF-8"]),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": null}\n{"a": "x"}\n',
            ["a.jsonl:3: column 'a' has text here but a number in ", "a.jsonl:1. Give it one type"],
        ),
        ("a.jsonl", '{"a": "\\ud800"}\n', ["column 'a'", "unpaired surrogate"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["a.json:2:7 is not valid JSON"]),
        ("a.json", '[{"a": 1}, 2]', ["entry 2 is a JSON int"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ["a.csv:3 has 3 cells, the header has 2 (a, b)"]),
        ("a.csv", "a,a\n1,2\n", ["a.csv:1 must name each column once", "If the file has no header, name its columns"]),
        ("a.csv", 'a,b\n"x" y,2\n', ["a.csv:2 is malformed", '""']),
        ("a.csv", 'a,b\n"x,2\n', ["a.csv:2 is malformed"]),
        ("a.csv", b"a,b\nx,\xe9\n", ["a.csv", "not UTF-8"]),
        ("a.parquet", "PARX", ["a.parquet is not a readable parquet file"]),
        ("a.txt", "x", ["unknown extension '.txt'", ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"]),
    ],
)
def test_bad_files_are_named_with_place_and_remedy(tmp_path, name, content, wanted):
    source = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        load_rows(source)
    for text in wanted:
        assert text in str(error.value)
    assert str(error.value).count("\n") < 24


def test_files_without_a_header_and_with_bare_quotes(tmp_path):
    names = ("text", "label")
    bare = TextFormat(columns=names, quoted=False)
    source = write(tmp_path / "a.tsv", '\ufeff"Oh", he said\t0\n"an open quote\t1\r\nplain\t0\n')
    expected = [('"Oh", he said', 0), ('"an open quote', 1), ("plain", 0)]
    assert [tuple(row.values()) for row in load_rows(source, text_format=bare)] == expected
    assert load_rows(source, text_format=bare).column_names == [*names]
    with pytest.raises(DataError, match=r"a\.tsv:1 is malformed"):
        load_rows(source, text_format=TextFormat(columns=names))
    plain = write(tmp_path / "b.csv", 'a,"b, c"\n')
    assert load_rows(plain, text_format=TextFormat(columns=("x", "y"))).to_list() == [{"x": "a", "y": "b, c"}]


def test_columns_and_quotes_that_make_no_sense(tmp_path):
    source = write(tmp_path / "a.tsv", "x\t1\ny\n")
    with pytest.raises(DataError, match=r"a\.tsv:2 has 1 cells, columns name 2 \(text, label\)\. Fix or remove it"):
        load_rows(source, text_format=TextFormat(columns=("text", "label"), quoted=False))
    for columns in ((), ("a", "a"), ("a", "")):
        with pytest.raises(ConfigError, match="must name each column once"):
            TextFormat(columns=columns)
    lines = write(tmp_path / "a.jsonl", jsonl())
    for wrong in (TextFormat(columns=("a",)), TextFormat(quoted=False), TextFormat(delimiter=";")):
        with pytest.raises(DataError, match=r"only a \.csv or \.tsv file takes columns, delimiter or quoted"):
            load_rows(lines, text_format=wrong)
        with pytest.raises(DataError, match=r"'owner/set' is a hub data set: only local text files take columns"):
            load_rows("owner/set", text_format=wrong)


def test_bad_rows_can_be_left_out_with_a_word(tmp_path, caplog):
    source = write(tmp_path / "a.tsv", "a\tb\n1\t2\nbroken\n3\t4\n")
    assert load_rows(source, on_bad_row="skip").to_list() == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert "skipped 1 bad rows; the first: " in caplog.text
    assert "a.tsv:3 has 1 cells" in caplog.text
    with pytest.raises(DataError, match="has no rows"):
        load_rows(write(tmp_path / "b.tsv", "a\tb\nbroken\n"), on_bad_row="skip")


def test_missing_files_and_wrong_arguments(tmp_path):
    source = write(tmp_path / "train.jsonl", jsonl())
    with pytest.raises(DataError, match=r"tran\.jsonl' does not exist\. Did you mean 'train\.jsonl'\?"):
        load_rows(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match=r"Folder .*nowhere does not exist"):
        load_rows(str(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(DataError, match="limit = 0"):
        load_rows(source, limit=0)
    for wrong in ({"subset": "x"}, {"revision": "main"}, {"split": "train[:3]"}):
        with pytest.raises(DataError, match="is local: it has no subset, revision or split slice"):
            load_rows(source, **wrong)


def test_an_unreachable_hub_dataset_is_a_data_error():
    with pytest.raises(DataError, match="'no-such-owner/no-such-set', subset 's', split 'dev' is neither a local path"):
        load_rows("no-such-owner/no-such-set", subset="s", split="dev")


def test_folders_with_shards_named_by_split(tmp_path):
    with pytest.raises(DataError, match=r"has no data files; it has nothing\. Allowed"):
        load_rows(str(tmp_path))
    for i, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        pq.write_table(pa.table({"n": [i]}), tmp_path / f"{name}.parquet")
    assert load_rows(str(tmp_path))["n"][:] == [0, 1]
    assert load_rows(str(tmp_path), split="test")["n"][:] == [2]
    with pytest.raises(
        DataError, match=r"no shards of split 'tests'\. Splits found: test, train\. Did you mean 'test'"
    ):
        load_rows(str(tmp_path), split="tests")
    pq.write_table(pa.table({"n": ["x"]}), tmp_path / "train-00002.parquet")
    with pytest.raises(DataError, match=re.escape("n (string)")):
        load_rows(str(tmp_path))


def test_check_columns_names_the_nearest():
    rows = datasets.Dataset.from_dict({"source": ["a"], "target": ["b"]})
    check_columns(rows, {"input_column": "source"}, "x.jsonl")
    with pytest.raises(DataError) as error:
        check_columns(rows, {"input_column": "sorce", "id_column": "id", "reference_column": "target"}, "x.jsonl")
    assert str(error.value) == (
        "'x.jsonl' lacks 2 of the requested columns.\n"
        "  missing  input_column: 'sorce'. Did you mean 'source'?\n"
        "           id_column: 'id'.\n"
        "  found    source, target\n"
        "Name one of the columns found, or rename the column in the data."
    )


def test_check_text_column():
    rows = datasets.Dataset.from_dict({"t": ["a"], "l": [["a"]], "n": [1]})
    check_text_column(rows, "t", "x")
    check_text_column(rows, "l", "x", lists=True)
    for column, lists in (("l", False), ("n", False), ("n", True)):
        with pytest.raises(DataError, match=f"column '{column}' contains .* not text"):
            check_text_column(rows, column, "x", lists=lists)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "deep.jsonl",
            b'{"a": 1}\n{"a": ' + b"[" * 200_000,
            r"deep\.jsonl:2 is nested too deeply\. Flatten or remove it",
        ),
        ("deep.json", b'[{"a": 1}, {"a": ' + b"[" * 200_000, r"deep\.json, entry 2 is nested too deeply\. Flatten"),
        (
            "late.json",
            b'[{"a": "' + b"x" * 70_000 + b'\xff"}]',
            r"late\.json is not UTF-8 \(byte \d+\)\. Save the file",
        ),
        ("head.csv", b'"a"b,c\n1,2\n', r"head\.csv:1 is malformed: "),
        (
            "huge.jsonl",
            b'{"a": 1}\n{"a": %d}\n' % 2**70,
            r"huge\.jsonl:2: column 'a' has a whole number of more than 64 bits",
        ),
    ],
)
def test_what_no_row_can_be_made_of(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name))


def test_a_file_that_changes_while_it_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "x"}\n' * 3)
    stream = RowStream(str(file))
    scan = stream.scan()
    file.write_text('{"a": "x"}\n' * 2)
    with pytest.raises(DataError, match=r"had 3 rows and now has 2: it changed during the run"):
        list(stream.blocks(scan, 2, lambda k: True))


def test_a_hub_stream_that_breaks_off(monkeypatch):
    def rows(*_, **__):
        yield {"a": "x"}
        raise ConnectionError("the line went dead")

    monkeypatch.setattr("rlkd.data.hub.load_hub", rows)
    reader = RowStream("some/name").reader
    message = r"'some/name', row 2 cannot be read: ConnectionError: the line went dead.*repeat the command to continue"
    with pytest.raises(DataError, match=message):
        list(reader.records())
