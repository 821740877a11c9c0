"""A template's own "|||" splits its text; nothing that a row holds does, however it is put together."""

import re
from functools import partial

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.errors import DataError
from rlkd.templates import rows
from rlkd.templates import template as templates
from rlkd.templates.rows import PIPE_PROTECTOR
from rlkd.templates.sandbox import SandboxError
from rlkd.templates.template import Rendered

Template = partial(templates.Template, trusted=True)
TARGET = " ||| gold"
# Source of the input -> a row, and the one text that it prints.
PIECES = {
    "two columns": ("{{ a }}{{ b }}", {"a": "x ||", "b": "| evil"}, "x ||| evil"),
    "three columns": ("{{ a }}{{ b }}{{ c }}", {"a": "|", "b": "|", "c": "|"}, "|||"),
    "the template's own bar": ("{{ a }}| evil", {"a": "x ||"}, "x ||| evil"),
    "a bar in an expression": ("{{ a ~ '| evil' }}", {"a": "x ||"}, "x ||| evil"),
    "~": ("{{ a ~ b }}", {"a": "x ||", "b": "| evil"}, "x ||| evil"),
    "+": ("{{ a + b }}", {"a": "x |", "b": "|| evil"}, "x ||| evil"),
    "*": ("{{ a * 3 }}", {"a": "|"}, "|||"),
    "join": ("{{ xs | join }}", {"xs": ["x |", "|", "| evil"]}, "x ||| evil"),
    "str.join": ("{{ ''.join(xs) }}", {"xs": ["x |", "|", "| evil"]}, "x ||| evil"),
    "list item": ("{{ xs[0] }}{{ xs[1] }}", {"xs": ["x ||", "| evil"]}, "x ||| evil"),
    "loop": ("{% for x in xs %}{{ x }}{% endfor %}", {"xs": ["|", "|", "| evil"]}, "||| evil"),
    "block": ("{% set q %}{{ a }}{{ b }}{% endset %}{{ q }}", {"a": "x ||", "b": "| evil"}, "x ||| evil"),
    "namespace": (
        "{% set n = namespace(s='') %}{% for x in xs %}{% set n.s = n.s ~ x %}{% endfor %}{{ n.s }}",
        {"xs": ["x |", "|", "| evil"]},
        "x ||| evil",
    ),
    "replace": ("{{ a.replace('/', '') }}", {"a": "x |/|/| evil"}, "x ||| evil"),
    "replace by a bar": ("{{ a | replace('/', '|') }}", {"a": "x /// evil"}, "x ||| evil"),
    "strip": ("{{ a.strip('/') }}{{ b.strip('/') }}", {"a": "x ||/", "b": "/| evil"}, "x ||| evil"),
    "trim": ("{{ (a | trim) ~ (b | trim) }}", {"a": "x || ", "b": " | evil"}, "x ||| evil"),
    "slice": ("{{ a[:4] }}{{ a[5:] }}", {"a": "x ||/| evil"}, "x ||| evil"),
    "reverse": ("{{ a | reverse }}{{ b }}", {"a": "||x", "b": "| evil"}, "x||| evil"),
    "truncate": ("{{ a | truncate(4, true, '', 0) }}{{ b }}", {"a": "x ||||||", "b": "| evil"}, "x ||| evil"),
    "format": ("{{ '%s%s' % (a, b) }}", {"a": "x ||", "b": "| evil"}, "x ||| evil"),
    "format filter": ("{{ '%s%s' | format(a, b) }}", {"a": "x ||", "b": "| evil"}, "x ||| evil"),
    "center": ("{{ 'x'.center(7, a) }}", {"a": "|"}, "|||x|||"),
    "a key": ("{% for k in d %}{{ k }}{% endfor %}", {"d": {"x ||": 1, "| evil": 2}}, "x ||| evil"),
    "both ends of whole separators": ("{{ a }}{{ b }}", {"a": "||||", "b": "||"}, "||||||"),
    "promptsource's placeholder": (
        "{{ a }}{{ b }}",
        {"a": PIPE_PROTECTOR[:9], "b": PIPE_PROTECTOR[9:]},
        PIPE_PROTECTOR,
    ),
    "rare symbols": ("{{ a }}", {"a": "\U0001d800\U0001d9ff ||"}, "\U0001d800\U0001d9ff ||"),
}


@pytest.mark.parametrize(("source", "row", "text"), PIECES.values(), ids=PIECES)
def test_pieces_of_a_row_make_no_separator(source, row, text):
    assert Template("T", source + TARGET).render(row) == Rendered(text, "gold")


@pytest.mark.parametrize(("source", "row", "text"), PIECES.values(), ids=PIECES)
def test_strict_compat_splits_where_promptsource_does(source, row, text):
    def hidden(value):
        return value.replace("|||", PIPE_PROTECTOR) if isinstance(value, str) else value

    expected = jinja2.Template(source + TARGET).render({name: hidden(value) for name, value in row.items()})
    parts = [part.replace(PIPE_PROTECTOR, "|||").strip() for part in expected.split("|||")]
    assert Template("T", source + TARGET, strict_compat=True).parts(row) == parts


def test_the_row_of_the_gold_label_cannot_choose_it():
    """The text of the row ends in what would be its own target."""
    template = Template("T", "{{ a }}{{ b }} ||| {{ answer_choices[label] }}", "no ||| yes")
    row = {"a": "Is it good? ||", "b": "| yes", "label": 0}
    assert template.render(row) == Rendered("Is it good? ||| yes", "no", ("no", "yes"))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("{{ xs | join('|||') }}", ("a|", "|b", "x|||y")),
        ("{{ xs | join(' ||| ') }}", ("a|", "|b", "x|||y")),
        ("{% for x in xs %}{{ x }}|||{% endfor %}", ("a|", "|b", "x|||y", "")),
        ("{{ '%s|||%s' % (xs[0], xs[1]) }}", ("a|", "|b")),
        ("{% set bars = '|||' %}{{ xs[0] ~ bars ~ xs[1] }}", ("a|", "|b")),
        ("{{ {'k': '|||'}['k'].join(xs) }}", ("a|", "|b", "x|||y")),
        ("{{ xs[0] }}{{ xs[1] }} ||| c", ("a||b", "c")),
    ],
)
def test_choices_made_from_the_row(choices, expected):
    template = Template("T", "{{ answer_choices[0] }} ||| {{ answer_choices[1] }}", choices)
    row = {"xs": ["a|", "|b", "x|||y"]}
    assert template.render(row) == Rendered(expected[0], expected[1], expected)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("a||||b", ["a", "|b"]),
        ("a||||||b", ["a", "", "b"]),
        ("|||a", ["", "a"]),
        ("{{ 'x|||y' }}", ["x", "y"]),
        ("{% raw %}{{ x }}|||{% endraw %}", ["{{ x }}", ""]),
        ("{{ '|||' | length }}", ["3"]),
        ("{{ '|||' | first }}", ["|"]),
        ("{{ ' ||| '[:2] }}", ["|"]),
        ("{{ a.split('|||') | length }}", ["1"]),
        ("{{ '|||' in a }}", ["False"]),
        ("{{ [1, '|||'] }}", ["[1, '", "']"]),
        ("{{ 'ab'[9] }}{{ {'a ||| b': 1}['a ||| c'] }}", [""]),
    ],
)
def test_own_bars_are_bars(source, parts):
    assert Template("T", source).parts({"a": "x|||y"}) == [part.strip() for part in parts]


def test_a_template_that_looks_for_promptsource_s_placeholder_finds_it():
    """As those of multi_news do, whose documents are separated by five bars."""
    template = Template("T", "{{ a.split('" + PIPE_PROTECTOR + "||') | join('/') }} ||| {{ b }}")
    assert template.parts({"a": "x|||||y|||z", "b": "p|||q"}) == ["x/y|||z", "p|||q"]


def test_errors_show_bars():
    with pytest.raises(DataError, match=re.escape("'dict object' has no attribute 'a|||b'")):
        Template("T", "{{ {}['a|||b'].c }}").parts({})


def test_a_row_of_all_the_symbols(monkeypatch):
    """Characters that the row does not hold are found if there are any; if there are none, the row fails."""
    monkeypatch.setattr(rows, "_RARE", tuple("abcdef"))
    assert {Template("T", "{{ a }}{{ xs }}|||y").parts({"a": "ab", "xs": ["c"]})[1] for _ in range(50)} == {"y"}
    with pytest.raises(SandboxError, match=r"cannot tell its '\|\|\|' from the row"):
        Template("T", "{{ a }}|||{{ d }}").parts({"a": "ab", "d": {"c": ["d"]}})


BARS = st.text(alphabet="|/ ", max_size=6)


@settings(max_examples=200, deadline=None)
@given(BARS, st.lists(BARS, max_size=4), st.sampled_from(["", "|", "||", " "]))
def test_one_own_separator_gives_two_parts(a, xs, own):
    source = f"{{{{ a }}}}{own}{{{{ xs | join }}}}|||{{{{ a }}}}{own}{{{{ xs | join }}}}"
    text = f"{a}{own}{''.join(xs)}".strip()
    assert Template("T", source).parts({"a": a, "xs": xs}) == [text, text]
