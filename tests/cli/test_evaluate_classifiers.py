"""`rlkd evaluate` of a classifier, against transformers' forward and scikit-learn."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support
from transformers import AutoModelForSequenceClassification

from rlkd.cli.main import main
from rlkd.report.reading import read_side_by_side
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

TEXTS = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "gh"]
BASIC = ("--dataset", "rows.csv", "--input-column", "note", "--reference-column", "gold")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        model = tiny_classifier(seed=seed)
        model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
        save_pretrained(tmp_path / f"c{seed}", model, classifier_tokenizer())
    rows = [f"{text},{text[::-1]},{('no', 'yes', '')[i % 7 % 3]}" for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.csv").write_text("note,other,gold\n" + "\n".join(rows) + "\n")
    return tmp_path


def run(capsys, *words):
    code = 0
    try:
        main(["evaluate", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("pair", [False, True])
def test_numbers_are_those_of_transformers_and_scikit_learn(folder, capsys, caplog, pair):
    words = ("--pair-column", "other") if pair else ()
    code, out, err = run(capsys, "c0", *BASIC, *words, "--out", "runs/c0", "--json")
    assert code == 0, err
    found = json.loads(out)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("c0"), classifier_tokenizer()
    kept = [(i % 7 % 3, text) for i, text in enumerate(TEXTS) if i % 7 % 3 < 2]
    guesses = []
    for _, text in kept:
        with torch.no_grad():
            logits = model(**tokenizer(*([text, text[::-1]] if pair else [text]), return_tensors="pt")).logits
        guesses.append(int(logits.argmax()))
    true = [label for label, _ in kept]
    assert found["rows"] == len(kept)
    assert f"skipping {len(TEXTS) - len(kept)} of {len(TEXTS)} rows, which have no label" in caplog.text
    right = [guess == label for guess, label in zip(guesses, true, strict=True)]
    assert found["numbers"] == pytest.approx(
        {
            "accuracy": sum(right) / len(right),
            "f1": f1_score(true, guesses),
            "matthews": matthews_corrcoef(true, guesses),
        }
    )
    precision, recall, f1, rows = precision_recall_fscore_support(true, guesses, labels=[0, 1], zero_division=0)
    for k, one in enumerate(found["classes"]):
        assert one["label"] == ("no", "yes")[k]
        assert [one["rows"], one["precision"], one["recall"], one["f1"]] == pytest.approx(
            [rows[k], precision[k], recall[k], f1[k]]
        )
    low, high = found["intervals"]["accuracy"]
    assert low <= found["numbers"]["accuracy"] <= high
    assert found["speed"]["parameters"] == model.num_parameters()
    assert found["speed"]["texts_per_second"] > 0
    lines = [json.loads(line) for line in (folder / "runs/c0/held_out.jsonl").read_text().splitlines()]
    assert [line["predicted"] for line in lines] == guesses
    assert found == json.loads((folder / "runs/c0/evaluation.json").read_text()) | {"folder": "runs/c0"}
    assert json.loads((folder / "runs/c0/run.json").read_text())["data"]["eval"]["source"] == "rows.csv"


def test_two_classifiers_are_compared(folder, capsys):
    for name in ("c0", "c1"):
        code, out, err = run(capsys, name, *BASIC, "--out", f"runs/{name}")
        assert code == 0, err
        assert "precision" in out
    assert len(read_side_by_side([Path("runs/c0"), Path("runs/c1")])) == 2
    with pytest.raises(SystemExit) as end:
        main(["compare", "runs/c0", "runs/c1"])
    assert not end.value.code
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metric", "rouge"], "--metric has no effect: 'c0' is a classifier"),
        (["--teacher", "c1"], "--teacher has no effect"),
        (["--reference-column", "other"], "labels not in the label set"),
        (["--input-column", "nota"], "Did you mean 'note'"),
        (["--max-input-tokens", "99"], "max_length = 99"),
    ],
)
def test_mistakes_are_named_before_weights_load(folder, capsys, monkeypatch, words, said):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.jobs.classifiers.load_pretrained", weights)
    code, _, err = run(capsys, "c0", *BASIC, *words, "--out", "runs/x")
    assert code in (2, 3)
    assert said in err
    assert not (folder / "runs/x").exists()


def test_a_classifier_is_scored_against_labels_only(folder, capsys):
    code, _, err = run(capsys, "c0", *BASIC[:4], "--out", "runs/x")
    assert (code, "--reference-column is not set: name the column with the right label" in err) == (2, True)
