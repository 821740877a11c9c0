"""`rlkd evaluate` of classifiers of several labels, of numbers and of words, against transformers' forward; `rlkd
predict` of those that it does not write.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from rlkd.cli.main import main
from rlkd.report.reading import read_side_by_side
from tiny import TAGS, classifier_tokenizer, first_tokens, save_pretrained, tagged_rows, tiny_classifier
from tiny import tiny_tagger as tagger

TEXTS = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "gh"]
MULTI, REGRESSION, TOKENS = "multi_label_classification", "regression", "token_classification"
LABELS = [[k for k in range(3) if "aeg"[k] in text] if i % 5 else None for i, text in enumerate(TEXTS)]
NUMBERS = [(i % 4) / 2 if i % 5 else None for i in range(len(TEXTS))]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    several = tiny_classifier(labels=3)
    several.config.problem_type = MULTI
    several.config.id2label, several.config.label2id = dict(enumerate("aeg")), {name: i for i, name in enumerate("aeg")}
    number = tiny_classifier(labels=1)
    number.config.problem_type = REGRESSION
    for name, model in {MULTI: several, REGRESSION: number, TOKENS: tagger()}.items():
        save_pretrained(tmp_path / name, model, classifier_tokenizer())
    for name, labels in {MULTI: LABELS, REGRESSION: NUMBERS}.items():
        rows = [{"note": text, "gold": gold} for text, gold in zip(TEXTS, labels, strict=True)]
        write(tmp_path / f"{name}.jsonl", rows)
    tagged = [{"note": row["words"], "gold": [TAGS[k] for k in row["label"]]} for row in tagged_rows(20)]
    write(tmp_path / f"{TOKENS}.jsonl", [*tagged, {"note": ["a"], "gold": None}])
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(capsys, command, kind, *words):
    code = 0
    given = ["--dataset", f"{kind}.jsonl", "--input-column", "note", *words]
    try:
        main([command, kind, *given])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def evaluated(capsys, kind, *words):
    options = ("--reference-column", "gold", "--out", f"runs/{kind}", "--json", *words)
    code, out, err = run(capsys, "evaluate", kind, *options)
    assert code == 0, err
    lines = [json.loads(line) for line in Path(f"runs/{kind}/held_out.jsonl").read_text().splitlines()]
    return json.loads(out), lines


def forward(model, texts):
    tokenizer = classifier_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer([text], return_tensors="pt")).logits[0].numpy() for text in texts]


def test_several_labels(folder, capsys):
    from transformers import AutoModelForSequenceClassification

    found, lines = evaluated(capsys, MULTI)
    kept = [(text, gold) for text, gold in zip(TEXTS, LABELS, strict=True) if gold is not None]
    logits = forward(AutoModelForSequenceClassification.from_pretrained(MULTI), [text for text, _ in kept])
    guess = np.array(logits) > 0
    true = np.array([[k in gold for k in range(3)] for _, gold in kept])
    assert found["rows"] == len(kept)
    assert found["numbers"] == pytest.approx({
        "micro_f1": f1_score(true, guess, average="micro"),
        "macro_f1": f1_score(true, guess, average="macro", zero_division=0),
        "subset_accuracy": accuracy_score(true, guess),
    })  # fmt: skip
    assert [one["rows"] for one in found["classes"]] == true.sum(0).tolist()
    assert [one["predicted"] for one in found["classes"]] == guess.sum(0).tolist()
    assert [line["predicted"] for line in lines] == [np.flatnonzero(row).tolist() for row in guess]
    assert {"confusion", "ece", "commonest"}.isdisjoint(found)
    # The same labels as text.
    names = ["" if gold is None else ";".join("aeg"[k] for k in gold) or "?" for gold in LABELS]
    rows = [f"{text},{name}" for text, name in zip(TEXTS, names, strict=True) if name not in ("", "?")]
    Path("rows.csv").write_text("note,gold\n" + "\n".join(rows) + "\n")
    again, _ = evaluated(capsys, MULTI, "--dataset", "rows.csv", "--label-separator", ";", "--overwrite")
    labelled = [bool(row.any()) for row in true]
    assert again["numbers"]["micro_f1"] == pytest.approx(f1_score(true[labelled], guess[labelled], average="micro"))


def test_numbers(folder, capsys):
    from transformers import AutoModelForSequenceClassification

    found, lines = evaluated(capsys, REGRESSION)
    kept = [(text, gold) for text, gold in zip(TEXTS, NUMBERS, strict=True) if gold is not None]
    outputs = np.array(forward(AutoModelForSequenceClassification.from_pretrained(REGRESSION), [t for t, _ in kept]))
    true = np.array([gold for _, gold in kept])
    assert found["numbers"] == pytest.approx({
        "pearson": stats.pearsonr(outputs[:, 0], true)[0], "spearman": stats.spearmanr(outputs[:, 0], true)[0],
        "mean_squared_error": np.square(outputs[:, 0] - true).mean(),
    }, rel=1e-4)  # fmt: skip
    assert [line["predicted"] for line in lines] == pytest.approx(outputs[:, 0], rel=1e-4)
    low, high = found["intervals"]["mean_squared_error"]
    assert low < found["numbers"]["mean_squared_error"] < high
    assert "classes" not in found
    code, out, _ = run(capsys, "evaluate", REGRESSION, "--reference-column", "gold", "--out", "runs/again")
    assert (code, "pearson" in out, "each class" in out) == (0, True, False)
    assert len(read_side_by_side([Path(f"runs/{REGRESSION}"), Path("runs/again")])) == 2


def test_words(folder, capsys):
    from seqeval.metrics import f1_score as entity_f1

    found, lines = evaluated(capsys, TOKENS, "--max-input-tokens", "8")
    data = tagged_rows(20)
    guesses = []
    for row, logits in zip(data, forward(tagger(), [" ".join(row["words"]) for row in data]), strict=True):
        if len(logits) > 8:  # read with the end cut off
            ids = classifier_tokenizer()(" ".join(row["words"]), truncation=True, max_length=8, return_tensors="pt")
            with torch.no_grad():
                logits = tagger()(**ids).logits[0].numpy()
        guesses.append([TAGS[0] if k is None else TAGS[logits[k].argmax()] for k in first_tokens(row, 8)])
    true = [[TAGS[k] for k in row["label"]] for row in data]
    cut = sum(k is None for row in data for k in first_tokens(row, 8))
    words = sum(len(row["words"]) for row in data)
    assert [(line["label"], line["predicted"]) for line in lines] == list(zip(true, guesses, strict=True))
    right = sum(a == b for row in zip(true, guesses, strict=True) for a, b in zip(*row, strict=True))
    assert found["numbers"]["entity_f1"] == pytest.approx(entity_f1(true, guesses)) != 0
    assert found["numbers"]["token_accuracy"] == pytest.approx(right / words)
    assert [one["label"] for one in found["classes"]] == ["V", "Z"]
    assert found["warnings"] == [
        f"{cut} of {words} words are not read (beyond 8 tokens, or without a token), and are predicted as O"
    ]
    code, out, _ = run(capsys, "evaluate", TOKENS, "--reference-column", "gold", "--out", "runs/again")
    assert (code, "each type of entity" in out) == (0, True)


@pytest.mark.parametrize(
    ("command", "kind", "words", "said"),
    [
        ("evaluate", TOKENS, ["--reference-column", "gold", "--pair-column", "gold"], "--pair-column has no effect"),
        ("evaluate", REGRESSION, ["--reference-column", "gold", "--label-separator", ";"], "--label-separator has no"),
        ("evaluate", MULTI, ["--reference-column", "note"], "not a list of labels"),
        ("evaluate", TOKENS, ["--reference-column", "note"], "labels not in the label set"),
        ("predict", MULTI, [], "and one of several labels is wanted here"),
        ("predict", REGRESSION, [], "and one of several labels is wanted here"),
        ("predict", TOKENS, [], "and one of several labels is wanted here"),
    ],
)
def test_mistakes_are_named_before_weights_load(folder, capsys, monkeypatch, command, kind, words, said):
    monkeypatch.setattr("rlkd.jobs.classifiers.load_pretrained", None)
    code, _, err = run(capsys, command, kind, *words, "--out", "runs/x")
    assert (code in (2, 3), said in err) == (True, True), err


def test_one_output_that_says_nothing_is_taken_for_a_number(folder, capsys, caplog):
    save_pretrained("plain", tiny_classifier(labels=1), classifier_tokenizer())
    main_args = ["--dataset", f"{REGRESSION}.jsonl", "--input-column", "note", "--reference-column", "gold"]
    with pytest.raises(SystemExit):
        main(["evaluate", "plain", *main_args, "--out", "runs/plain", "--quiet"])
    assert "one output and no problem_type: it is taken for a number" in caplog.text
