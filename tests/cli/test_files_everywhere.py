"""Every command and recipe reads a file that needs all of it: no header, Excel's delimiter, Windows' encoding, gzip."""

import gzip
import json
import shutil

import pytest

from rlkd.cli.main import main
from rlkd.cli.probe import _layout, _read
from rlkd.jobs.encoder_data import LabelledDataArguments, load_labelled_data
from rlkd.jobs.setup import DataArguments, load_data
from rlkd.labels.store import load_pseudolabels
from tiny import save_pair

TEXTS = ["é, a", "b; ü", "a b", "c", "£ d", "e"]
FORMAT = {"delimiter": "semicolon", "encoding": "cp1252"}
TEMPLATE = (
    "dataset: x\ntemplates:\n  1: !Template\n    answer_choices: null\n    id: '1'\n    jinja: '{{text}} ||| {{y}}'\n\
    metadata: {original_task: true}\n    name: t\n"
)


@pytest.fixture
def source(tmp_path):
    lines = "".join(f'"{text}";{i % 2};x{i}\r\n' for i, text in enumerate(TEXTS))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(lines.encode("cp1252")))
    (tmp_path / "t.yaml").write_text(TEMPLATE)
    return str(tmp_path / "rows.csv.gz")


def flags(columns="text,y,other") -> list[str]:
    return [*(part for name, value in FORMAT.items() for part in (f"--{name}", value)), "--columns", columns]


def run(*command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(command))
    assert end.value.code in (0, None)


def test_commands_on_templates(source, tmp_path, capsys):
    spec = f"{tmp_path}/t.yaml"
    run("prompts", "render", spec, "--dataset", source, *flags(), "--limit", "9", "--json")
    assert [row["input"] for row in json.loads(capsys.readouterr().out)] == TEXTS
    run("prompts", "lint", spec, "--dataset", source, *flags())
    assert "0 errors" in capsys.readouterr().out


def test_labels_and_rewards(source, tmp_path, capsys):
    teacher, _ = save_pair(tmp_path)
    common = ["--teacher", teacher, "--dataset", source, "--input-column", "text", *flags(), "--max-new-tokens", "2"]
    run("generate-pseudolabels", *common, "--engine", "torch", "--quiet", "--out", str(tmp_path / "out"))
    assert load_pseudolabels(tmp_path / "out", statuses=None)["student_input"] == TEXTS
    capsys.readouterr()
    run("inspect-rewards", *common, "--templates", f"{tmp_path}/t.yaml", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert sorted({sample["input"] for sample in shown["samples"]}) == sorted(TEXTS)


def test_recipes_and_probes(source, tmp_path):
    settings = FORMAT | {"columns": ["text", "y", "other"]}
    held_out = shutil.copy(source, tmp_path / "held_out.csv.gz")
    data = DataArguments(
        dataset=source,
        eval_dataset=str(held_out),
        input_column="text",
        reference_column=None,
        templates=[f"{tmp_path}/t.yaml"],
        **settings,
    )
    train, evaluation, *_ = load_data(data)
    assert [e.student_input for e in train] == [e.student_input for e in evaluation] == TEXTS
    (tmp_path / "dev.jsonl").write_text('{"text": "é", "y": 1}\n')  # what is said of the one file is not meant for this
    labelled = load_labelled_data(
        LabelledDataArguments(train_file=source, dev_file=f"{tmp_path}/dev.jsonl", label_column="y", **settings)
    )
    assert [row["text"] for row in labelled.train] == TEXTS
    layout = _layout(("text", "y", None), *FORMAT.values(), "text,y,other")
    assert [row["text"] for row in _read(source, source, source, None, layout, None, 0).test] == TEXTS


def test_bad_rows_can_be_skipped_in_recipes(tmp_path):
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"{c},{i % 2}\n" for i, c in enumerate("abcd")) + "x,1,2\n"
    )
    settings = {"on_bad_row": "skip"}
    labelled = load_labelled_data(
        LabelledDataArguments(train_file=f"{tmp_path}/a.csv", dev_file=f"{tmp_path}/a.csv", **settings)
    )
    assert len(labelled.train) == 4
    shutil.copy(tmp_path / "a.csv", tmp_path / "b.csv")
    data = {"dataset": f"{tmp_path}/a.csv", "eval_dataset": f"{tmp_path}/b.csv", "input_column": "text"}
    (tmp_path / "t.yaml").write_text(
        TEMPLATE.replace("{{text}}", "{{text}} {{ 1 // (label - 1) }}").replace("{{y}}", "x")
    )
    spec = {"templates": [f"{tmp_path}/t.yaml"], "reference_column": None}
    assert [e.student_input for e in load_data(DataArguments(**data, **spec, **settings))[0]] == ["a", "c"]


def test_one_row_that_fails_ends_no_inspection(tmp_path, capsys, caplog):
    teacher, _ = save_pair(tmp_path)
    (tmp_path / "t.yaml").write_text(TEMPLATE.replace("{{text}}", "{{text}} {{ 1 // y }}"))
    command = ["inspect-rewards", "--teacher", teacher, "--input-column", "text", "--templates", f"{tmp_path}/t.yaml"]
    command += ["--max-new-tokens", "2", "--json", "--dataset", f"{tmp_path}/a.csv"]
    (tmp_path / "a.csv").write_text("text,y\na,1\nb,0\n")
    run(*command)
    assert {sample["input"] for sample in json.loads(capsys.readouterr().out)["samples"]} == {"a"}
    assert "left out 1 of 2 rows, on which a template fails: template 't'" in caplog.text
    (tmp_path / "a.csv").write_text("text,y\nb,0\n")
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 3
    assert "cannot be rendered: ZeroDivisionError" in capsys.readouterr().err
