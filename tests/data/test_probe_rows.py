"""Probing rows from SentEval's files and from tables; what cannot be used is named by file and line."""

import pytest

from rlkd.data.glue import TableLayout
from rlkd.data.probe_rows import read_tables, read_task_file
from rlkd.errors import DataError

LINES = 'tr\tPAST\tHe said "no .\ntr\tWILL\tshe goes\nva\tPAST\tthey "went" .\nte\tWILL\tit is\nte\tPAST\tit was\n'


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_file_as_senteval_has_them(tmp_path):
    rows = read_task_file(write(tmp_path / "tense.txt", LINES))
    assert rows.classes == ("PAST", "WILL")
    assert [(row["text"], row["label"]) for row in rows.train] == [('He said "no .', 0), ("she goes", 1)]
    assert [row["text"] for row in rows.validation] == ['they "went" .']
    assert [row["label"] for row in rows.test] == [1, 0]
    few = read_task_file(str(tmp_path / "tense.txt"), limit=2)
    assert (len(few.train), len(few.test)) == (2, 2)
    assert len(read_task_file(write(tmp_path / "a.txt", LINES + "te\tPAST\tx\n"), limit=2).test) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES + "tr\tPAST\n", r"x\.txt:6 has 2 cells, columns name 3 \(split, label, text\)"),
        (LINES + "tr\tPAST\ta\tb\n", r"x\.txt:6 has 4 cells"),
        (LINES + "dev\tPAST\ta\n", r"x\.txt:6: split 'dev': allowed are tr, va, te"),
        (LINES + "te\tFUTURE\ta\n", r"x\.txt:6: the label 'FUTURE' never .* \(those have PAST, WILL\)"),
        (LINES + "va\tFUTURE\ta\n", r"x\.txt:6: the label 'FUTURE' never occurs"),
        (LINES + "tr\t\ta\n", r"x\.txt:6 has no label"),
        ("tr\tA\ta\ntr\tA\tb\nva\tA\tc\nte\tA\td\n", r"fewer than 2 labels \(A\)"),
        ("tr\tA\ta\ntr\tB\tb\n", r"has no rows of split 'te' \(test\)"),
        ("te\tA\ta\n", r"has no rows of split 'tr' \(train\)"),
        ("", r"x\.txt is empty"),
    ],
)  # fmt: skip
def test_task_files_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_task_file(write(tmp_path / "x.txt", lines))


def test_missing_files_and_limits(tmp_path):
    with pytest.raises(DataError, match=r"x\.txt' is not a file"):
        read_task_file(str(tmp_path / "x.txt"))
    with pytest.raises(DataError, match="limit = 0"):
        read_task_file(write(tmp_path / "y.txt", LINES), limit=0)
    train = write(tmp_path / "train.csv", "text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=r"tes\.csv' does not exist"):
        read_tables(train, str(tmp_path / "tes.csv"))


def table(n, start=0):
    return "text,label\n" + "".join(f"text {start + i},{'yes' if i % 2 else 'no'}\n" for i in range(n))


def test_tables_hold_out_a_tenth_by_seed(tmp_path):
    train, test = write(tmp_path / "train.csv", table(40)), write(tmp_path / "test.csv", table(4, 40))
    drawn = [read_tables(train, test, seed=seed) for seed in (0, 0, 1)]
    for rows in drawn:
        assert (len(rows.train), len(rows.validation), len(rows.test)) == (36, 4, 4)
        assert sorted(row["where"] for row in rows.train + rows.validation) == sorted(
            f"{train}, row {i}" for i in range(40)
        )
    assert drawn[0] == drawn[1]
    assert drawn[0].validation != drawn[2].validation
    own = read_tables(train, test, write(tmp_path / "dev.csv", table(6)))
    assert (len(own.train), len(own.validation), own.classes) == (40, 6, ("no", "yes"))


def test_pairs_and_other_columns(tmp_path):
    train = write(tmp_path / "train.tsv", "one\ttwo\ty\na\tb\t3\nc\td\t1\ne\tf\t3\n")
    rows = read_tables(train, train, train, layout=TableLayout("one", "y", "two"))
    assert [(row["text"], row["text_pair"], rows.classes[row["label"]]) for row in rows.test] == [
        ("a", "b", "3"), ("c", "d", "1"), ("e", "f", "3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (table(4), "text,label\na,maybe\n", r"test\.csv, row 0: the label 'maybe' never occurs in the training rows"),
        # Of whole numbers the gaps count too.
        ("text,label\na,0\nb,2\nc,0\nd,2\n", "text,label\na,1\n", r"row 0: the label '1' never occurs .*0, 2"),
        ("text,label\na,no\nb,\n", table(2), r"train\.csv, row 1 has no label"),
        ("text,label\na,no\nb,no\n", "text,label\na,no\n", r"fewer than 2 labels \(no\)"),
        (table(4), "txt,label\na,no\n", r"text_column: 'text'.*Did you mean 'txt'"),
        ("text,labels\na,no\n", table(2), r"label_column: 'label'.*Did you mean 'labels'"),
        (table(4) + "a,b,c\n", table(2), r"train\.csv:6 has 3 cells"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path, train, test, message):
    with pytest.raises(DataError, match=message):
        read_tables(write(tmp_path / "train.csv", train), write(tmp_path / "test.csv", test))
