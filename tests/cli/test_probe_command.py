"""`rlkd probe` end to end, and what it refuses before any weights load."""

import json
import random

import pytest
from transformers import AutoModel
from typer.testing import CliRunner

from rlkd.cli.main import app
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.encoders import representations
from tiny import CLASSIFIER_WORDS, classifier_tokenizer, save_pretrained, tiny_classifier, tiny_t5, tiny_tokenizer

LETTERS = CLASSIFIER_WORDS[4:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    save_pretrained(folder / "teacher", tiny_classifier(layers=2, width=32), classifier_tokenizer())
    save_pretrained(folder / "student", tiny_classifier("distilbert", layers=1, width=32), classifier_tokenizer())
    save_pretrained(folder / "bare", AutoModel.from_pretrained(folder / "teacher"), classifier_tokenizer())
    draw = random.Random(0)
    rows = [(draw.choice(LETTERS), draw.choice(["", " x", " y z"])) for _ in range(400)]
    lines = [f"{first}{rest}\t{'early' if first < 'k' else 'late'}" for first, rest in rows]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *lines[:240]]))
    (folder / "test.tsv").write_text("\n".join(["text\tlabel", *lines[240:]]))
    names = ["tr"] * 200 + ["va"] * 40 + ["te"] * 160
    swapped = ("\t".join(reversed(line.split("\t"))) for line in lines)
    (folder / "task.txt").write_text("\n".join(f"{n}\t{line}" for n, line in zip(names, swapped, strict=True)))
    return folder


@pytest.fixture
def probe(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*arguments):
        result = CliRunner().invoke(app, ["probe", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    return run


SHORT = ("--max-length", "20")


def test_models_side_by_side(probe):
    found = json.loads(probe("teacher", "student", "bare", "--task-file", "task.txt", "--json", *SHORT))
    assert (found["labels"], found["rows"]) == (["early", "late"], {"train": 200, "validation": 40, "test": 160})
    teacher, student, bare = found["models"]
    assert [score["layer"] for score in teacher["layers"]] == [0, 1, 2]
    assert [score["layer"] for score in student["layers"]] == [0, 1]
    assert bare["layers"] == teacher["layers"]  # the head does not matter
    majority = found["majority"]
    for model in (teacher, student):
        # [CLS] of the embeddings is the same in every row; their mean knows the first letter.
        assert model["layers"][0]["accuracy"] == majority["accuracy"]
        assert model["embeddings_mean"]["low"] > majority["high"]
        assert all(score["low"] <= score["accuracy"] <= score["high"] for score in model["layers"])


def test_tables_pools_and_layers(probe):
    tables = ("--train", "train.tsv", "--test", "test.tsv", *SHORT)
    found = json.loads(probe("teacher", *tables, "--pool", "mean", "--layers", "2,0", "--json", "--batch-size", "7"))
    assert found["rows"] == {"train": 216, "validation": 24, "test": 160}
    (model,) = found["models"]
    assert [score.pop("layer") for score in model["layers"]] == [0, 2]
    assert model["layers"][0] == model["embeddings_mean"]
    small = json.loads(
        probe("teacher", *tables, "--layers", "1", "--json", "--limit", "50", "--validation", "test.tsv")
    )
    assert small["rows"] == {"train": 50, "validation": 50, "test": 50}


def test_the_table_has_a_row_for_each_layer_and_baseline(probe):
    shown = probe("teacher", "student", "--task-file", "task.txt", *SHORT)
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["majority", "embeddings, mean", "0, cls", "1, cls", "2, cls"]
    assert all(row[1] and row[2] for row in rows[:-1])
    assert rows[-1][2] == ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["teacher"], ConfigError, "give either --train and --test"),
        (["teacher", "--train", "train.tsv"], ConfigError, "give either --train and --test"),
        (["teacher", "--task-file", "task.txt", "--test", "test.tsv"], ConfigError, "give either --train and --test"),
        (["teacher", "--task-file", "task"], DataError, "'task' is not a file"),
        (["teacher", "--train", "trai.tsv", "--test", "test.tsv"], DataError, r"Did you mean 'train\.tsv'"),
        (["teacher", "--task-file", "train.tsv"], DataError, r"train\.tsv:1 has 2 cells"),
        (["teacher", "--task-file", "task.txt", "--layers", "1;2"], ConfigError, "--layers '1;2': allowed are all"),
        (["teacher", "--task-file", "task.txt", "--layers", "-1"], ConfigError, "--layers '-1': allowed are all"),
        (
            ["teacher", "student", "--task-file", "task.txt", "--layers", "0,2", *SHORT],
            ConfigError,
            "--layers 2: model 'student' has the layers 0 to 1",
        ),
        (
            ["teacher", "--task-file", "task.txt"],
            ConfigError,
            r"max_length = 128: the model 'teacher' \('bert'\) has 40 positions",
        ),
        (["teacher", "t5", "--task-file", "task.txt", *SHORT], ModelError, "'t5' .* is not an encoder-only model"),
        (["teacher", "nothing", "--task-file", "task.txt", *SHORT], ModelError, "'nothing' is neither a local folder"),
        (["large", "--task-file", "task.txt", *SHORT], ModelError, "ids up to"),
        (["unpadded", "--task-file", "task.txt", *SHORT], ModelError, "its tokenizer has no padding token"),
    ],
)  # fmt: skip
def test_refused_before_weights_load(folder, monkeypatch, arguments, error, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(representations, "load_encoder", None)
    if not (folder / "t5").exists():
        save_pretrained(folder / "t5", tiny_t5())
        save_pretrained(folder / "large", tiny_classifier(layers=1), tiny_tokenizer())
        unpadded = classifier_tokenizer()
        unpadded.pad_token = None
        save_pretrained(folder / "unpadded", tiny_classifier(layers=1), unpadded)
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["probe", *arguments], catch_exceptions=False)
