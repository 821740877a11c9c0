"""`rlkd inspect-rewards`: three kinds of input, filters, and mistakes that end before weights load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlkd import Decoding, RewardView, generate_pseudolabels
from rlkd.cli.main import app, main
from rlkd.evaluation.recording import append_samples
from rlkd.evaluation.samples import Sample
from rlkd.records import Example
from tiny import save_pair, save_pretrained, tiny_t5, tiny_teacher, tiny_tokenizer

ROWS = [
    {"source": "a b c", "target": "c b a"},
    {"source": "d e", "target": "e d"},
    {"source": "", "target": "x"},
    {"source": "1 2 3 4", "target": "4 3 2 1"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def invoke(*args):
    return CliRunner().invoke(app, ["inspect-rewards", *args], catch_exceptions=False)


def view_of(*args):
    return RewardView.from_json(invoke(*args, "--json").stdout)


def models(pair, *more):
    teacher, student = pair
    return [
        "--teacher", teacher, "--student", student, "--dataset", "rows.jsonl", "--input-column", "source",
        "--max-new-tokens", "5", "--reference-column", "target", *more,
    ]  # fmt: skip


def test_of_models_under_several_templates(folder, pair):
    view = view_of(
        *models(pair, "--templates", "asset:Complex and simple", "--templates", "quora_para:Same meaning, other words")
    )
    assert [case.id for case in view.cases()] == ["0", "1", "3"]  # a row without input is left out
    answers = view.cases()[1].samples
    assert {s.source for s in answers} == {"student", "teacher greedy", "reference"}
    assert len(answers) == 3 * 3  # both templates together, and each
    assert view.cases()[1].template_gap > 0
    assert next(s for s in answers if s.source == "reference").text == "e d"


def test_filters(folder, pair):
    whole = view_of(*models(pair, "--student-before", pair[1]))
    assert {s.source for s in whole} == {"student", "student before", "teacher greedy", "reference"}
    worst = view_of(*models(pair), "--worst", "1")
    assert [c.id for c in worst.cases()] == [max(whole.cases(), key=lambda case: case.regret).id]
    found = view_of(*models(pair), "--search", "E D", "--reward-value", "lse")
    assert [c.id for c in found.cases()] == ["1"]
    for sample in found:
        assert sample.rewards == pytest.approx(sample.logprobs, abs=1e-5)
    assert view_of(*models(pair), "--limit", "1").cases()[0].id == "0"


def test_the_page_and_the_terminal(folder, pair):
    shown = invoke(*models(pair)).stdout
    assert "teacher greedy" in shown
    assert "1 2 3 4" in shown
    assert invoke(*models(pair), "--out", "page.html").stdout == "page.html\n"
    assert "<title>Token rewards</title>" in (folder / "page.html").read_text()


def test_of_labels(folder, pair):
    inputs = [Example("7", "a b", ("copy a b",), ("b a",))]
    teacher = tiny_teacher()
    save_pretrained(folder / "labeller", teacher.lm.model)
    teacher.lm.model.name_or_path = str(folder / "labeller")
    decoding = Decoding("greedy", 4)
    generate_pseudolabels(teacher, inputs, out=folder / "labels", template_names=["copy"], decoding=decoding)
    plain = view_of("--labels", "labels")
    scored = view_of("--labels", "labels", "--teacher", "labeller")
    assert plain.samples[0].total_reward is None
    assert scored.samples[0].total_reward == pytest.approx(0, abs=1e-4)  # its own greedy answer
    assert plain.samples[0].tokens == scored.samples[0].tokens


def test_of_a_run_without_loading_torch(folder):
    sample = Sample("1", "in", "student", "a", ["a"], [3], rewards=[-0.5])
    append_samples(folder, [sample], step=4, value="lse")
    code = (
        "import sys\nfrom rlkd.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect-rewards", "--run", ".", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    view = RewardView.from_json(done.stdout)
    assert (view.value, view.samples[0].total_reward, view.samples[0].step) == ("lse", -0.5, 4)


@pytest.mark.parametrize(
    ("args", "code", "wanted"),
    [
        ([], 2, "exactly one of --dataset, --run and --labels; none of them is given"),
        (["--run", "x", "--labels", "y"], 2, "--run and --labels is given"),
        (["--dataset", "rows.jsonl"], 2, "--dataset needs --teacher and --input-column as well"),
        (["--run", "x", "--teacher", "t"], 2, "--run does not take --teacher"),
        (["--run", "x", "--reward-value", "lse"], 2, "--run does not take --reward-value"),
        (["--labels", "x", "--student", "t"], 2, "--labels does not take --student"),
        (["--dataset", "rows.jsonl", "--step", "3"], 2, "--dataset needs --teacher"),
        (["--run", "x", "--out", "page.pdf"], 2, "ends in .html"),
        (["--run", "x", "--out", "no/page.html"], 2, "the folder no does not exist"),
        (["--run", "x"], 3, "x has no token_rewards.jsonl"),
        (["--labels", "x"], 3, "x has no finished"),
        (["--run", "x", "--by", "beauty"], 2, "--by"),
    ],
)
def test_mistakes_in_the_command(folder, capsys, args, code, wanted):
    status, message = failing(capsys, args)
    assert wanted in message
    assert status == code


@pytest.mark.parametrize(
    ("more", "code", "wanted"),
    [
        (["--dataset", "row.jsonl"], 3, "Did you mean 'rows.jsonl'?"),
        (["--input-column", "sauce"], 3, "Did you mean 'source'?"),
        (["--templates", "quora"], 3, "no templates for 'quora'"),
        (["--student", "no/such-model"], 2, "student 'no/such-model' is neither a local folder"),
        (["--teacher-dtype", "float16"], 2, "float16 overflows"),
        (["--student-before", "other"], 2, "different vocabularies"),
        (["--templates", "empty.yaml"], 3, "no row has an input under every template"),
    ],
)
def test_mistakes_end_before_the_weights_load(folder, pair, capsys, monkeypatch, more, code, wanted):
    save_pretrained(folder / "other", tiny_t5(vocab=20), tiny_tokenizer(["<pad>", "</s>", "<unk>", "z"]))
    template = "!Template\n    answer_choices: null\n    id: a\n    jinja: '{% if false %}{{source}}{% endif %}'\n"
    template += "    metadata: !TemplateMetadata {}\n    name: none applies\n    reference: ''\n"
    (folder / "empty.yaml").write_text(f"dataset: x\ntemplates:\n  a: {template}")

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", refuse)
    status, message = failing(capsys, models(pair, *more))
    assert wanted in message
    assert status == code


def test_nothing_left_is_an_error(folder, pair, capsys):
    status, message = failing(capsys, models(pair, "--search", "nowhere to be found"))
    assert (status, "no input is left" in message) == (3, True)


def failing(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(["inspect-rewards", *args])
    return stop.value.code, capsys.readouterr().err
