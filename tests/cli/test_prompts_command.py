import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkd.cli.main import app, main
from rlkd.errors import DataError
from rlkd.templates.sources import PACKAGE_PROMPTS
from tiny import tiny_tokenizer


def invoke(*args):
    result = CliRunner().invoke(app, ["prompts", *args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(
        "templates:\n"
        "  1: !Template {name: good, jinja: '{% if n %}Is {{ t }} good? ||| {{ answer_choices[n] }}{% endif %}', "
        "answer_choices: no ||| yes, metadata: !TemplateMetadata "
        "{original_task: true, choices_in_prompt: true, metrics: [Accuracy], languages: [en]}}\n"
        "  2: !Template {name: bare, jinja: 'Say {{ t }}'}\n"
    )
    return str(path)


def test_list(file):
    assert f"quora_para\t4\t{PACKAGE_PROMPTS}\n" in invoke("list", "--templates-dir", str(PACKAGE_PROMPTS))
    assert invoke("list", file) == "good\t1\toriginal task\tchoices in prompt\tAccuracy\ten\nbare\t2\n"
    rows = json.loads(invoke("list", file, "--json"))
    assert [row["name"] for row in rows] == ["good", "bare"]
    datasets = json.loads(invoke("list", "--json", "--templates-dir", file))
    assert datasets == [{"dataset": Path(file).parent.name, "templates": 2, "source": file}]


def test_show(file):
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert invoke("show", f"{file}:good") == (
        "# good (1)\ncolumns: n, t\ntask: original task\nchoices in prompt: choices in prompt\nmetrics: Accuracy\n"
        f"languages: en\nanswer_choices: no ||| yes\norigin: {file} (sha256 {digest[:12]})\n"
        "{% if n %}Is {{ t }} good? ||| {{ answer_choices[n] }}{% endif %}\n\n"
    )
    (shown,) = json.loads(invoke("show", f"{file}:good", "--json"))
    assert (shown["sha256"], shown["columns"], shown["gold_columns"]) == (digest, ["n", "t"], [])
    assert len(shown["fingerprint"]) == 64


def test_render(file, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"t": t, "n": n}) + "\n" for t, n in (("x", 1), ("y", 0), ("z", 1))))
    assert invoke("render", file, "--dataset", str(data), "--limit", "2") == (
        "# row 0, good\nIs x good?\n-> yes\nchoices: no | yes\n\n"
        "# row 0, bare\nSay x\n-> (no target)\n\n"
        "# row 1, good\n(not applicable)\n\n"
        "# row 1, bare\nSay y\n-> (no target)\n\n"
    )
    data.write_text('{"text": "x"}\n')
    with pytest.raises(SystemExit) as stop:
        main(["prompts", "render", file, "--dataset", str(data)])
    assert stop.value.code == 3
    assert "t in template 'bare'" in capsys.readouterr().err


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"t": t, "n": n}) + "\n" for t, n in (("x", 1), ("y", 0), ("z", 1))))
    return str(path)


def rendered(file, *args):
    return json.loads(invoke("render", file, *args, "--json"))


def test_render_one_row_for_machines(file, rows):
    (good, bare) = rendered(file, "--dataset", rows, "--row", "2")
    assert good == {
        "row": 2,
        "template": "good",
        "id": "1",
        "input": "Is z good?",
        "target": "yes",
        "choices": ["no", "yes"],
        "reason": None,
    }
    assert (bare["target"], bare["reason"]) == (None, "no target")
    with pytest.raises(DataError, match=r"has no row 3: rows are counted from 0 to 2\."):
        invoke("render", file, "--dataset", rows, "--row", "3")


def test_render_with_other_columns_labels_and_length(file, tmp_path):
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps({"text": "word " * 900, "label": "positive"}) + "\n")
    maps = ("--column-map", "text=t,label=n", "--label-map", "n:positive=1,negative=0")
    (whole,) = rendered(f"{file}:good", "--dataset", str(data), *maps)
    assert whole["target"] == "yes"
    (cut,) = rendered(f"{file}:good", "--dataset", str(data), *maps, "--truncate", "t0")
    assert (len(whole["input"]) > 4500, len(cut["input"]) < 2100) == (True, True)


def test_render_with_a_separator_in_a_list(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text("templates:\n  1: !Template {name: a, jinja: '{{ xs[0] }} ||| {{ xs[1] }}'}\n")
    data = tmp_path / "d.jsonl"
    data.write_text('{"xs": ["p ||| q", "r"]}\n')
    assert rendered(str(path), "--dataset", str(data))[0]["input"] == "p ||| q"
    (compatible,) = rendered(str(path), "--dataset", str(data), "--strict-compat")
    assert (compatible["input"], compatible["reason"]) == ("p", "several targets")


def test_templates_of_other_tasks_and_with_gold_in_the_input_need_a_flag(tmp_path, rows):
    path = tmp_path / "templates.yaml"
    entries = {"one": ("{{ t }} ||| {{ n }}", True), "two": ("{{ t }} ||| x", False), "three": ("{{ n }} ||| x", False)}
    path.write_text(
        "templates:\n"
        + "".join(
            f"  {name}: !Template {{name: {name}, jinja: '{jinja}', metadata: {{original_task: {str(own).lower()}}}}}\n"
            for name, (jinja, own) in entries.items()
        )
    )

    def names(*flags):
        return [found["template"] for found in rendered(str(path), "--dataset", rows, "--limit", "1", *flags)]

    assert names() == ["one"]
    assert names("--all-templates") == ["one", "two"]
    assert names("--all-templates", "--gold-input") == ["one", "two", "three"]
    assert invoke("list", str(path)).count("\n") == 3


def test_lint(file, tmp_path, rows):
    assert (
        invoke("lint", file)
        == f"{file}:3: warning: 'bare': no target: the jinja has no '|||'.\n0 errors, 1 warnings, 0 notes\n"
    )
    assert "no template reads" not in invoke("lint", file, "--dataset", rows)
    bad = tmp_path / "bad.yaml"
    bad.write_text("templates:\n  1: !Template {name: a, jinja: '{{ t | nofilter }}'}\n  2: !Template {name: b}\n")
    result = CliRunner().invoke(app, ["prompts", "lint", str(bad)])
    assert result.exit_code == 3
    assert f"{bad}:2: error: " in result.stdout
    assert f"{bad}:3: error: template 2: field 'jinja' is None" in result.stdout
    assert "2 errors, " in result.stdout
    silent = CliRunner().invoke(app, ["prompts", "lint", str(bad), "--quiet"])
    assert (silent.exit_code, silent.stdout) == (result.exit_code, "")
    (first, _) = json.loads(CliRunner().invoke(app, ["prompts", "lint", str(bad), "--json"]).stdout)
    assert (first["file"], first["line"], first["level"]) == (str(bad), 2, "error")


def test_lint_for_a_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    file = tmp_path / "t.yaml"
    file.write_text("templates:\n  1: !Template {name: a, jinja: '{{ t }} ||| x', answer_choices: '{ ||| <'}\n")
    command = ["prompts", "lint", str(file)]
    assert CliRunner().invoke(app, command).exit_code == 0
    result = CliRunner().invoke(app, [*command, "--tokenizer", str(tmp_path / "teacher")])
    assert result.exit_code == 3
    assert "t.yaml:2: error: 'a': the tokenizer has no tokens for the answer choice '{'." in result.stdout


def test_download_says_where_the_archive_is(monkeypatch, tmp_path):
    monkeypatch.setattr("rlkd.templates.download.download", lambda: (tmp_path / "a.tar.gz", False))
    assert invoke("download") == f"{tmp_path / 'a.tar.gz'} (already there)\n"


def test_what_a_terminal_would_obey_is_shown_as_text(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(
        'templates:\n  1: !Template {name: one, jinja: "\\e[2JSay {{ t }}", metadata: {metrics: ["\\e[31m"]}}\n'
    )
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"t": "a\x1b]0;b\x07\tc\nd"}) + "\n")
    for shown in (
        invoke("show", str(path)),
        invoke("list", str(path)),
        invoke("render", str(path), "--dataset", str(data)),
    ):
        assert "\x1b" not in shown
        assert "\\x1b[" in shown
    assert "Say a\\x1b]0;b\\x07\tc\nd" in shown
