import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkd.cli.main import app, main
from rlkd.data.prompts import PACKAGE_PROMPTS


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
