"""`rlkd data filter`: which labels stay, against rules written out in NumPy; the folder, for every reader."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlkd import (
    Decoding,
    Example,
    RecordedTeacher,
    RunOptions,
    SupervisedArguments,
    SupervisedTrainer,
    Teacher,
    generate_pseudolabels,
    load_pseudolabels,
)
from rlkd.cli.main import main
from rlkd.labels import filtering
from rlkd.labels.filtering import Filter, filter_labels
from rlkd.labels.integrity import finished_manifest
from rlkd.labels.maintenance import verify
from rlkd.models.encoder_decoder import EncoderDecoder
from tiny import tiny_t5, tiny_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "copy", ":"]  # so few that answers end, and are equal
NOTES = [f"{a} {b}" for a in "abca" for b in "bc"] + ["a b"]


def tiny_teacher() -> Teacher:
    lm = EncoderDecoder(tiny_t5(seed=1, vocab=len(WORDS) + 4), len(WORDS))
    return Teacher(lm, tiny_tokenizer(WORDS))


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """Nine inputs (some equal) under two templates, three samples each, in shards of four inputs."""
    out = tmp_path_factory.mktemp("labels") / "all"
    examples = [Example(f"n{i}", note, (f"copy : {note}", f": {note}"), (note,)) for i, note in enumerate(NOTES)]
    generate_pseudolabels(
        tiny_teacher(), examples, out=out, template_names=["copy", "of"],
        decoding=Decoding("sample", 3, 3, top_k_logprobs=2),
        options=RunOptions(seed=1, shard_rows=24, quiet=True, request={"dataset": "notes.csv"}),
    )  # fmt: skip
    return out


def kept(out: Path) -> set[tuple]:
    return {(row["row"], row["template"], row["sample"]) for row in load_pseudolabels(out).to_list()}


def of(rows: list[dict]) -> set[tuple]:
    return {(row["row"], row["template"], row["sample"]) for row in rows}


def test_bounds(labels, tmp_path):
    rows = load_pseudolabels(labels).to_list()
    logprob, tokens = (np.array([row[name] for row in rows], float) for name in ("sum_logprob", "n_out"))
    middle, per_token = float(np.median(logprob)), float(np.median(logprob / tokens))
    for rule, wanted in (
        (Filter(min_logprob=middle), logprob >= middle),
        (Filter(min_logprob_per_token=per_token), logprob / tokens >= per_token),
        (Filter(min_tokens=2), tokens >= 2),
        (Filter(max_tokens=1), tokens <= 1),
        (Filter(min_logprob=middle, max_tokens=1), (logprob >= middle) & (tokens <= 1)),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        totals = filter_labels(labels, out, rule)
        assert kept(out) == of([row for row, keep in zip(rows, wanted, strict=True) if keep])
        assert 0 < totals["status"]["ok"] == wanted.sum() < len(rows)
        assert sum(totals["filtered"].values()) == len(rows) - wanted.sum()


@pytest.mark.parametrize("by", ["logprob", "logprob_per_token", "reward"])
def test_the_best_answers_to_an_input(labels, tmp_path, by):
    filter_labels(labels, tmp_path / "out", Filter(best=2, by=by))
    wanted = set()
    for number in range(len(NOTES)):
        own = [row for row in load_pseudolabels(labels).to_list() if row["row"] == number]
        regrets = [sum(max(row["top_logps"][t]) for t in range(row["n_out"])) - row["sum_logprob"] for row in own]
        values = {
            "logprob": [row["sum_logprob"] for row in own],
            "logprob_per_token": [row["sum_logprob"] / len(row["token_ids"]) for row in own],
            "reward": [-regret for regret in regrets],
        }[by]
        wanted |= of([own[i] for i in np.argsort(-np.array(values), kind="stable")[:2]])
    assert kept(tmp_path / "out") == wanted


def test_agreement_and_duplicates(labels, tmp_path):
    rows = load_pseudolabels(labels).to_list()
    filter_labels(labels, tmp_path / "agree", Filter(agree=2))
    both = {
        (row["row"], row["label"])
        for row in rows
        for other in rows
        if (row["row"], row["label"]) == (other["row"], other["label"]) and row["template"] != other["template"]
    }
    assert len(both) > 0
    assert kept(tmp_path / "agree") == of([row for row in rows if (row["row"], row["label"]) in both])
    filter_labels(labels, tmp_path / "single", Filter(drop_duplicates=True))
    first = {(row["student_input"], row["label"]): row for row in reversed(rows)}
    assert kept(tmp_path / "single") == of(list(first.values()))


def test_rules_apply_to_what_those_before_left(labels, tmp_path):
    totals = filter_labels(labels, tmp_path / "out", Filter(min_tokens=2, best=1))
    rows = [row for row in load_pseudolabels(labels).to_list() if row["n_out"] >= 2]
    best: dict[int, dict] = {}
    for row in sorted(rows, key=lambda row: -row["sum_logprob"]):
        best.setdefault(row["row"], row)
    assert kept(tmp_path / "out") == of(list(best.values()))
    assert totals["filtered"] == {
        "min_tokens": len(load_pseudolabels(labels)) - len(rows), "best": len(rows) - len(best),
    }  # fmt: skip


def test_the_folder_is_whole_and_says_what_it_is(labels, tmp_path):
    out = tmp_path / "out"
    totals = filter_labels(labels, out, Filter(best=2, drop_duplicates=True))
    assert verify(out) == []
    card = (out / "README.md").read_text()
    assert "| best 2 |" in card
    assert f"| drop_duplicates True | {totals['filtered']['drop_duplicates']} |" in card
    assert f"{totals['filtered']['best']} x filter: --best" in card
    every, before = (load_pseudolabels(folder, statuses=None).to_list() for folder in (out, labels))
    assert [(r["row"], r["teacher_input"]) for r in every] == [(r["row"], r["teacher_input"]) for r in before]
    assert {(r["status"], r["label"] is None, r["top_ids"] is None) for r in every} == {
        ("ok", False, False), ("skipped", True, True), ("failed", True, True),
    }  # fmt: skip
    # A filtered folder is filtered again, and generations differ.
    again = filter_labels(out, tmp_path / "again", Filter(best=1))
    assert again["status"]["ok"] == len({r["row"] for r in every if r["status"] == "ok"})
    headers = [finished_manifest(f).header for f in (labels, tmp_path / "again")]
    assert headers[1]["labels"]["request"] == headers[0]["request"]
    assert len({load_pseudolabels(f)["generation"][0] for f in (labels, out, tmp_path / "again")}) == 3
    assert (out / "labels-00001.parquet").read_bytes() != (labels / "labels-00001.parquet").read_bytes()


def test_it_trains_a_student_and_is_a_recorded_teacher(labels, tmp_path):
    filter_labels(labels, tmp_path / "out", Filter(best=2))
    found = load_pseudolabels(tmp_path / "out")
    arguments = SupervisedArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", objective="forward_kl", max_new_tokens=3,
    )  # fmt: skip
    trainer = SupervisedTrainer(
        tiny_t5(seed=3, vocab=len(WORDS) + 4), arguments, tokenizer=tiny_tokenizer(WORDS), train_dataset=found,
        teacher=RecordedTeacher(found, tiny_tokenizer(WORDS)),
    )  # fmt: skip
    trainer.train()
    made = json.loads((tmp_path / "run/run.json").read_text())["data"]["train"]
    assert made["rows"] == 2 * len(NOTES)
    assert made["labels"][0]["folder"] == str(tmp_path / "out")
    assert made["labels"][0]["templates"] == ["copy", "of"]


def test_killed_it_begins_again_and_a_damaged_shard_is_repaired(labels, tmp_path, monkeypatch, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(["data", *words])
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    words = ("filter", str(labels), "--best", "2", "--quiet")
    assert run(*words, "--out", "whole")[0] == 0
    write, calls = filtering.write_labels, []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(filtering, "write_labels", killed)
    assert run(*words, "--out", "cut")[0] == 130
    monkeypatch.setattr(filtering, "write_labels", write)
    assert run(*words, "--out", "cut")[0] == 0
    files = sorted(path.name for path in Path("whole").glob("labels-*"))
    assert len(files) == 3
    assert all(Path("whole", name).read_bytes() == Path("cut", name).read_bytes() for name in files)
    assert run(*words, "--out", "cut")[0] == 3  # finished
    Path("cut", files[1]).write_bytes(b"x")
    code, out, _ = run("repair", "cut", "--dry-run")
    assert f"rlkd data filter {labels} --best=2 --out={Path('cut').resolve()}" in out
    assert run("repair", "cut", "--run", "--quiet")[0] == 0
    assert Path("cut", files[1]).read_bytes() == Path("whole", files[1]).read_bytes()
    assert run("verify", "cut")[0] == 0
    code, out, _ = run("filter", str(labels), "--out", "json", "--max-tokens", "1", "--json")
    assert (code, list(json.loads(out)["filtered"])) == (0, ["max_tokens"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is nothing to filter by: give one of --min-logprob, --min-logprob-per-token"),
        (["--by", "logprob"], "there is nothing to filter by"),
        (["--by", "logprob", "--max-tokens", "2"], "--by logprob orders the answers of --best"),
        (["--min-logprob", "1"], "--min-logprob 1.0: log-probabilities are at most 0"),
        (["--min-tokens", "3", "--max-tokens", "2"], "--min-tokens 3 is above --max-tokens 2"),
        (["--agree", "1"], "--agree 1: every answer"),
        (["--agree", "3"], "--agree 3: the labels are of 2 templates"),
        (["--best", "6"], "--best 6: every input has 6 labels at most"),
        (["--min-tokens", "9"], "no label would be left (--min-tokens: 49)"),
    ],
)
def test_rules_without_effect_or_sense(labels, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        main(["data", "filter", str(labels), "--out", str(tmp_path / "out"), *words])
    assert end.value.code in (2, 3)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_filtered(labels, tmp_path, capsys):
    def refusal(folder, *words):
        with pytest.raises(SystemExit) as end:
            main(["data", "filter", str(folder), "--out", str(tmp_path / "out"), *words])
        assert end.value.code in (2, 3)
        return capsys.readouterr().err

    shutil.copytree(labels, tmp_path / "out")
    assert "holds the labels to filter: name another folder" in refusal(tmp_path / "out", "--best", "1")
    assert "already holds finished labels" in refusal(labels, "--best", "1")
    shutil.move(tmp_path / "out", tmp_path / "damaged")
    (tmp_path / "damaged/labels-00002.parquet").write_bytes(b"x")
    assert "differs from its checksum" in refusal(tmp_path / "damaged", "--best", "1")
    generate_pseudolabels(
        tiny_teacher(), [Example("0", "a", ("a",)), Example("1", "b", ("b",))], out=tmp_path / "plain",
        template_names=["x"], decoding=Decoding("sample", 2, 2), options=RunOptions(quiet=True),
    )  # fmt: skip
    assert "has no column top_logps" in refusal(tmp_path / "plain", "--best", "1", "--by", "reward")
