"""recipes/tkd_glue.py as a user runs it: a file of two columns becomes a small classifier, and every mistake is named
before weights load.
"""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, T5Config, pipeline

from rlkd import EncoderStudentArguments, EncoderTeacherArguments, LabelledDataArguments, TKDArguments, parse_config
from rlkd.data import glue
from rlkd.evaluation.classes import class_scores
from rlkd.jobs import encoder_data
from rlkd.jobs.encoder_report import show_summary
from rlkd.models.encoders.classifiers import matched_layers
from rlkd.trainers.encoders.tkd import TKDTrainer
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = (LabelledDataArguments, EncoderTeacherArguments, EncoderStudentArguments, TKDArguments)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """A folder with recipes/, and runs/tiny with an encoder and labelled.csv, cut into train.csv and dev.csv too."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(RECIPES, folder / "recipes")
    sys.path.insert(0, str(folder / "recipes"))
    try:
        runpy.run_path(str(folder / "recipes" / "tiny_models.py"))["write_tiny_encoder"](folder / "runs" / "tiny")
    finally:
        sys.path.pop(0)
    rows = read(folder / "runs" / "tiny" / "labelled.csv")
    write(folder / "train.csv", rows[:180])
    write(folder / "dev.csv", rows[180:])
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return str(path)


def recipe(folder: Path, monkeypatch, *flags: str) -> None:
    """Run the recipe in this process with its tiny twin; SystemExit carries the exit code."""
    monkeypatch.chdir(folder)
    given = ["--config", "recipes/tkd_glue.tiny.yaml", "--disable_tqdm", "true", *flags]
    monkeypatch.setattr(sys, "argv", ["recipes/tkd_glue.py", *given])
    runpy.run_path("recipes/tkd_glue.py", run_name="__main__")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("size", ["", ".tiny"])
def test_shipped_configurations_parse(size):
    path = RECIPES / f"tkd_glue{size}.yaml"
    parsed = parse_config(KINDS, ["--config", str(path)])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text()).items():
        if name != "report_to":
            assert values[name] == value or str(values[name]) == str(value), name
    assert matched_layers(3, 12) == [4, 8, 12]  # what a comment in the file says


@pytest.mark.slow
def test_a_csv_becomes_a_small_classifier(user, monkeypatch, capsys):
    out = user / "runs" / "csv"
    recipe(user, monkeypatch, "--train_file", "train.csv", "--dev_file", "dev.csv", "--output_dir", str(out))
    screen = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    labels = ["leave", "neither", "take"]
    assert summary["labels"] == labels
    assert summary["data"] == {"name": "train", "train": 180, "dev": {"dev": 60}}

    # Both are plain models that know their labels, and the scores are what anyone else would measure.
    dev = read(user / "dev.csv")
    for role, folder in (("teacher", out / "teacher"), ("student", out)):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(model).__name__ == "BertForSequenceClassification"
        assert list(model.config.id2label.values()) == labels
        assert model.config.label2id == {name: i for i, name in enumerate(labels)}
        predicted = pipeline("text-classification", model=str(folder), device="cpu")([row["text"] for row in dev])
        hits = [found["label"] == row["label"] for found, row in zip(predicted, dev, strict=True)]
        facts = summary[role]
        assert facts["scores"]["dev"]["accuracy"] == pytest.approx(sum(hits) / 60)
        assert facts["scores"]["dev"]["score"] == facts["scores"]["dev"]["accuracy"]
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["megabytes"] == pytest.approx((folder / "model.safetensors").stat().st_size / 1e6, rel=0.1)
        assert facts["layers"] == model.config.num_hidden_layers == (4 if role == "teacher" else 2)
        assert all(facts["ms_per_sentence"][name] > 0 for name in ("batch_1", "batch_32"))
    assert summary["teacher"]["scores"]["dev"]["accuracy"] > 0.9
    assert summary["student"]["scores"]["dev"]["accuracy"] > 0.8
    assert summary["timing"] == {"device": "cpu", "threads": torch.get_num_threads(), "sentences": 32, "passes": 5}
    for words in ("dev accuracy", "parameters", "ms a sentence, batch 32", f"student: {out}", "rows of dev.csv"):
        assert words in screen, words
    names = {key for line in (out / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"ce", "kd", "pt", "td_student", "eval_score"} <= names


@pytest.mark.slow
def test_a_given_teacher_is_used_and_not_touched(user, monkeypatch, capsys):
    given, out = user / "runs" / "given", user / "runs" / "student"
    model = tiny_classifier(labels=3)
    model.config.id2label = {0: "take", 1: "leave", 2: "neither"}  # an order of its own, which the data follow
    tokenizer = classifier_tokenizer()
    save_pretrained(given, model, tokenizer)
    before = content(given)
    recipe(
        user, monkeypatch, "--teacher", str(given), "--teacher_finetuned", "true", "--output_dir", str(out),
        "--max_length", "32", "--max_steps", "2", "--preset", "kd", "--student_width", "8", "--student_init", "random",
        "--eval_strategy", "no", "--load_best_model_at_end", "false", "--early_stopping_patience", "null",
    )  # fmt: skip
    assert content(given) == before
    assert not (out / "teacher").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["labels"] == ["take", "leave", "neither"]
    student = AutoModelForSequenceClassification.from_pretrained(out)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (8, 1)
    assert student.config.intermediate_size == 16
    assert list(student.config.id2label.values()) == ["take", "leave", "neither"]
    assert "24 of 240 rows split off runs/tiny/labelled.csv, 10% of each label, dev_seed 0" in capsys.readouterr().out


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


def killing(monkeypatch, preset, step):
    """Stop the run of this preset before a step."""
    train = TKDTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.args.preset == preset and self.state.global_step == step:
            raise KilledError
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TKDTrainer, "training_step", dies)


@pytest.mark.slow
def test_a_killed_recipe_continues(user, monkeypatch):
    """A repeated command keeps what there is of the teacher, and the end is that of a run that nobody stopped."""
    straight, stopped = user / "runs" / "straight", user / "runs" / "stopped"
    short = ("--teacher_epochs", "2", "--num_train_epochs", "2")
    recipe(user, monkeypatch, "--output_dir", str(straight), *short)
    mine = ("--output_dir", str(stopped), *short)
    with monkeypatch.context() as patch:
        killing(patch, "ft", 17)  # after the checkpoint of step 14
        with pytest.raises(KilledError):
            recipe(user, patch, *mine)
    assert not json.loads((stopped / "teacher" / "fine_tuning.json").read_text()).get("finished")
    with monkeypatch.context() as patch:
        killing(patch, "tkd", 17)
        killing(patch, "ft", 13)  # its first epoch is not run again
        with pytest.raises(KilledError):
            recipe(user, patch, *mine)
    assert_same(weights(straight / "teacher"), weights(stopped / "teacher"))

    before = content(stopped / "teacher")
    with monkeypatch.context() as patch:
        killing(patch, "ft", 0)
        recipe(user, patch, *mine, "--resume_from_checkpoint", str(stopped / "checkpoint-14"))
    assert content(stopped / "teacher") == before
    assert_same(weights(straight), weights(stopped))

    # The teacher of other settings is not taken for this one's.
    with pytest.raises(SystemExit) as exit_info:
        recipe(user, monkeypatch, *mine, "--teacher_epochs", "3")
    assert exit_info.value.code == 2


def summary_of(teacher: list[int], student: list[int], true: list[int], *, majority: int = 0) -> dict:
    """A summary.json of two models with these predictions on the split m, and better ones on mm."""

    def facts(folder, layers, ms, predicted):
        scores = {name: float(sum(map(int.__eq__, predicted, true)) / len(true)) for name in ("score", "accuracy")}
        only = len(set(predicted)) == 1 or None
        classes = [vars(one) for one in class_scores(predicted, true, ("no", "yes"))]
        return {
            "folder": folder, "layers": layers, "parameters": 2_000, "megabytes": 8.0, "ms_per_sentence": ms,
            "scores": {"m": scores, "mm": {"score": 0.5, "f1": 0.25, "accuracy": 0.75}},
            "classes": {"m": classes, "mm": [vars(c) for c in class_scores([0, 1], [1, 1], ("no", "yes"))]},
            "constant": {"m": only and {"label": ("no", "yes")[predicted[0]], "rows": len(true)}, "mm": None},
        }  # fmt: skip

    share = true.count(majority) / len(true)
    return {
        "preset": "tkd", "data": {"name": "mnli"}, "dev_rows": "the task's own split",
        "timing": {"device": "cpu", "threads": 3, "sentences": 32, "passes": 5},
        "majority": {"label": "no", "scores": {"m": {"score": share, "accuracy": share},
                                               "mm": {"score": 0.1, "f1": 0.2, "accuracy": 0.3}}},
        "teacher": facts("a", 4, {"batch_1": 2.0}, teacher), "student": facts("b", 1, {"batch_1": 0.5}, student),
        "onnx": {"folder": "b/onnx", "largest_difference": 1e-6, "same_label": 1.0, "rows": 12},
    }  # fmt: skip


def shown(summary, capsys):
    """The screen, and the cells of its tables by the first."""
    show_summary(summary)
    screen = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.splitlines()]
    return screen, {line[0]: line[1:] for line in reversed(lines) if line}


def test_the_table_of_a_summary(capsys):
    screen, table = shown(summary_of([0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]), capsys)
    assert table["m accuracy"] == ["0.2000", "1.0000", "0.8000", "0.800"]
    assert table["mm score"] == ["0.1000", "0.5000", "0.5000", "1.000"]
    assert "m score" not in table
    assert table["layers"] == ["", "4", "1", "0.250"]
    assert table["ms a sentence, batch 1"] == ["", "2.000", "0.500", "0.250"]
    assert "WARNING" not in screen
    # Rows; predicted, recall and F1 of the teacher, then of the student, whose precision is 1/2.
    assert table["no"] == ["1", "1", "1.000", "1.000", "2", "1.000", "0.667"]


@pytest.mark.parametrize(
    ("teacher", "student", "warned"),
    [
        ([0, 0, 0], [0, 0, 0], ("the teacher (m) predicts 'no' for all 3", "the student (m) predicts 'no' for all 3")),
        ([0, 0, 1], [1, 1, 1], ("the student (m) predicts 'yes' for all 3",)),
        (
            [1, 0, 1],
            [0, 0, 1],
            ("the teacher (m) is right for 66.7% of the dev rows, the commonest",),
        ),
    ],
)
def test_models_no_better_than_a_constant_are_not_praised(teacher, student, warned, capsys):
    screen, table = shown(summary_of(teacher, student, [0, 0, 1]), capsys)
    assert table["m accuracy"][-1] == "-"
    assert screen.count("WARNING") == len(warned)
    assert all(words in screen for words in warned)


@pytest.mark.slow
def test_two_untrained_models_in_the_recipe(user, monkeypatch, capsys):
    """Learning rates of nearly 0: whatever both predict, the table holds the majority's line against it."""
    out = user / "runs" / "untrained"
    recipe(user, monkeypatch, "--output_dir", str(out), "--teacher_learning_rate", "1e-12", "--learning_rate", "1e-12",
           "--teacher_epochs", "1", "--num_train_epochs", "1", "--preset", "kd")  # fmt: skip
    screen, summary = capsys.readouterr().out, json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == max(r["step"] for r in rows)]
    constant = max([r["label"] for r in last].count(k) for k in range(3)) / len(last)
    assert summary["majority"]["scores"]["dev"]["accuracy"] == pytest.approx(constant)
    for role in ("teacher", "student"):
        assert sum(one["rows"] for one in summary[role]["classes"]["dev"]) == len(last)
        if summary[role]["scores"]["dev"]["accuracy"] <= constant:
            assert f"WARNING: the {role}" in screen


def test_the_trainer_says_once_that_it_predicts_one_class(tmp_path, caplog):
    model = tiny_classifier()
    with torch.no_grad():
        model.classifier.bias[1] += 1e3
    rows = [{"text": text, "label": i % 2} for i, text in enumerate("abcdef")]
    args = TKDArguments(
        str(tmp_path), preset="ft", max_length=16, learning_rate=1e-9, eval_strategy="steps", eval_steps=1, max_steps=3,
        eval_on_start=True, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = TKDTrainer(model, args, tokenizer=classifier_tokenizer(), train_rows=rows, eval_rows=rows)
    with caplog.at_level("WARNING", "rlkd"):
        trainer.train()
    assert caplog.text.count("step 1: it predicts 'LABEL_1' for all 6 held-out rows") == 1
    assert caplog.text.count("tells no classes apart") == 1


def test_tasks_of_the_hub_keep_their_splits_metrics_and_labels(monkeypatch):
    asked = []

    def load(source, where, **options):
        import datasets

        asked.append((source, where["split"]))
        rows = datasets.Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]})
        return rows, rows.column_names

    monkeypatch.setattr(glue, "load_table", load)
    data = encoder_data.load_labelled_data(LabelledDataArguments(task="mnli", train_limit=2))
    assert list(data.dev) == ["validation_matched", "validation_mismatched"]
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert data.train[0] == {"text": "a", "text_pair": "c", "label": 0}
    assert [split for _, split in asked] == ["train", "validation_matched", "validation_mismatched"]


def test_the_score_is_the_mean_of_the_tasks_metrics():
    from transformers import EvalPrediction

    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).numpy()
    prediction = EvalPrediction(logits, torch.tensor([1, 0, 0, 0]).numpy())
    data = encoder_data.LabelledData("x", [], {}, ("0", "1"), ("f1", "accuracy"), "")
    assert data.compute_metrics()(prediction) == {
        "score": pytest.approx((2 / 3 + 0.75) / 2), "f1": pytest.approx(2 / 3), "accuracy": 0.75,
    }  # fmt: skip
    data.metrics = ("matthews",)
    assert data.compute_metrics()(prediction).keys() == {"score", "matthews", "accuracy"}


# Mistakes: flags, exit code, and what the one screen must say.


def mistakes(folder: Path) -> dict[str, tuple[str, int, tuple[str, ...]]]:
    rows = read(folder / "train.csv")
    pairs = [{"text": row["text"], "text_pair": "b", "label": row["label"]} for row in rows]
    write(folder / "pairs.csv", pairs)
    write(folder / "halves.csv", [*pairs[:20], pairs[20] | {"text_pair": ""}])
    write(folder / "one.csv", [row | {"label": "take"} for row in rows])
    write(folder / "strange.csv", [*rows[:9], rows[9] | {"label": "keep"}])
    write(folder / "numbers.csv", [{"text": "a", "label": i % 5 + 1} for i in range(20)])
    write(folder / "zero.csv", [{"text": "a", "label": 0}])
    write(folder / "unlabelled.csv", [row | {"label": ""} for row in rows[:9]])
    write(folder / "twins.csv", [{"text": "same", "label": label} for label in ("a", "b", "a", "b")])
    words = [*classifier_tokenizer().get_vocab(), "extra"]
    save_pretrained(folder / "foreign", tiny_classifier().bert, classifier_tokenizer(words))
    save_pretrained(folder / "two", tiny_classifier(), classifier_tokenizer())
    other = tiny_classifier(labels=3)
    other.config.id2label = {0: "good", 1: "bad", 2: "neither"}
    save_pretrained(folder / "other", other, classifier_tokenizer())
    T5Config(vocab_size=8, d_model=8).save_pretrained(folder / "t5")
    classifier_tokenizer().save_pretrained(folder / "t5")
    given = "--teacher_finetuned true --max_length 32 --teacher"
    return {
        "unknown column": ("--text_column texd", 3, ("labelled.csv", "texd", "Did you mean 'text'", "text_column")),
        "unknown label column": ("--label_column labell", 3, ("label_column: 'labell'", "Did you mean 'label'")),
        "text as label": ("--label_column text --text_column text", 3, ("values in 240 rows", "Is it the label?")),
        "unknown labels": ("--labels take leave", 3, ("labels not in the label set", "neither", "take, leave")),
        "dev labels of its own": (
            "--train_file train.csv --dev_file strange.csv", 3, ("strange.csv", "'keep' in rows 9", "'train.csv'"),
        ),
        "dev number of its own": (
            "--train_file numbers.csv --dev_file zero.csv", 3, ("zero.csv", "0 in rows 0", "Allowed: 1, 2, 3, 4, 5."),
        ),
        "one label": ("--train_file one.csv", 3, ("one.csv", "only the label 'take'", "two labels")),
        "given labels, one found": ("--train_file one.csv --labels take leave", 3, ("only the label 'take'",)),
        "no dev labels": ("--train_file train.csv --dev_file unlabelled.csv", 3, ("unlabelled.csv", "no row has a")),
        "nothing to split off": ("--train_file twins.csv", 3, ("twins.csv", "too few rows", "dev_file")),
        "missing file": ("--train_file trainn.csv", 3, ("trainn.csv", "no such file", "train.csv")),
        "not a file": ("--train_file reviews", 3, ("reviews", "no such file", "task")),
        "pairs as single sentences": ("--train_file pairs.csv", 3, ("pairs.csv", "pair_column: text_pair")),
        "single sentences as pairs": ("--pair_column text_pare", 3, ("labelled.csv", "single sentences", "text_pare")),
        "a pair without its second": (
            "--train_file halves.csv --pair_column text_pair", 3, ("halves.csv", "rows 20", "'text_pair' is empty"),
        ),
        "one column twice": ("--pair_column text", 2, ("must be three different columns",)),
        "layer map": ("--layer_map 1 9", 2, ("layer_map", "must give 2 layers", "from 1 to 4")),
        "layers": ("--student_layers 5", 2, ("the student has 5 layers", "at most 4")),
        "no layers": ("--student_layers 0", 2, ("layers = 0",)),
        "too long": ("--max_length 65", 2, ("max_length = 65", "64 positions")),
        "tokenizers": (
            "--student_init pretrained --student_pretrained foreign --max_length 32", 2,
            ("different tokenizers", "preset: kd"),
        ),
        "pretrained unnamed": ("--student_init pretrained", 2, ("pretrained",)),
        "width": ("--student_width 24", 2, ("student_width = 24", "multiple of", "16")),
        "width of copies": ("--student_width 16", 2, ("init: random",)),
        "no epochs": ("--teacher_epochs 0", 2, ("teacher_epochs = 0", "must be above 0")),
        "not fine-tuned": ("--teacher_finetuned true", 2, ("runs/tiny/encoder", "BertModel", "not a fine-tuned")),
        "other number of labels": (f"{given} two", 2, ("'two' has 2 labels", "3 (leave, neither, take)")),
        "other labels": (f"{given} other", 3, ("labels not in the label set", "good, bad, neither", "the teacher's")),
        "other labels named": (
            f"{given} other --labels take leave neither", 2, ("good, bad, neither", "take, leave, neither"),
        ),
        "no encoder": ("--teacher t5", 2, ("'t5' is a 't5' model", "BERT family")),
        "metric": ("--metrics accurac", 2, ("accurac", "Did you mean 'accuracy'")),
        "best by": ("--metric_for_best_model f1", 2, ("metric_for_best_model", "f1", "'score', 'accuracy', 'loss'")),
        "dev share": ("--dev_fraction 1.5", 2, ("dev_fraction = 1.5",)),
    }  # fmt: skip


def test_mistakes_are_one_screen_before_any_weights_load(user, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    cases = mistakes(user)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    for what, (flags, code, words) in cases.items():
        with pytest.raises(SystemExit) as exit_info:
            recipe(user, monkeypatch, *flags.split())
        screen = capsys.readouterr().err
        assert exit_info.value.code == code, (what, screen)
        assert "Traceback" not in screen, what
        assert len(screen.splitlines()) <= 24, (what, screen)
        for word in words:
            assert word in screen, (what, word, screen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none of task, train_file and pseudo_labels is set"),
        ({"task": "sst"}, "task = 'sst': allowed are 'sst2'"),
        ({"task": "sst2", "dev_file": "x.csv"}, "dev_file is set without train_file"),
        ({"task": "sst2", "pair_column": "x"}, "pair_column is set without train_file: task sst2 has its own"),
        ({"task": "rte", "labels": ["x", "y"]}, "labels is set without train_file"),
    ],
)
def test_settings_that_contradict_one_another(given, message):
    from rlkd.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        LabelledDataArguments(**given)
