"""Prompts that print a missing value, or have characters without a token: counted, named and skipped on request."""

import json
import logging
import shutil

import datasets
import pytest

import stub
from rlkd.cli.main import main
from rlkd.data.answered import supervised_pairs
from rlkd.data.examples import Examples
from rlkd.data.flaws import FlawCounts
from rlkd.data.rendering import RowRenderer
from rlkd.jobs.setup import DataArguments, load_data
from rlkd.labels.card import summary
from rlkd.labels.store import load_pseudolabels
from rlkd.models.vocabulary import UnknownText
from rlkd.templates.template import Template
from tiny import tiny_tokenizer

NAN = float("nan")


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("source", "row", "missing"),
    [
        ("{{ a }} {{ b }}", {"a": None, "b": "x"}, ("a",)),
        ("{{ a }} {{ b }}", {"a": None, "b": NAN}, ("a", "b")),
        ("{{ a | trim | lower }}", {"a": None}, ("a",)),
        ("{{ 'so: ' ~ a }}", {"a": None}, ("a",)),
        ("{{ a | join(', ') }}", {"a": ["x", None]}, ("a",)),
        ("{{ a.b.c }}!", {"a": {"b": {"c": None}}}, ("a",)),
        ("{% for x in a %}{{ x.t }}{% endfor %}", {"a": [{"t": "y"}, {"t": None}]}, ("a",)),
        ("{% set x = a %}{{ x | string }}", {"a": None}, ("a",)),
        # Not printed, or not missing.
        ("x{% if a %}{{ a }}{% endif %}", {"a": None}, ()),
        ("x{% if a is not none %}{{ a }}{% endif %}", {"a": None}, ()),
        ("x {{ a or 'nothing' }} {{ a | default('-', true) }}", {"a": None}, ()),
        ("{{ b }} ||| {{ a }}", {"a": None, "b": "x"}, ()),
        ("{{ a }}", {"a": "None of them, nonetheless"}, ()),
        ("{{ a.b }} none", {"a": {"b": "x", "c": None}}, ()),
    ],
)
def test_missing_values_that_a_prompt_prints(source, row, missing, trusted):
    render = RowRenderer((Template("t", source, trusted=trusted),), "q")
    prompt = render(0, {"q": "x"} | row).prompts[0]
    assert prompt.missing == missing
    assert prompt.text == Template("t", source).parts(row)[0]  # promptsource's text stays
    skipping = RowRenderer((Template("t", source),), "q", skip_missing=True)(0, {"q": "x"} | row).prompts[0]
    assert (skipping.status, skipping.text is None) == (("skipped", True) if missing else ("ok", False))


def test_choices_that_say_none():
    template = Template("t", "{{ a }}", answer_choices="yes ||| {{ b }}")
    prompt = RowRenderer((template,), "q", with_choices=True)(0, {"q": "x", "a": "y", "b": None}).prompts[0]
    assert (prompt.choices, prompt.missing) == (("yes", "None"), ("b",))


class Slow:
    """A tokenizer without offsets, of one token per character."""

    is_fast, unk_token_id = False, 0

    def __call__(self, text, **_):
        return {"input_ids": [" abc".find(character) + 1 for character in text]}


class Bytes:
    unk_token_id = None


@pytest.mark.parametrize(
    ("tokenizer", "text", "pieces"),
    [
        (tiny_tokenizer(), "a zebra b 🦓 a zebra", ("zebra", "🦓")),
        (tiny_tokenizer(), "a b", ()),
        (tiny_tokenizer(), "", ()),
        (Slow(), "ab{c} {", ("{", "}")),
        (Bytes(), "{", ()),
    ],
)
def test_pieces_that_a_tokenizer_does_not_know(tokenizer, text, pieces):
    tokenizer = tokenizer if not hasattr(tokenizer, "backend_tokenizer") else tiny_tokenizer()
    unknown = UnknownText(tokenizer)
    assert unknown(text) == pieces
    assert unknown(text) == pieces  # known words are remembered, the others are found again
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer("a b c", truncation=True, max_length=2)  # which the tokenizer remembers
        assert unknown(f"c d e f {text}") == pieces


def test_unknown_pieces_are_found_where_they_come_from():
    template = Template("t", "answer ! of {{ a }} {{ b.c }}")
    rows = datasets.Dataset.from_dict({"q": ["a", "a"], "a": ["zebra", "b"], "b": [{"c": "zebra ocean"}, {"c": "d"}]})
    examples = Examples.of(rows, RowRenderer((template,), "q", unknown=UnknownText(tiny_tokenizer())))
    assert examples.flaws.to_json() == {
        "unknown": {"t": {"(the template's own text)": 2, "a": 1, "b": 1}},
        "characters": {"!": 2, "ocean": 1, "zebra": 1},
    }


def test_counts_add_up():
    counts = [
        {"missing": {"t": {"a": 1}}, "characters": {"{": 2}},
        {},
        {"missing": {"t": {"a": 2, "b": 1}}, "unknown": {"u": {"c": 4}}, "characters": {"{": 1}},
    ]
    whole = FlawCounts()
    for part in counts:
        whole.merge(part)
    assert FlawCounts(whole.to_json()).lines() == [
        "t: prompts print a missing value as a word such as None, by column: a 3, b 1",
        "u: prompts have characters that the tokenizer does not know, by column: c 4",
        "unknown characters: '{' 3",
    ]


def test_lint_counts_them_too(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text(
        "dataset: x\ntemplates:\n  1: !Template\n    answer_choices: null\n    id: '1'\n"
        "    jinja: '{{c}} of {{text}} {{ 1 // n }} ||| x'\n    metadata: {original_task: true}\n    name: t\n"
    )
    rows = [{"text": "a", "c": None, "n": n} for n in (1, 0, 1)] + [{"text": "a", "c": "d", "n": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as end:
        main(["prompts", "lint", f"{tmp_path}/t.yaml", "--dataset", f"{tmp_path}/rows.jsonl"])
    assert end.value.code == 0
    line = "warning: 't': the input prints a missing value of c as a word such as None in 2 of 4 rows."
    assert line in capsys.readouterr().out


def test_pairs_for_a_teacher_are_counted(caplog):
    rows = datasets.Dataset.from_dict({"q": ["a", None], "y": ["b", "c"]})
    supervised_pairs(rows, [Template("t", "{{ q }} ? ||| {{ y }}")], student_column="y")
    assert caplog.messages == ["the rows: t: prompts print a missing value as a word such as None, by column: q 1"]


def test_labelling_counts_warns_and_survives_a_restart(tmp_path):
    rows = [{"text": "a b", "c": None if i % 3 else "c"} for i in range(20)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = (Template("t", "copy {{ c }} answer {{ text }}"), Template("u", "copy {{ text }}"))
    totals = stub.label(source, tmp_path / "out", templates=templates)
    missing = sum(row["c"] is None for row in rows)
    assert totals["flaws"] == {"missing": {"t": {"c": missing}}}
    line = f"t: prompts print a missing value as a word such as None, by column: c {missing}"
    assert f"warning: {line}" in summary(totals).splitlines()
    assert f"- {line}" in (tmp_path / "out" / "README.md").read_text().splitlines()
    finished = stub.entries(tmp_path / "out")[-1]
    assert finished["flaws"] == totals["flaws"]
    # The log without its end, and without a shard: what is made again is counted again.
    log = tmp_path / "out" / "manifest.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
    (tmp_path / "out" / "labels-00002.parquet").unlink()
    assert stub.label(source, tmp_path / "out", templates=templates)["flaws"] == totals["flaws"]


@pytest.fixture
def settings(tmp_path):
    rows = [{"text": "a b", "c": "d"}, {"text": "a", "c": None}, {"text": "zebra", "c": "e"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "dataset: x\ntemplates:\n  1: !Template\n    answer_choices: null\n    id: '1'\n"
        "    jinja: 'copy {{c}} of {{text}} ||| x'\n    metadata: {original_task: true}\n    name: t\n"
    )
    return {"dataset": str(tmp_path / "rows.jsonl"), "templates": [str(tmp_path / "t.yaml")], "input_column": "text"}


@pytest.mark.parametrize(
    ("skip", "kept"),
    [({}, "012"), ({"skip_missing": True}, "02"), ({"skip_unknown": True}, "01"),
     ({"skip_missing": True, "skip_unknown": True}, "0")],
)  # fmt: skip
def test_training_counts_and_skips(settings, tmp_path, skip, kept, caplog):
    tokenizer = tiny_tokenizer([*tiny_tokenizer().get_vocab(), "None"])
    with caplog.at_level(logging.WARNING):
        held_out = shutil.copy(settings["dataset"], tmp_path / "held_out.jsonl")
        train, *_ = load_data(DataArguments(**settings, **skip, eval_dataset=str(held_out)), [tokenizer])
    assert "".join(example.id for example in train) == kept
    assert any(
        line.endswith("print a missing value as a word such as None, by column: c 1") for line in caplog.messages
    )
    assert any("unknown characters: 'zebra' " in line for line in caplog.messages)


def test_flags_of_the_command_are_part_of_the_labels(settings, tmp_path, capsys):
    import tiny

    teacher, _ = tiny.save_pair(tmp_path)
    command = [
        "generate-pseudolabels",
        "--teacher",
        teacher,
        "--dataset",
        settings["dataset"],
        "--input-column",
        "text",
    ]
    command += ["--templates", settings["templates"][0], "--max-new-tokens", "2", "--engine", "torch", "--out"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as end:
            main([*command, *more])
        return end.value.code or 0

    assert run(str(tmp_path / "all")) == 0
    assert "warning: t: prompts print a missing value as a word such as None, by column: c 1" in capsys.readouterr().out
    assert run(str(tmp_path / "some"), "--skip-missing", "--skip-unknown") == 0
    rows = load_pseudolabels(tmp_path / "some", statuses=None).to_list()
    assert [(row["status"], row["error"]) for row in rows] == [
        ("ok", None),
        ("skipped", "the prompt prints a missing value: column 'c'"),
        ("skipped", "the prompt has 'zebra', which the tokenizer does not know: text"),
    ]
    log = tmp_path / "some" / "manifest.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert run(str(tmp_path / "some"), "--skip-missing") == 3
    assert "skip_unknown" in capsys.readouterr().err
