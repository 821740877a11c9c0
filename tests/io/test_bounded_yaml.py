"""YAML from outside: what a small file says takes little time and memory, at every place that reads one."""

import json
import resource
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import ConfigError, cut, listed, nearest, shown
from rlkd.io import bounded_yaml
from rlkd.io.bounded_yaml import MAX_BYTES, Loader, load, read

MERSENNE = 2**61 - 1  # integers that differ by it have one hash


def nested(start, form):
    """Nine levels, each of nine aliases of the one before."""
    levels = [f"l0: &l0 {start}"]
    levels += [f"l{i}: &l{i} {form.format(', '.join([f'*l{i - 1}'] * 9))}" for i in range(1, 10)]
    return "\n".join(levels)


HOSTILE = {
    "aliases of lists": nested("[x, x]", "[{}]"),
    "aliases of mappings": nested("{k: x}", "{{a: [{}]}}"),
    "aliases in merges": nested("{k: x}", "{{<<: [{}]}}"),
    "aliases of a long text": "a: &a " + "x" * 200_000 + "\nb: [" + ", ".join(["*a"] * 5000) + "]",
    "an alias of itself": "a: &a [*a]",
    "an alias of itself, in a mapping": "a: &a {b: {c: *a}}",
    "an alias of itself, as a key": "a: &a {*a : 1}",
    "an unknown alias": "a: *b",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{a: " * 100_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(1000)),
    "deep dashes": "- " * 100_000,
    "deep question marks": "? " * 100_000,
    "many values": "a: [" + "[]," * 200_000 + "]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(60_000)),
    "large": "#" * (MAX_BYTES + 1),
    "tags": "".join(f"%TAG !{i}! a\n" for i in range(9000)) + "---\na: 1",
    "control characters": "a: \x1b[2J",
    "a zero": "a: \0",
    "two documents": "a: 1\n---\na: 2",
    "a typed base 60 number": "a: !!int " + ":".join(["1"] * 100_000),
    "a typed base 60 float": "a: !!float " + ":".join(["1"] * 100_000),
    "typed digits": "a: !!int " + "9" * 100_000,
    "no boolean": "a: !!bool maybe",
    "binary": "a: !!binary aGk=",
    "a set": "a: !!set {b, c}",
    "pairs": "a: !!pairs [b: c]",
    "a date": "a: !!timestamp 2024-13-45",
    "python": "a: !!python/object/apply:os.system ['true']",
    "a python name": "a: !!python/name:os.system x",
    "a long tag": "a: !" + "x" * 100_000 + " b",
    "a list as a key": "? [a, b]\n: c",
    "a mapping as a key": "? {a: b}\n: c",
    "a merge of text": "<<: a",
    "a repeated key": "a: 1\nb: 2\na: 3",
    "a repeated nested key": "a: {b: 1, c: [{d: 1, d: 2}]}",
    "a repeated merge": "<<: {a: 1}\n<<: {b: 2}",
    "cut off": "a: [1, 2",
    "a tab": "a:\n\tb: 1",
}
HARMLESS = {
    "base 60": ("a: " + ":".join(["1"] * 100_000), {"a": ":".join(["1"] * 100_000)}),
    "a time": ("a: 12:30:15", {"a": "12:30:15"}),
    "a date": ("a: 2024-01-31", {"a": "2024-01-31"}),
    "no date": ("a: 2024-13-45", {"a": "2024-13-45"}),
    "octal": ("a: 010", {"a": "010"}),
    "digits": ("a: " + "9" * 100_000, {"a": "9" * 100_000}),
    "hexadecimal digits": ("a: 0x" + "f" * 100_000, {"a": "0x" + "f" * 100_000}),
    "numbers": ("[0, -1, +2, 0x1F, 1_000, 18446744073709551615]", [0, -1, 2, 31, 1000, 2**64 - 1]),
    "fractions": ("[0.5, .5, 1., 1e-5, 1E5, 5.e3, -.inf]", [0.5, 0.5, 1.0, 1e-5, 1e5, 5e3, -float("inf")]),
    "words": ("[yes, No, on, null, ~, '', 'yes', =]", [True, False, True, None, None, "", "yes", "="]),
    "an alias": ("a: &a {b: [1]}\nc: *a", {"a": {"b": [1]}, "c": {"b": [1]}}),
    "a merge": ("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
    "two merges": ("<<: [{a: 1, b: 1}, {a: 2}]\nb: 3", {"a": 1, "b": 3}),
    "nothing": ("# nothing\n", None),
    "a long text": ("a: " + "x" * 900_000, {"a": "x" * 900_000}),
    "a deep list": ("[" * 39 + "]" * 39, json.loads("[" * 39 + "]" * 39)),
    "numbers of one hash": (
        "{" + ", ".join(f"{i * MERSENNE}: 1" for i in range(9000)) + "}",
        {(i * MERSENNE if i * MERSENNE < 10**20 else str(i * MERSENNE)): 1 for i in range(9000)},
    ),
}


@pytest.fixture
def quick():
    """Not slow, whatever the machine does: processor time."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 8


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_on_one_line(text, tmp_path, quick):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(path)
    said = str(error.value)
    assert said.startswith(f"{path}:")
    assert len(said) < len(str(path)) + 400
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("text", "value"), HARMLESS.values(), ids=HARMLESS)
def test_what_is_read(text, value, quick):
    assert load(text) == value
    if isinstance(value, list):
        assert list(map(type, load(text))) == list(map(type, value))


TEXT = st.text(alphabet="ab01:.-_ ~#&*!|>'\"%@{}[],?é", max_size=9)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_what_yaml_writes_is_read_back(value):
    assert load(yaml.safe_dump(value, allow_unicode=True)) == value


def test_a_file_that_has_no_end_is_read_no_further_than_the_limit():
    from pathlib import Path

    with pytest.raises(ConfigError, match=r"^/dev/zero: cannot be read: it has more than 1,024 KiB, the most"):
        read(Path("/dev/zero"))


def test_lines_and_columns(tmp_path):
    for text, place in (("a: 1\nb: @x", "2:4"), ("a: {b: 1,\n  b: 2}", "2:3"), ("a: 1\n\nc: !!int x", "3:4")):
        with pytest.raises(yaml.YAMLError) as error:
            load(text)
        line, column, _ = bounded_yaml.problem(error.value, text)
        assert f"{line}:{column}" == place


READERS = """
import resource, sys
from pathlib import Path
from rlkd.errors import RlkdError
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
{imports}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        {call}
    except RlkdError as error:
        said = str(error)
        assert len(said) < 4000, (path, len(said))
        print(Path(path).stem)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert used < 200_000, used  # KB
"""
ENTRIES = {
    "templates": ("from rlkd.templates.template import load_templates", "load_templates(path)"),
    "lint": (
        "from rlkd.templates.lint import lint; from rlkd.templates.sources import read_file",
        "assert any(p.level == 'error' and len(p.message) < 999 for p in lint(read_file(Path(path)))); raise RlkdError",
    ),
    "study": ("from rlkd.jobs.study import read_plan", "read_plan(Path(path), quick=True)"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_reader_is_bounded(entry, tmp_path):
    """One process per reader, whose memory says what it took."""
    texts = HOSTILE | {n: t for n, (t, _) in HARMLESS.items()}
    # As fields of a template, where an error quotes the value.
    for name in ("aliases of lists", "deep lists", "digits", "a long text"):
        lines = texts[name].splitlines()
        texts[f"field, {name}"] = "templates:\n  i: !Template\n" + "".join(f"    {line}\n" for line in lines)
        texts[f"name, {name}"] = texts[f"field, {name}"] + "    jinja: x\n    name: [" + "*l9, " * 5 + "]"
    paths = []
    for number, text in enumerate(texts.values()):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text)
    imports, call = ENTRIES[entry]
    script = READERS.format(imports=imports, call=call)
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 40
    assert done.stdout.split() == [path.stem for path in paths]


# Values from outside in messages


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        ["x" * 1000] * 1000,
        {str(i): ["x" * 1000] * 1000 for i in range(100)},
        10**5000,
        [10**5000],
        [[[[[["deep"]]]]]] * 100,
        "\n" * 1000,
    ],
    ids=range(7),
)
def test_shown_is_short(value):
    assert len(shown(value)) <= 300
    assert "\n" not in shown(value)


def test_shown_is_repr_of_what_is_short():
    for value in (3, "a'b", None, [1, "x"], {"a": [True]}, 1.5, "x" * 70, ()):
        assert shown(value) == repr(value)


def test_names_are_listed_and_cut():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(1030)], most=3) == "0, 1, 2 and 1,027 more"
    assert len(listed(["x" * 10**6])) == 100
    assert (cut("abcdef", 6), cut("abcdefg", 6)) == ("abcdef", "abc...")
    assert nearest("x" * 10**6, ["x"]) == ""


def test_a_subclass_adds_a_tag():
    class Own(Loader):
        pass

    Own.add_constructor("!Own", lambda loader, node: ("own", loader.construct_scalar(node)))
    loader = Own("a: !Own b")
    assert loader.construct_document(loader.get_single_node()) == {"a": ("own", "b")}
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor for the tag '!Own'"):
        load("a: !Own b")
