"""The public names: typed for checkers and editors, loaded on first use, documented."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from mypy import api

import rlkd

ROOT = Path(__file__).parents[1]
INIT = ROOT / "rlkd" / "__init__.py"


def typed_names():
    """Name -> module of the imports that type checkers read."""
    (block,) = [n for n in ast.parse(INIT.read_text()).body if isinstance(n, ast.If)]
    return {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_what_type_checkers_read_is_what_is_loaded():
    assert typed_names() == rlkd._PUBLIC
    assert sorted(rlkd.__all__) == dir(rlkd) == sorted([*typed_names(), "__version__"])


@pytest.mark.parametrize("name", sorted(rlkd._PUBLIC))
def test_every_public_name_is_there_and_says_what_it_is(name):
    item = getattr(rlkd, name)
    assert item is getattr(importlib.import_module(f"rlkd.{rlkd._PUBLIC[name]}"), name)
    if inspect.isclass(item) or inspect.isfunction(item):
        doc = inspect.getdoc(item) or ""
        assert len(doc.split()) >= 3, doc
        # What a dataclass is given for a docstring is its signature.
        assert not doc.startswith(f"{name}("), doc


def test_every_error_is_public():
    from rlkd import errors

    kinds = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__ and issubclass(kind, Exception)
    }
    assert kinds <= set(rlkd.__all__)


PROGRAM = """
import rlkd
from rlkd import Example, PPOArguments, PPOTrainer, Teacher, language_model, load_model, load_tokenizer

reveal_type(rlkd.PPOTrainer)
tokenizer = load_tokenizer("google/flan-t5-large", "teacher")
teacher = Teacher(language_model(load_model("google/flan-t5-large", "teacher"), tokenizer), tokenizer)
trainer = PPOTrainer(
    load_model("student", "student"),
    PPOArguments(output_dir="runs/mine"),
    teacher=teacher,
    tokenizer=tokenizer,
    train_examples=[Example("0", "text", ("Summarize: text",))],
)
trainer.run()
PPOTrainer(nonsense=1)
PPOTrainer(1, PPOArguments(), teacher=teacher, tokenizer=1, train_examples=[], typo=1)
PPOArguments(output_dir="x", kl_coeff=1)
rlkd.nonsense
"""


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "api"),
    ]
    out, err, _ = api.run([*arguments, str(program)])
    assert err == ""
    lines = dict(enumerate(PROGRAM.splitlines(), start=1))
    found = [(int(line.split(":")[1]), line) for line in out.splitlines() if line.startswith("program.py:")]
    wrong = {lines[number] for number, line in found if ": error: " in line}
    with_typos = {text for text in lines.values() if "nonsense" in text or "kl_coeff" in text or "typo" in text}
    assert wrong == with_typos
    assert len(wrong) == 4
    assert any("reveal_type" in lines[number] and "-> rlkd.trainers.ppo.PPOTrainer" in line for number, line in found)
