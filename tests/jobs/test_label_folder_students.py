"""A prompted teacher's scores of choices train an encoder: the targets, what is refused, and the command."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from rlkd import LabelledDataArguments, TKDArguments, TKDTrainer, load_pseudolabels
from rlkd.cli.main import main as rlkd
from rlkd.errors import ConfigError, DataError
from rlkd.jobs import encoder_label_folder
from rlkd.jobs.encoder_label_folder import read_label_folder
from rlkd.models.encoders.classifiers import build_student
from rlkd.objectives.encoder import soft_cross_entropy
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier, tiny_t5, tiny_tokenizer


def label(row, template, scores, *, choices=("bad", "good"), references=(), text=None, model="llm"):
    return {
        "id": str(row), "row": row, "template": template, "template_id": f"id of {template}", "status": "ok",
        "student_input": text or f"{'abcdefgh'[row % 8]} {'xyz'[row % 3]}", "references": list(references),
        "choices": list(choices), "choice_logprobs": None if scores is None else list(scores), "model": model,
        "revision": "1",
    }  # fmt: skip


@pytest.fixture
def folder(monkeypatch):
    """Label folders in memory, by name."""
    folders: dict[str, list] = {}

    class Stored(list):
        def to_list(self):
            return list(self)

    monkeypatch.setattr(encoder_label_folder, "load_pseudolabels", lambda name: Stored(folders[name]))
    return folders


def softmax(scores):
    weights = np.exp(scores)
    return weights / weights.sum()


def test_targets_are_the_mean_of_the_templates_probabilities(folder):
    """By hand: another wording and another order of the second template's choices, calibrated or not."""
    first, second = np.array([[-1.0, -2.5], [-3.0, -0.5]]), np.array([[-0.2, -4.0], [-2.0, -2.0]])
    folder["llm"] = [
        made
        for row in range(2)
        for made in (
            label(row, "one", first[row], references=["Good "] if row else []),
            label(row, "two", second[row], choices=("yes", "no"), references=["Good "] if row else []),
        )
    ]
    free = {"one": np.array([[-1.0, -3.0], [-2.0, -2.0]]), "two": np.array([[-0.5, -0.7], [-1.0, -0.1]])}
    folder["free"] = [label(row, name, scores, choices=("bad", "good") if name == "one" else ("yes", "no"))
                      for name in free for row, scores in enumerate(free[name])]  # fmt: skip
    renamed = {"yes": "positive", "no": "negative", "good": "positive", "bad": "negative"}
    for content_free in (None, "free"):
        rows, names, note = read_label_folder("llm", ("negative", "positive"), renamed, content_free)
        for row, made in enumerate(rows):
            p, q = softmax(first[row]), softmax(second[row])[::-1]
            if content_free:
                p = p / np.mean([softmax(s) for s in free["one"]], axis=0)
                q = q / np.mean([softmax(s) for s in free["two"]], axis=0)[::-1]
            p, q = p / p.sum(), q / q.sum()
            assert np.exp(made["logits"]) == pytest.approx((p + q) / 2)
        assert names == ("negative", "positive")
    assert [row["label"] for row in rows] == [None, 1]
    assert note.endswith("2 rows of 'llm', 2 templates, 1 with a gold label; choices: bad = negative, good = positive")
    assert [row["text"] for row in rows] == ["a x", "b y"]


def test_without_labels_the_choices_are_the_labels_and_gaps_are_counted(folder, caplog):
    folder["llm"] = [label(0, "one", [-1, -2]), label(0, "two", [-5, -2]), label(1, "two", [-1, -2])]
    with caplog.at_level(logging.WARNING, "rlkd"):
        rows, names, _ = read_label_folder("llm")
    assert names == ("bad", "good")
    assert "1 of 2 rows lack some of the 2 templates" in caplog.text
    assert np.exp(rows[1]["logits"]) == pytest.approx(softmax(np.array([-1.0, -2.0])))


BAD = {
    "choices that differ": ([label(0, "t", [-1, -2]), label(1, "t", [-1, -2], choices=("bad", "fine"))], {},
                            "row 1 has the choices bad, fine, row 0 bad, good. A classifier needs the same choices"),
    "no scores": ([label(0, "t", [-1, -2]), label(1, "t", None)], {}, "1 of 2 labels have no scores.*--strategy rank"),
    "no rows": ([], {}, "none of 0 labels have no scores"),
    "unknown choice": ([label(0, "t", [-1, -2])], {"labels": ("bad", "goods")},
                       "the choices good are not labels of the student .bad, goods.*Did you mean.*choice_labels"),
    "a label without choice": ([label(0, "t", [-1, -2])], {"labels": ("bad", "good", "so so")},
                               "0 of the choices bad, good stand for the label 'so so'"),
    "two for one": ([label(0, "t", [-1, -2, -3], choices=("bad", "good", "great"))],
                    {"labels": ("bad", "good"), "choice_labels": {"great": "good"}},
                    "2 of the choices bad, good, great stand for the label 'good'"),
    "all for one": ([label(0, "t", [-1, -2])], {"choice_labels": {"bad": "x", "good": "x"}}, "for one label only"),
    "unknown reference": ([label(0, "t", [-1, -2], references=["fair"])], {},
                          "row 0: the reference 'fair' is not a label of the student .bad, good.*choice_labels"),
    "another teacher's content-free labels": ([label(0, "t", [-1, -2])], {"content_free": "other"}, "another teacher"),
    "content-free labels without a template": ([label(0, "t", [-1, -2])], {"content_free": "short"}, "lack templates"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_folders_that_cannot_teach(folder, kind):
    rows, options, message = BAD[kind]
    folder |= {"llm": rows, "other": [label(0, "t", [-1, -2], model="x")], "short": [label(0, "s", [-1, -2])]}
    with pytest.raises(DataError, match=message):
        read_label_folder("llm", **options)


def train_rows(n=8):
    return [{"text": f"{'abcdefgh'[i]} x", "label": None, "logits": [0.5 * i, -1.0]} for i in range(n)]


def trainer(folder, rows, **settings):
    args = TKDArguments(str(folder), use_cpu=True, report_to=[], max_length=16, disable_tqdm=True,
                        **{"preset": "kd", "max_steps": 2, **settings})  # fmt: skip
    return TKDTrainer(build_student(tiny_classifier(), 2), args, tokenizer=classifier_tokenizer(), train_rows=rows)


def test_the_loss_is_that_of_the_recorded_logits(tmp_path):
    made = trainer(tmp_path, train_rows(), temperature=2.0)
    batch = made.data_collator([made.train_dataset[i] for i in (5, 1)])
    wanted = torch.tensor([[2.5, -1.0], [0.5, -1.0]])
    logits = made.trained.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(made.compute_loss(made.model, batch), 0.5 * soft_cross_entropy(logits, wanted, 2.0))
    made.train()
    other = train_rows()
    other[3]["logits"] = [0.0, 0.0]
    assert trainer(tmp_path / "b", other).train_dataset.fingerprint != made.train_dataset.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "pkd"}, "the term pt needs the teacher's hidden states, and labels give only its logits"),
        ({"preset": "tkd"}, "the term pt needs the teacher's hidden states"),
        ({"preset": "minilm"}, "the term relations needs the teacher's attention"),
        ({"preset": "kd", "terms": {"gram": 1.0}}, "the term gram needs the teacher's hidden states"),
        ({"preset": "derivatives"}, "the term gradient needs the teacher's gradients"),
        ({"teacher_cache": "logits"}, "labels are a teacher's outputs already"),
    ],
)
def test_what_recorded_logits_cannot_teach(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, train_rows(), **settings)


@pytest.mark.parametrize("values", [None, [1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, "x"]])
def test_logits_of_all_rows_and_labels(tmp_path, values):
    rows = train_rows()
    rows[2]["logits"] = values
    with pytest.raises(DataError, match="row 2: logits must be 2 finite numbers"):
        trainer(tmp_path, rows)


def test_recorded_logits_beside_a_teacher(tmp_path):
    args = TKDArguments(str(tmp_path), preset="kd", use_cpu=True, report_to=[], max_length=16)
    teacher = tiny_classifier()
    with pytest.raises(ConfigError, match="bring a teacher's logits: leave the teacher out"):
        TKDTrainer(build_student(teacher, 2), args, teacher=teacher, tokenizer=classifier_tokenizer(),
                   train_rows=train_rows())  # fmt: skip


# The command


@pytest.fixture
def user(tmp_path, monkeypatch, folder):
    """A folder with recipes/, an encoder, labels of an LLM that knows the task, and gold labels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    (tmp_path / "free").mkdir()
    save_pretrained(tmp_path / "encoder", tiny_classifier().bert, classifier_tokenizer())
    folder["llm"] = [
        label(i, t, [-3.0, -0.1] if i % 8 < 4 else [-0.1, -3.0], references=["good" if i % 8 < 4 else "bad"])
        for i in range(48)
        for t in ("one", "two")
    ]
    for made in folder["llm"]:
        made["student_input"] += " " + "klmnopqrstuvw"[made["row"] % 13]
    gold = "".join(f"{'abcdefgh'[i]} x {w},{'good' if i < 4 else 'bad'}\n" for i in range(8) for w in "ijk")
    for name in ("dev.csv", "other.csv"):
        (tmp_path / name).write_text("text,label\n" + gold)
    return tmp_path


def recipe(*flags):
    """The exit code."""
    given = {"pseudo_labels": "llm", "student_init": "pretrained", "student_pretrained": "encoder", "preset": "kd",
             "temperature": 1, "max_length": 30, "output_dir": "runs/student", "num_train_epochs": 25, "use_cpu": True,
             "learning_rate": 0.004,
             "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True}  # fmt: skip
    Path("job.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(SystemExit) as exit_info:  # of the command `rlkd train tkd`
        rlkd(["train", "tkd", "--config", "job.yaml", *flags])
    return exit_info.value.code


@pytest.mark.slow
def test_labels_of_an_llm_become_a_classifier_in_one_command(user, monkeypatch, capsys):
    assert recipe("--dev_file", "dev.csv", "--test_files", "other.csv", "--w_ce", "0") == 0
    screen = capsys.readouterr().out
    summary = json.loads(Path("runs/student/summary.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained("runs/student")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.num_hidden_layers == 4  # all that the pretrained model has
    student = summary["student"]
    assert student["scores"]["dev"]["accuracy"] > 0.7
    assert student["scores"]["dev"] == student["scores"]["other"]
    assert "teacher" not in summary
    assert summary["labels_of_teacher"] == {"rows": 48, "accuracy": 1.0}
    assert np.sum(student["confusion"]["dev"]) == 24
    assert 0 <= student["ece"]["dev"] <= 1
    for words in ("choices: bad = bad, good = good", "other calibration error", "rows by true label (down)",
                  "labels, right for 100.0% of 48 training rows"):  # fmt: skip
        assert words in screen, words
    assert "teacher:" in screen


def test_gold_labels_of_the_folder_are_held_out_where_there_is_no_other_file(user, monkeypatch, capsys, folder):
    assert recipe("--max_steps", "1", "--student_layers", "2") == 0
    summary = json.loads(Path("runs/student/summary.json").read_text())
    assert summary["data"]["dev"]["dev"] + summary["data"]["train"] == 48
    assert summary["student"]["layers"] == 2
    capsys.readouterr()
    for made in folder["llm"]:
        made["references"] = []
    assert recipe("--output_dir", "runs/other") == 3
    assert "no gold labels to hold out" in capsys.readouterr().err
    recipe("--output_dir", "runs/other", "--dev_file", "dev.csv", "--max_steps", "1")
    assert json.loads(Path("runs/other/summary.json").read_text())["labels_of_teacher"] == {"rows": 0}


MISTAKES = {
    "a teacher too": (("--teacher", "encoder"), "teacher is set beside pseudo_labels"),
    "fine-tuned": (("--teacher_finetuned", "true"), "teacher_finetuned is set beside pseudo_labels"),
    "no student": (("--student_init", "mapped"), "Set student_init: pretrained"),
    "a narrower student": (("--student_width", "8"), "student_width needs an encoder as teacher"),
    "assistants": (("--assistant_layers", "4"), "assistant_layers needs an encoder as teacher"),
    "layer map": (("--layer_map", "1", "2"), "layer_map matches layers of an encoder"),
    "hidden states": (("--preset", "pkd"), "needs the teacher's hidden states"),
    "train_file": (("--train_file", "dev.csv"), "pseudo_labels and train_file are both set"),
    "two dev sets": (("--dev_file", "dev.csv", "--task", "sst2"), "dev_file and task are both set"),
    "pairs": (("--pair_column", "b"), "whose rows are single texts"),
    "labels of a task": (("--task", "sst2", "--labels", "a", "b"), "labels is set beside task sst2"),
    "choice_labels": (("--choice_labels", "good"), "must be a mapping such as"),
    "unknown labels": (("--dev_file", "dev.csv", "--labels", "neg", "pos"), "are not labels of the student"),
    "same name": (("--dev_file", "dev.csv", "--test_files", "other.csv", "./other.csv"), "are called 'other'"),
    "no test file": (("--dev_file", "dev.csv", "--test_files", "none"), "test_files = 'none': no such file"),
    "too long": (("--dev_file", "dev.csv", "--max_length", "99"), "has 40 positions"),
}


def test_mistakes_are_named_before_weights_load(user, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    for what, (flags, message) in MISTAKES.items():
        assert recipe(*flags) in (2, 3)
        assert message in " ".join(capsys.readouterr().err.split()), what
    for name, value in (("choice_labels", {"a": "b"}), ("content_free_labels", "free")):
        with pytest.raises(ConfigError, match=f"{name} is set without pseudo_labels"):
            LabelledDataArguments(train_file="dev.csv", **{name: value})
    folder = [label(0, "t", [-1, -2], text=" ")]
    monkeypatch.setattr(encoder_label_folder, "_ranked", lambda _: folder)
    assert recipe("--dev_file", "dev.csv") == 3
    assert "1 texts are empty" in capsys.readouterr().err


def test_a_folder_as_the_command_writes_it(tmp_path, monkeypatch):
    """Four choices of one template, gold labels by name, checksums and all."""
    words = [*tiny_tokenizer().get_vocab(), "World", "Sports", "Business", "Sci/Tech"]  # else none could be ranked
    teacher = save_pretrained(tmp_path / "teacher", tiny_t5(vocab=len(words)), tiny_tokenizer(words))
    rows = [{"text": f"a b {c}", "label": name} for c, name in zip("cde", ("World", "Sci/Tech", "Sports"), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    command = ["generate-pseudolabels", "--teacher", teacher, "--dataset", "rows.jsonl", "--input-column", "text",
               "--reference-column", "label", "--templates", "agnews_names", "--strategy", "rank", "--quiet",
               "--out", "labels"]  # fmt: skip
    with pytest.raises(SystemExit) as exit_info:
        rlkd(command)
    assert exit_info.value.code == 0
    labels = ("Business", "Sci/Tech", "Sports", "World")
    made, names, _ = read_label_folder("labels", labels)
    assert names == labels
    assert [row["label"] for row in made] == [3, 1, 2]
    assert [row["text"] for row in made] == [row["text"] for row in rows]
    kept = load_pseudolabels("labels").to_list()
    for number, row in enumerate(made):
        means = dict.fromkeys(labels, 0.0)
        own = [label for label in kept if label["row"] == number]
        for label in own:
            for choice, p in zip(label["choices"], softmax(np.array(label["choice_logprobs"])), strict=True):
                means[choice] += p / len(own)
        assert np.exp(row["logits"]) == pytest.approx(list(means.values()))
