import json

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
        "answer_choices: no ||| yes, metadata: !TemplateMetadata {original_task: true}}\n"
        "  2: !Template {name: bare, jinja: 'Say {{ t }}'}\n"
    )
    return str(path)


def test_list(file):
    assert f"quora_para\t{PACKAGE_PROMPTS / 'quora_para' / 'templates.yaml'}\n" in invoke(
        "list", "--templates-dir", str(PACKAGE_PROMPTS)
    )
    assert invoke("list", file) == "good\t1\toriginal task\nbare\t2\n"


def test_show(file):
    assert invoke("show", f"{file}:good") == (
        "# good (1)\ncolumns: n, t\nanswer_choices: no ||| yes\n"
        "{% if n %}Is {{ t }} good? ||| {{ answer_choices[n] }}{% endif %}\n\n"
    )


def test_render(file, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"t": t, "n": n}) + "\n" for t, n in (("x", 1), ("y", 0), ("z", 1))))
    assert invoke("render", file, "--dataset", str(data), "--limit", "2") == (
        "# row 0, good\nIs x good?\n-> yes\n\n"
        "# row 0, bare\nSay x\n-> (no target)\n\n"
        "# row 1, good\n(not applicable)\n\n"
        "# row 1, bare\nSay y\n-> (no target)\n\n"
    )
    data.write_text('{"text": "x"}\n')
    with pytest.raises(SystemExit) as stop:
        main(["prompts", "render", file, "--dataset", str(data)])
    assert stop.value.code == 3
    assert "t in template 'bare'" in capsys.readouterr().err
