"""Columns of several labels or of numbers, in every format, and what is refused in them."""

import csv
import json

import datasets
import pytest

from rlkd.data.glue import TableLayout, load_labelled
from rlkd.data.label_columns import find_labels, label_sets, numbers
from rlkd.data.splits import split_off
from rlkd.errors import DataError

MULTI, REGRESSION = "multi_label_classification", "regression"


def write(path, values):
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(rows)
    return str(path)


def labels(path, values, kind, names=(), separator=None):
    layout = TableLayout(problem_type=kind, separator=separator)
    return [row["label"] for row in load_labelled(write(path, values), layout, labels=names)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_names_or_of_indices(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    assert labels(path, [["joy", "fear"], [], None, ["anger"]], MULTI, ("anger", "fear", "joy")) == [
        [1, 2],
        [],
        None,
        [0],
    ]
    assert labels(path, [[2, 0], [1]], MULTI, ("anger", "fear", "joy")) == [[0, 2], [1]]
    assert labels(path, [[3, 1], [2]], MULTI, ("1", "2", "3")) == [[0, 2], [1]]  # names are numbers


def test_names_of_a_data_set_decide_not_its_numbers(tmp_path):
    names = datasets.ClassLabel(names=["fear", "joy"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(names)})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[0], [0, 1]]}, features=features).to_parquet(
        str(tmp_path / "x.parquet")
    )
    rows = load_labelled(str(tmp_path / "x.parquet"), TableLayout(problem_type=MULTI), labels=("joy", "fear"))
    assert [row["label"] for row in rows] == [[1], [0, 1]]


def test_names_with_a_separator(tmp_path):
    """An empty cell has none of the labels: text files have no other way to say so."""
    names = ("anger", "fear", "joy")
    assert labels(tmp_path / "x.csv", ["joy; fear", "", "anger;"], MULTI, names, ";") == [[1, 2], [], [0]]
    assert labels(tmp_path / "x.csv", ["2|0", "1", ""], MULTI, names, "|") == [[0, 2], [1], []]
    assert labels(tmp_path / "y.csv", ["2", "1", "0"], MULTI, names, "|") == [
        [2],
        [1],
        [0],
    ]  # a column of whole numbers
    assert labels(tmp_path / "x.jsonl", ["joy,fear", "", None], MULTI, names, ",") == [[1, 2], [], None]


def test_label_sets_are_found(tmp_path):
    rows = datasets.load_dataset("json", data_files=write(tmp_path / "x.jsonl", [["b"], ["c", "a"], []]), split="train",
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    found = label_sets(rows, "label", "x")
    assert find_labels(name for row in found for name in row) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("values", "separator", "message"),
    [
        (["a", "b"], None, r"row 0: column 'label' contains 'a', not a list .* set label_separator"),
        ([["a", "a"]], None, "row 0: column 'label' gives a label twice"),
        ([[True]], None, "row 0: column 'label' has the label True"),
        ([["a"], [""]], None, "row 1: column 'label' has the label ''"),
        ([["a"], ["a", None]], None, "row 1: column 'label' has the label None"),
        ([["a"], ["a", "d"]], None, r"labels not in the label set: 'd' in rows 1. Allowed: a, b"),
        ([[1, 0], [0, 0]], None, r"row 1: column 'label' gives a label twice: \[0, 0\].* vector of 0 and 1"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(tmp_path, values, separator, message):
    with pytest.raises(DataError, match=message):
        labels(tmp_path / "x.jsonl", values, MULTI, ("a", "b"), separator)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_numbers(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    assert labels(path, [3.5, None, -1, 0], REGRESSION) == [3.5, None, -1.0, 0.0]
    found = labels(path, [3, 5, 0], REGRESSION)  # whole numbers are numbers, not labels
    assert found == [3.0, 5.0, 0.0]
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize("value", ["high", "nan", "inf", "1_000", "3,5", True, [1.0]])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(DataError, match=r"'x', row 1: column 'score' contains .*, not a finite number"):
        numbers([1.0, value], "score", "x")


def test_rows_are_split_by_their_rarest_label_and_numbers_by_chance():
    rows = [{"text": f"t{i}", "text_pair": None, "label": [0, 1] if i % 10 == 0 else [0]} for i in range(100)]
    rest, part = split_off(rows, 0.2)
    assert (len(part), sum(1 in row["label"] for row in part)) == (20, 2)
    assert [row for row in rows if row in part] == part
    assert split_off(rows, 0.2) == (rest, part)
    without = [{**row, "label": []} for row in rows]
    assert len(split_off(without, 0.1)[1]) == 10
    scored = [{**row, "label": i / 7} for i, row in enumerate(rows)]
    assert len(split_off(scored, 0.1)[1]) == 10
