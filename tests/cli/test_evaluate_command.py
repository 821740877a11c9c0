"""`rlkd evaluate`: a saved model's numbers, against transformers' own forward and generate."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from rlkd.cli.main import main
from rlkd.report.reading import read_side_by_side
from tiny import EOS, VALID, WORDS, save_pair, save_pretrained, tiny_t5, tiny_tokenizer

NOTES = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "gh"]
TEMPLATES = """\
templates:
  x: !Template
    id: x
    name: ask
    jinja: 'b {{ note }} a'
    metadata: !TemplateMetadata {}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path)
    rows = [{"note": note, "gold": ["a b", note]} for note in NOTES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    return tmp_path


def run(capsys, *words):
    code = 0
    try:
        main(["evaluate", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


BASIC = ("--dataset", "rows.jsonl", "--input-column", "note", "--max-new-tokens", "5", "--max-input-tokens", "16")
SCORED = ("--reference-column", "gold", "--metric", "chrf,exact_match", "--teacher", "teacher", "--templates", "t.yaml")


def test_numbers_are_those_of_transformers(folder, capsys):
    code, out, err = run(capsys, "student", *BASIC, *SCORED, "--out", "runs/mine", "--json")
    assert code == 0, err
    found = json.loads(out)
    tokenizer = tiny_tokenizer()
    student, teacher = (AutoModelForSeq2SeqLM.from_pretrained(name).eval() for name in ("student", "teacher"))
    regrets, texts = [], []
    for note in NOTES:
        asked = tokenizer(note, return_tensors="pt")
        banned = list(range(VALID, student.config.vocab_size))
        greedy = GenerationConfig(max_new_tokens=5, do_sample=False, suppress_tokens=banned)
        ids = student.generate(**asked, generation_config=greedy)[0, 1:]
        ids = ids[: ids.tolist().index(EOS) + 1] if EOS in ids else ids
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        told = tokenizer(f"b {note} a", return_tensors="pt")
        with torch.no_grad():
            logits = teacher(**told, labels=ids[None]).logits[0, :, :VALID]
        regrets.append(float((logits.amax(-1) - logits.gather(-1, ids[:, None])[:, 0]).sum()))
    assert found["numbers"]["regret"] == pytest.approx(sum(regrets) / len(regrets), abs=1e-4)
    assert [
        json.loads(line)["student"] for line in (folder / "runs/mine/held_out.jsonl").read_text().splitlines()
    ] == texts
    right = [text in ("a b", note) for text, note in zip(texts, NOTES, strict=True)]
    assert found["numbers"]["exact_match"] == sum(right) / len(right)
    low, high = found["intervals"]["regret"]
    assert low < found["numbers"]["regret"] < high
    assert "chrf" in found["numbers"]
    assert "chrf" not in found["intervals"]
    assert found["speed"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert found == json.loads((folder / "runs/mine/evaluation.json").read_text()) | {"folder": "runs/mine"}


def test_without_teacher_and_references_and_again(folder, capsys):
    code, out, err = run(capsys, "student", *BASIC, "--out", "runs/one", "--limit", "12")
    assert code == 0, err
    assert "12 rows" in out
    assert "length" in out
    assert "regret" not in out
    code, _, err = run(capsys, "student", *BASIC, "--out", "runs/one")
    assert (code, "--overwrite" in err) == (2, True)
    assert run(capsys, "student", *BASIC, "--out", "runs/one", "--overwrite", "--quiet")[:2] == (0, "")
    assert len((folder / "runs/one/held_out.jsonl").read_text().splitlines()) == len(NOTES)
    record = json.loads((folder / "runs/one/run.json").read_text())
    record["trainer"] = "PPOTrainer"
    for text in (json.dumps(record), "{cut"):
        (folder / "runs/one/run.json").write_text(text)
        code, _, err = run(capsys, "student", *BASIC, "--out", "runs/one", "--overwrite")
        assert (code, "holds a run that is no evaluation" in err) == (2, True)
    assert len((folder / "runs/one/held_out.jsonl").read_text().splitlines()) == len(NOTES)


def test_lengths_are_those_of_the_models_run_unless_asked_for(folder, capsys, caplog):
    record = {
        "trainer": "PPOTrainer", "data": {}, "templates": [], "models": {}, "revisions": {},
        "settings": {"max_input_tokens": 3, "max_new_tokens": 2},
    }  # fmt: skip
    (folder / "student/run.json").write_text(json.dumps(record))
    tokenizer, student = tiny_tokenizer(), AutoModelForSeq2SeqLM.from_pretrained("student").eval()

    def answers(longest, new):
        asked = [tokenizer(note, return_tensors="pt", truncation=True, max_length=longest) for note in NOTES]
        banned = list(range(VALID, student.config.vocab_size))
        rules = GenerationConfig(max_new_tokens=new, do_sample=False, suppress_tokens=banned)
        return [tokenizer.decode(student.generate(**one, generation_config=rules)[0], skip_special_tokens=True)
                for one in asked]  # fmt: skip

    for words, longest, new in (((), 3, 2), (("--max-new-tokens", "5"), 3, 5)):
        code, out, err = run(capsys, "student", *BASIC[:4], *words, "--out", f"runs/{new}")
        assert code == 0, err
        assert f"at most {longest} tokens of an input, {new} of an answer" in " ".join(out.split())
        lines = (folder / f"runs/{new}/held_out.jsonl").read_text().splitlines()
        assert [json.loads(line)["student"] for line in lines] == answers(longest, new)
        settings = json.loads((folder / f"runs/{new}/run.json").read_text())["settings"]
        assert (settings["max_input_tokens"], settings["max_new_tokens"]) == (longest, new)
        assert ("was trained with max_new_tokens 2 (now 5)" in caplog.text) == (new == 5)


def test_a_teacher_of_another_vocabulary_scores_by_characters(folder, capsys, caplog):
    """With the same words in another order the regret is that of the shared vocabulary."""
    found = []
    for order in (WORDS, [*WORDS[:3], *WORDS[3:][::-1]]):
        weights = [WORDS.index(word) for word in order]
        model = tiny_t5(tied=False, width=32)
        with torch.no_grad():
            for table in (model.shared.weight, model.lm_head.weight):
                table[: len(order)] = table[weights].clone()
        save_pretrained(folder / "teacher", model, tiny_tokenizer(order))
        code, out, err = run(capsys, "student", *BASIC, *SCORED, "--out", "runs/x", "--overwrite", "--json")
        assert code == 0, err
        found.append(json.loads(out)["numbers"])
    same, other = found
    assert other["regret"] == pytest.approx(same["regret"], abs=1e-3)
    assert other["match"] == same["match"]


def test_weights_that_are_not_finite_are_refused(folder, capsys):
    student = AutoModelForSeq2SeqLM.from_pretrained("student")
    with torch.no_grad():
        student.shared.weight[5, 2] = torch.nan
    student.save_pretrained("student")
    code, _, err = run(capsys, "student", *BASIC, "--out", "runs/x")
    assert code != 0
    assert "shared.weight holds values" in err
    assert not (folder / "runs/x/metrics.jsonl").exists()


def test_two_evaluations_are_compared(folder, capsys):
    for name in ("student", "teacher"):
        code, _, err = run(capsys, name, *BASIC, *SCORED, "--out", f"runs/{name}", "--quiet")
        assert code == 0, err
    arms = read_side_by_side([folder / "runs/student", folder / "runs/teacher"])
    assert [len(arm.runs[0].newest) for arm in arms] == [len(NOTES)] * 2
    with pytest.raises(SystemExit) as end:
        main(["compare", "runs/student", "runs/teacher"])
    assert not end.value.code
    assert "regret" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metric", "rouge"], "--metric rouge: needs --reference-column"),
        (["--metric", "rogue"], "'rogue' is unknown"),
        (["--templates", "t.yaml"], "--templates are what --teacher reads"),
        (["--input-column", "nota"], "Did you mean 'note'"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--max-input-tokens", "0"], "max-input-tokens"),
    ],
)
def test_mistakes_are_named_before_weights_load(folder, capsys, monkeypatch, words, said):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", weights)
    code, _, err = run(capsys, "student", *BASIC, *words, "--out", "runs/x")
    assert code in (2, 3)
    assert said in err
    assert not (folder / "runs/x").exists()


def test_a_folder_of_something_else(folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("x")
    code, _, err = run(capsys, "student", *BASIC, "--out", "mine")
    assert (code, "holds something else: thesis.tex" in err) == (2, True)
