"""No user sees a bare traceback: rlkd's errors explain the problem, and a wrong command line ends in one message.

That every single message is provoked by some test is checked over the whole suite: `pytest --messages FILE`.
"""

import ast
import inspect
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import typer

import messages
from messages import OURS, PACKAGE, Message, Recorder
from rlkd.cli.main import app, main
from rlkd.errors import ConfigError, InterruptedRunError

# Errors of whoever writes code against rlkd: no command line and no file of settings leads to them.
PROGRAMMING = {
    "__init__.py": {"AttributeError"},
    "settings/parsing.py": {"TypeError"},
    "templates/allowed.py": {"TypeError"},  # becomes a DataError where the template is rendered
    "data/readers.py": {"JSONDecodeError", "Error"},  # of json and csv: becomes a DataError
    "io/bounded_yaml.py": {"ComposerError", "ConstructorError", "OSError"},  # all of them caught by its callers
    "templates/parsing.py": {"ConstructorError"},
    "models/folders.py": {"ValueError"},  # becomes a ModelError that names the file
    "labels/labelling.py": {"StoppedError"},  # caught where shards are written
    "labels/classes.py": {"StoppedError"},  # likewise
    "trainers/distillation.py": {"ValueError"},
    "trainers/encoders/tkd.py": {"ValueError"},
}
ENDS = {"SystemExit", "Exit"}


def raised(node: ast.Raise) -> str | None:
    """The class that a `raise` names; None where it passes on an error made elsewhere."""
    name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    name = getattr(name, "id", None) or getattr(name, "attr", None)
    return name if name and name[0].isupper() else None


def test_everything_raised_is_an_error_that_a_user_can_read():
    others = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        allowed = OURS | ENDS | PROGRAMMING.get(file, set()) | ({"ValueError"} if "objectives/" in file else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and raised(node) not in {*allowed, None}:
                others.append(f"rlkd/{file}:{node.lineno}: raises {raised(node)}: make it one of rlkd/errors.py")
    assert others == []


def test_all_our_errors_are_known():
    def below(kind):
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))

    import rlkd.data.files
    import rlkd.templates.archives
    import rlkd.templates.meter  # noqa: F401
    from rlkd.errors import RlkdError

    assert below(RlkdError) == OURS


# The list of messages


SOURCE = """
def _require(condition, name):
    if not condition:
        raise ConfigError(name)

def f(x):
    _require(x, "x must be true")
    if x:
        raise DataError(
            f"{x} is {x!r}: "
            "too long"
        ) from None
    problem = ConfigError("made here, raised there")
    raise ValueError("a number")
    raise problem
"""


def test_messages_are_found(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    found = messages.messages(tmp_path)
    assert [(m.first, m.last, m.text) for m in found] == [
        (7, 7, "x must be true"),
        (9, 12, "is : too long"),
        (13, 13, "made here, raised there"),
        (14, 14, "a number"),
    ]


def test_the_package_has_them_all():
    found = messages.messages()
    assert len(found) > 150
    assert len(set(found)) == len(found)
    assert {"trainers/arguments.py", "data/rows.py", "labels/folder.py"} <= {m.file for m in found}


def test_a_message_names_the_test_that_came_by():
    message = Message("a.py", 9, 12, "too long")
    assert message.test({("a.py", 10): "test_one", ("b.py", 9): "test_two"}) == "test_one"
    assert message.test({("a.py", 8): "test_one", ("b.py", 9): "test_two"}) is None


def test_recording(monkeypatch, tmp_path):
    """Errors that are made, in whatever depth, and errors that pytest.raises catches."""
    from _pytest.raises import RaisesExc

    from rlkd.errors import RlkdError
    from rlkd.jobs.setup import DataArguments
    from rlkd.objectives.neighbours import noisy_logits

    monkeypatch.setattr(RlkdError, "__init__", RlkdError.__init__)  # put back afterwards
    monkeypatch.setattr(RaisesExc, "__exit__", RaisesExc.__exit__)
    recorder = Recorder()
    recorder.install()
    with pytest.raises(ConfigError, match="train_limit = 0: "):
        DataArguments("x", "text", train_limit=0)
    with pytest.raises(ValueError, match=r"probability = 2\.0"):
        noisy_logits(None, 2.0, 0.5)
    assert InterruptedRunError("stopped", 15).exit_code == 143
    recorder.save(tmp_path)
    hits = messages.read_hits(tmp_path)
    listed = {m.file: m.test(hits) for m in messages.messages() if m.test(hits)}
    assert set(listed) == {"checks.py", "objectives/neighbours.py"}
    assert set(listed.values()) == {"tests/test_messages.py::test_recording"}


# Command lines


def commands(group: typer.Typer, *names: str):
    """(name, function) of every command."""
    for command in group.registered_commands:
        yield (*names, command.name or command.callback.__name__.replace("_", "-")), command.callback
    for sub in group.registered_groups:
        yield from commands(sub.typer_instance, *names, sub.name)


def declared(function):
    """(parameter, type, what typer gets for it) of a command's options and arguments."""
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is Annotated:
            yield parameter, *get_args(parameter.annotation)


def is_checked(kind) -> bool:
    """Whether a text may be no value of that type."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return any(get_origin(member) is Literal or member is int for member in members)


def flag(parameter, info) -> str:
    # In Annotated, the first name given to typer.Option is in the place of a default.
    given = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("--")]
    return given[0] if given else f"--{parameter.name.replace('_', '-')}"


COMMANDS = list(commands(app))
REQUIRED = [names for names, f in COMMANDS if any(p.default is p.empty for p, _, _ in declared(f))]
TYPED = [
    (names, flag(parameter, info))
    for names, function in COMMANDS
    for parameter, kind, info in declared(function)
    if isinstance(info, typer.models.OptionInfo) and is_checked(kind)
]


def test_the_commands_are_found():
    found = {" ".join(names) for names, _ in COMMANDS}
    assert {"generate-pseudolabels", "data verify", "prompts list", "config check"} <= found
    assert len(REQUIRED) > 6
    assert (("prompts", "render"), "--row") in TYPED
    assert (("generate-pseudolabels",), "--engine") in TYPED


def wrong(capsys, *words) -> str:
    """What a command line that cannot be understood prints on stderr."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, ""), (words, err)
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 8, err
    return err


@pytest.mark.parametrize("names", [names for names, _ in COMMANDS], ids=" ".join)
def test_an_unknown_flag(names, capsys):
    assert "--no-such-flag" in wrong(capsys, *names, "--no-such-flag")


@pytest.mark.parametrize("names", REQUIRED, ids=" ".join)
def test_nothing_given(names, capsys):
    assert "Missing" in wrong(capsys, *names)


@pytest.mark.parametrize(("names", "option"), TYPED)
def test_a_value_of_another_type(names, option, capsys):
    assert f"Invalid value for '{option}" in wrong(capsys, *names, option, "no-such-value")


@pytest.mark.parametrize("words", [("labels",), ("data", "verifies"), ("config", "checks")])
def test_an_unknown_command(words, capsys):
    assert f"'{words[-1]}'" in wrong(capsys, *words)


def test_a_missing_sub_command_shows_help(capsys):
    for words in ([], ["data"], ["prompts"], ["config"]):
        with pytest.raises(SystemExit):
            main(words)
        shown = "".join(capsys.readouterr())
        assert "Usage: rlkd" in shown
        assert "Traceback" not in shown
