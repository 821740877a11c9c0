"""Labelled rows from local tables and, by name, from the hub; label sets, submissions, and what is refused."""

import csv
import json

import datasets
import pytest

from rlkd.data import glue
from rlkd.data.glue import (
    TASKS,
    TableLayout,
    find_task,
    load_labelled,
    load_task,
    write_submission,
)
from rlkd.data.label_columns import find_labels, label_indices
from rlkd.errors import ConfigError, DataError
from rlkd.evaluation.problems import CLASSIFICATION_METRICS

ROWS = [("good film", "yes"), ("a, b", "no"), ('he said "no"', "yes")]


def write(path, rows, header=("text", "label")):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_local_tables(tmp_path, suffix):
    source = write(tmp_path / f"data.{suffix}", ROWS)
    rows = load_labelled(source, labels=("no", "yes"))
    assert rows == [{"text": text, "text_pair": None, "label": int(label == "yes")} for text, label in ROWS]
    unlabelled = load_labelled(source, TableLayout(label=None))
    assert [row["label"] for row in unlabelled] == [None] * 3


def test_pairs(tmp_path):
    source = write(tmp_path / "data.csv", [("a", "b", 0), ("c", "d", 1)], ("premise", "hypothesis", "label"))
    rows = load_labelled(source, TableLayout("premise", pair="hypothesis"), labels=("0", "1"))
    assert rows == [{"text": "a", "text_pair": "b", "label": 0}, {"text": "c", "text_pair": "d", "label": 1}]


def test_label_sets_are_found():
    assert find_labels(["b", "a", None, "b", ""]) == ("a", "b")
    assert find_labels([2, 0, -1]) == ("0", "1", "2")
    assert find_labels([5, 1, 3]) == ("1", "2", "3", "4", "5")
    assert find_labels([True, False]) == ("False", "True")


def test_labels_by_name_or_index_and_hidden_ones():
    assert label_indices(["pos", 0, 1, -1, None, ""], ("neg", "pos"), "x") == [1, 0, 1, None, None, None]
    # A name that looks like a number is the name: scores from 1 to 5.
    assert label_indices([1, 5], ("1", "2", "3", "4", "5"), "x") == [0, 4]
    with pytest.raises(DataError, match=r"not in the label set: 0 in rows 1. Allowed: 1, 2, 3.$"):
        label_indices([1, 0], ("1", "2", "3"), "x")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_read_their_own_columns(name, monkeypatch):
    task, asked = TASKS[name], {}
    columns = {task.layout.text: ["one", "two"], task.layout.label: [len(task.labels) - 1, -1]}
    if task.layout.pair:
        columns[task.layout.pair] = ["three", "four"]

    def load(source, where, **options):
        asked.update(options, **where, source=source)
        return datasets.Dataset.from_dict(columns), list(columns)

    monkeypatch.setattr(glue, "load_table", load)
    first, second = load_task(name, task.dev_splits[0], limit=2)
    pair = "three" if task.layout.pair else None
    assert first == {"text": "one", "text_pair": pair, "label": len(task.labels) - 1}
    hidden = task.problem_type != "regression"  # -1 is a number like any other, except in a test split
    assert second["label"] == (None if hidden else -1.0)
    assert load_task(name, "test", limit=2)[1]["label"] is None
    load_task(name, task.dev_splits[0], limit=2)
    assert (asked["source"], asked["subset"], asked["split"]) == (task.source, task.subset, task.dev_splits[0])
    assert set(task.metrics) <= CLASSIFICATION_METRICS.keys()


# GLUE's own files: task -> (training file, test file, rows of the training file)
RAW = {
    "cola": (
        "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThe \"more.\n",
        'index\tsentence\n0\tBill "sings.\n',
        [("Our friends won't buy this.", None, 1), ('The "more.', None, 0)],
    ),
    "sst2": (
        'sentence\tlabel\nhide new secretions \t0\n" too deep \t1\n',
        "index\tsentence\n0\tuneasy\n",
        [("hide new secretions ", None, 0), ('" too deep ', None, 1)],
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tHe said " yes .\tYes , he said .\n',
        "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\ta\tb\n",
        [('He said " yes .', "Yes , he said .", 1)],
    ),
    "qqp": (
        'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy "?\tHow?\t0\n',
        "id\tquestion1\tquestion2\n0\ta\tb\n",
        [('Why "?', "How?", 0)],
    ),
    "qnli": (
        'index\tquestion\tsentence\tlabel\n0\tWhen?\tIn "1800.\tnot_entailment\n',
        "index\tquestion\tsentence\n0\ta\tb\n",
        [("When?", 'In "1800.', 1)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        '0\tcaptions\tMSRvid\t2012\t1\tn\tn\tA "plane.\tA jet.\t3.800\n'
        "1\tcaptions\tMSRvid\t2012\t1\tn\tn\tOne.\tTwo.\t5.000\n",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "0\tcaptions\tx\t2012\t1\tn\tn\ta\tb\n",
        [('A "plane.', "A jet.", 3.8), ("One.", "Two.", 5.0)],
    ),
    "rte": (
        'index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo ".\tentailment\n',
        "index\tsentence1\tsentence2\n0\ta\tb\n",
        [("One.", 'Two ".', 0)],
    ),
    "mnli": (
        "index\tpromptID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        '0\t5\tfiction\t(ROOT)\tOne.\tTwo ".\tneutral\tcontradiction\n',
        "index\tpromptID\tgenre\tsentence1_parse\tsentence1\tsentence2\n0\t5\tfiction\t(ROOT)\ta\tb\n",
        [("One.", 'Two ".', 2)],
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_the_files_that_glue_distributes(tmp_path, name):
    train, test, expected = RAW[name]
    (tmp_path / "train.tsv").write_text(train)
    (tmp_path / "test.tsv").write_text(test)
    rows = load_task(name, file=str(tmp_path / "train.tsv"))
    assert [(row["text"], row["text_pair"], row["label"]) for row in rows] == expected
    (row,) = load_task(name, TASKS[name].submissions[0][0], file=str(tmp_path / "test.tsv"))
    assert row["label"] is None
    assert row["text"].startswith(("a", "Bill", "uneasy"))


def test_other_files_of_a_task_have_the_hubs_columns(tmp_path):
    source = write(tmp_path / "mnli.jsonl", [("One.", "Two.", 2)], ("premise", "hypothesis", "label"))
    assert load_task("mnli", file=source) == [{"text": "One.", "text_pair": "Two.", "label": 2}]
    source = write(tmp_path / "trec.tsv", [('"How" many?', 5)], ("text", "coarse_label"))
    assert load_task("trec6", file=source) == [{"text": '"How" many?', "text_pair": None, "label": 5}]


def test_files_of_a_task_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(RAW["cola"][1])
    with pytest.raises(DataError, match=r"a\.tsv:1 has 2 cells, columns name 4 \(source, label, star, sentence\)"):
        load_task("cola", "validation", file=str(path))
    path.write_text(RAW["cola"][0])
    with pytest.raises(DataError, match=r"a\.tsv:1 must name each column once.*If the file has no header"):
        load_task("cola", "test", file=str(path))
    path.write_text(RAW["rte"][1])
    with pytest.raises(DataError, match="missing  label_column: 'label'"):
        load_task("rte", file=str(path))
    path.write_text(RAW["rte"][0].replace("entailment", "maybe"))
    with pytest.raises(DataError, match=r"labels not in the label set: 'maybe' in rows 0. Allowed: entailment"):
        load_task("rte", file=str(path))
    path.write_text(RAW["qqp"][0] + "half a line\n")
    with pytest.raises(DataError, match=r"a\.tsv:3 has 1 cells, the header has 6"):
        load_task("qqp", file=str(path))
    assert len(load_task("qqp", file=str(path), on_bad_row="skip")) == 1
    with pytest.raises(DataError, match=r"b\.tsv' does not exist. Did you mean 'a\.tsv'"):
        load_task("rte", file=str(tmp_path / "b.tsv"))


def test_tables_without_a_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('yes\tsay "hi\nno\tb\n')
    rows = load_labelled(str(path), TableLayout("t", "l", columns=("l", "t"), quoted=False), labels=("no", "yes"))
    assert rows == [{"text": 'say "hi', "text_pair": None, "label": 1}, {"text": "b", "text_pair": None, "label": 0}]


def test_submissions_are_as_the_server_wants_them(tmp_path):
    by_number = write_submission(tmp_path, "sst2", "test", [1, 0])
    assert (by_number.name, by_number.read_text()) == ("SST-2.tsv", "index\tprediction\n0\t1\n1\t0\n")
    by_name = write_submission(tmp_path, "mnli", "test_mismatched", [2, 0])
    assert by_name.name == "MNLI-mm.tsv"
    assert by_name.read_text() == "index\tprediction\n0\tcontradiction\n1\tentailment\n"
    with pytest.raises(ConfigError, match=r"split = 'test' of task 'mnli' is not submitted: allowed are test_matched"):
        write_submission(tmp_path, "mnli", "test", [0])


def test_what_cannot_be_read_is_named(tmp_path):
    source = write(tmp_path / "data.csv", [*ROWS, ("x", "maybe")])
    with pytest.raises(DataError, match=r"text_column: 'txt'.*Did you mean 'text'"):
        load_labelled(source, TableLayout("txt"), labels=("no", "yes"))
    with pytest.raises(DataError, match=r"not in the label set: 'maybe' in rows 3. Allowed: no, yes, or 0 to 1"):
        load_labelled(source, labels=("no", "yes"))
    with pytest.raises(DataError, match="pair_column: 'other'"):
        load_labelled(source, TableLayout(pair="other", label=None))
    holes = tmp_path / "holes.jsonl"
    holes.write_text('{"text": "a", "label": "no"}\n{"label": "yes"}')
    with pytest.raises(DataError, match="rows 1: column 'text' is empty"):
        load_labelled(str(holes), labels=("no", "yes"))
    with pytest.raises(ConfigError, match=r"task = 'sst-2': allowed are 'sst2'.*Did you mean 'sst2'"):
        find_task("sst-2")
