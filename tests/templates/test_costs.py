"""Every method, filter, test, operator and function that a template may use has a cost in proportion to its time.

The tables name all of them, so that a new one without a line here fails. A line is what the operation costs when its
operands grow, and an expression that is as slow as it can be.
"""

import time
from contextlib import suppress
from functools import partial

import pytest

from rlkd.errors import DataError
from rlkd.templates import allowed
from rlkd.templates.meter import READ_PER_STEP, Limits, Meter, SandboxError
from rlkd.templates.rows import RowRandom
from rlkd.templates.sandbox import ENVIRONMENT, SafeTemplate
from rlkd.templates.template import Template


def words(text):
    return text.split()


FIXED, LINEAR, PRODUCT = "the same", "linear", "product of two sizes"

METHODS = {
    str: {
        **dict.fromkeys(
            words(
                """capitalize casefold isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper
        lower splitlines swapcase title upper"""
            ),
            (LINEAR, "t.NAME()"),
        ),
        **dict.fromkeys(words("endswith startswith removeprefix removesuffix"), (LINEAR, "t.NAME(t)")),
        **dict.fromkeys(words("center ljust rjust zfill"), (LINEAR, "''.NAME(n)")),
        "count": (LINEAR, "t.count('a' * 50 ~ 'b')"),
        "find": (LINEAR, "t.find('a' * 50 ~ 'b')"),
        "index": (LINEAR, "(t ~ 'b').index('b')"),
        "partition": (LINEAR, "t.partition('a' * 50 ~ 'b')"),
        "split": (LINEAR, "t.split('a' * 50 ~ 'b')"),
        "replace": (LINEAR, "t.replace('a' * 50 ~ 'b', '')"),
        "rfind": (PRODUCT, "t.rfind(half)"),
        "rindex": (PRODUCT, "(half ~ t).rindex(half)"),
        "rpartition": (PRODUCT, "t.rpartition(half)"),
        "rsplit": (PRODUCT, "t.rsplit(half)"),
        "strip": (PRODUCT, "t.strip(half)"),
        "lstrip": (PRODUCT, "t.lstrip(half)"),
        "rstrip": (PRODUCT, "t.rstrip(half)"),
        "join": (LINEAR, "'-'.join(xs)"),
    },
    list: {
        "append": (FIXED, "xs.append(1)"),
        "clear": (LINEAR, "xs.clear()"),
        "copy": (LINEAR, "xs.copy()"),
        "count": (LINEAR, "xs.count('z')"),
        "extend": (LINEAR, "[].extend(xs)"),
        "index": (LINEAR, "(xs + ['z']).index('z')"),
        "insert": (LINEAR, "xs.insert(0, 1)"),
        "pop": (LINEAR, "xs.pop(0)"),
        "remove": (LINEAR, "xs.remove('y')"),
        "reverse": (LINEAR, "xs.reverse()"),
        "sort": (LINEAR, "xs.sort()"),
    },
    tuple: {"count": (LINEAR, "(t, t).count(t)"), "index": (LINEAR, "(t, t).index(t)")},
    dict: {
        "clear": (LINEAR, "d.clear()"),
        "copy": (LINEAR, "d.copy()"),
        "get": (LINEAR, "d.get(t)"),
        "items": (FIXED, "d.items()"),
        "keys": (FIXED, "d.keys()"),
        "pop": (LINEAR, "d.pop(t, 1)"),
        "popitem": (FIXED, "d.popitem()"),
        "setdefault": (LINEAR, "d.setdefault(t, 1)"),
        "update": (LINEAR, "{}.update(d)"),
        "values": (FIXED, "d.values()"),
    },
}
FILTERS = {
    **dict.fromkeys(words("capitalize lower upper title trim wordcount string truncate"), (LINEAR, "t | NAME")),
    **dict.fromkeys(["max", "min", "sort"], (LINEAR, "xs | NAME")),
    **dict.fromkeys(words("choice count d default first last length random"), (FIXED, "xs | NAME")),
    # Lazy: what is read is counted, here all of it.
    **dict.fromkeys(["map", "reject", "select"], (LINEAR, "xs | NAME('string') | list")),
    **dict.fromkeys(["rejectattr", "selectattr"], (LINEAR, "xs | NAME('a') | list")),
    "abs": (FIXED, "n | abs"),
    "batch": (LINEAR, "[1] | batch(n, 0) | list"),
    "center": (LINEAR, "'' | center(n)"),
    "dictsort": (LINEAR, "d | dictsort"),
    "float": (LINEAR, "t | float"),
    "format": (LINEAR, "'%s' | format(t)"),
    "indent": (LINEAR, "t | indent"),
    "int": (LINEAR, "t | int"),
    "items": (LINEAR, "d | items | list"),
    "join": (LINEAR, "xs | join"),
    "list": (LINEAR, "xs | list"),
    "most_frequent": (LINEAR, "xs | most_frequent"),
    "replace": (LINEAR, "t | replace('a' * 50 ~ 'b', '')"),
    "reverse": (LINEAR, "t | reverse"),
    "round": (FIXED, "n | round"),
    "slice": (LINEAR, "xs | slice(1) | first | length"),
    "sum": (LINEAR, "range(n) | sum"),
    "tojson": (LINEAR, "xs | tojson"),
    "unique": (LINEAR, "xs | unique | first"),
}
FILTERS["trim"] = (PRODUCT, "t | trim(half)")
TESTS = {
    **dict.fromkeys(
        words("== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le"),
        (LINEAR, "t is OF(t)"),
    ),
    **dict.fromkeys(["lower", "upper"], (LINEAR, "t is NAME")),
    **dict.fromkeys(
        words("""boolean defined false float integer iterable mapping none number sequence string true undefined"""),
        (FIXED, "xs is NAME"),
    ),
    **dict.fromkeys(["odd", "even"], (FIXED, "n is NAME")),
    "divisibleby": (FIXED, "n is divisibleby(3)"),
    "sameas": (FIXED, "xs is sameas(d)"),
    "in": (LINEAR, "'z' is in(xs)"),
}
OPERATORS = {
    "+": (LINEAR, "t + t"),
    "-": (LINEAR, "d.keys() - xs"),
    "*": (LINEAR, "'a' * n"),
    "/": (FIXED, "n / 3"),
    "//": (FIXED, "n // 3"),
    "%": (LINEAR, "'%s' % t"),
    "**": (FIXED, "n ** 3"),
}
# Syntax that works without any of the names above.
SYNTAX = {
    "~": (LINEAR, "t ~ t"),
    "in": (LINEAR, "'z' in xs"),
    "in, text": (LINEAR, "('a' * 50 ~ 'b') in t"),
    "not in": (LINEAR, "'z' not in xs"),
    "in, a mapping": (LINEAR, "t in d"),
    "==": (LINEAR, "t == u"),
    "<": (LINEAR, "t < u"),
    "==, lists": (LINEAR, "xs == ys"),
    "slice of a text": (LINEAR, "t[1:]"),
    "slice backwards": (LINEAR, "t[::-1]"),
    "slice of a list": (LINEAR, "xs[1:]"),
    "slice of a range": (FIXED, "range(n)[1:]"),
    "item": (FIXED, "xs[5]"),
    "key": (LINEAR, "d[t]"),
    "a key of a mapping": (LINEAR, "{t: 1}"),
    "condition": (FIXED, "1 if xs else 2"),
    "not": (FIXED, "not xs"),
    "minus": (FIXED, "-n"),
    "printed": (LINEAR, "xs"),
}
FUNCTIONS = {
    "range": (FIXED, "range(n)"),
    "zip": (LINEAR, "zip(xs, xs) | list"),
    "dict": (LINEAR, "dict(d)"),
    "namespace": (LINEAR, "namespace(a=xs)"),
}


def values(n):
    return {
        "t": "a" * n,
        "u": "a" * n,
        "half": "b" + "a" * (n // 2),
        "xs": ["y"] * n,
        "ys": ["y"] * n,
        "d": {str(i): "y" for i in range(n)},
        "n": n,
    }


def expressions():
    for kind, methods in METHODS.items():
        for name, (growth, form) in methods.items():
            yield f"{kind.__name__}.{name}", growth, form.replace("NAME", name)
    for what, table in (("filter", FILTERS), ("function", FUNCTIONS), ("operator", OPERATORS), ("syntax", SYNTAX)):
        for name, (growth, form) in table.items():
            yield f"{what} {name}", growth, form.replace("NAME", name)
    for name, (growth, form) in TESTS.items():
        if "OF" in form and not name.isidentifier():
            form = f"[t] | select('{name}', t) | list"
        yield f"test {name}", growth, form.replace("OF", name).replace("NAME", name)


EXPRESSIONS = {name: (growth, form) for name, growth, form in expressions()}


def test_the_tables_name_everything_that_is_allowed():
    assert {kind: set(table) for kind, table in METHODS.items()} == {
        kind: set(table) for kind, table in allowed.METHODS.items() if table
    }
    assert set(FILTERS) == set(allowed.FILTERS)
    assert set(TESTS) == set(allowed.TESTS)
    assert set(OPERATORS) == set(allowed.OPERATORS) == set(ENVIRONMENT.intercepted_binops)
    assert set(FUNCTIONS) == set(allowed.FUNCTIONS) == set(ENVIRONMENT.globals)
    assert set(ENVIRONMENT.filters) == {*FILTERS, *(name for name in ENVIRONMENT.filters if name.startswith("_"))}
    assert set(ENVIRONMENT.tests) == set(TESTS)
    # Of a loop: what has no name of its own above reads one item, or all through the counted loop.
    assert set(allowed.LOOP) == set(
        words("""index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle changed""")
    )
    assert all(map(callable, [*allowed.LOOP.values(), *allowed.FILTERS.values(), *allowed.TESTS.values()]))


LIFTED = Limits(steps=10**15, value=10**12, output=10**12)


def steps(form, n):
    meter = Meter(LIFTED)
    template = SafeTemplate("{{ " + form + " }}" if form == "xs" else "{% set x = (" + form + ") %}", LIFTED)
    template.render(values(n), meter, RowRandom(0, "", {}), "|||")
    return LIFTED.steps - meter.steps


SMALL, LARGE = 16_000, 64_000


@pytest.mark.parametrize(("growth", "form"), EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_the_cost_grows_with_the_time(growth, form):
    few, many = steps(form, SMALL), steps(form, LARGE)
    if growth is FIXED:
        assert many <= few + 1
        return
    if growth is PRODUCT:
        assert many >= 10 * few > 100
    else:
        assert few >= SMALL // READ_PER_STEP - 1
        assert many - few >= (LARGE - SMALL) // READ_PER_STEP - 1


LOOPS = {
    "length": "{% for x in xs %}{{ loop.length }}{% endfor %}",
    "changed": "{% for x in xs %}{% if loop.changed(t) %}{% endif %}{% endfor %}",
    "cycle": "{% for x in xs %}{{ loop.cycle(t, t) | length }}{% endfor %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_loops_count_their_items(source):
    meter = Meter(LIFTED)
    SafeTemplate(source, LIFTED).render(values(2000), meter, RowRandom(0, "", {}), "|||")
    assert LIFTED.steps - meter.steps >= 2000


MERSENNE = 2**61 - 1
HUGE = "9" * 4000
SLOW = {
    **{name: form for name, (_, form) in EXPRESSIONS.items()},
    # Python compares a text backwards from "ab" and forwards up to "ba".
    "rfind": "t.rfind(back)",
    "rindex": "('xx' ~ back ~ t).rindex('x' ~ back)",
    "rpartition": "t.rpartition(back)",
    "rsplit": "t.rsplit(back)",
    "strip": "t.strip(letters)",
    "lstrip": "t.lstrip(letters)",
    "rstrip": "t.rstrip(letters)",
    "trim": "t | trim(letters)",
    "find in a short text": "short.find(forth)",
    "count in a short text": "short.count(forth)",
    "split of a short text": "short.split(forth)",
    "partition of a short text": "short.partition(forth)",
    "replace in a short text": "short.replace(forth, '')",
    "replace filter on a short text": "short | replace(forth, '')",
    "in a short text": "forth in short",
    "in a short text, tested": "forth is in(short)",
    "in short texts, selected": "[forth] | select('in', short) | list",
    "nothing selected": "xs | select('number') | list",
    "all rejected": "xs | reject('string') | list",
    "nothing selected by attribute": "xs | selectattr('a') | list",
    "numbers selected": "range(n) | select('gt', n) | list",
    "keys of one hash": "{c: 1}",
    "unique numbers of one hash": "crowd | unique | list",
    "most frequent numbers of one hash": "crowd | most_frequent",
    "a mapping of numbers of one hash": "dict(crowd | map('string') | batch(2) | list)",
    "unique numbers of one hash, made here": "range(0, 10 ** 24, 2 ** 61 - 1) | unique | list",
    "a large number printed": "huge ~ ''",
    "a large number as text": "huge | string",
    "a large number multiplied": "huge * huge",
    "a large number divided": "huge // (huge - 1)",
    "a large number formatted": "'%d' % huge",
    "a large number tested": "huge is divisibleby(huge)",
    "a large number from text": "digits | int",
    "a format that prints nothing": "('%(big).0s' * 9999) % {'big': t}",
    "a list of large numbers": "[huge, huge] | join",
    "sorted equal texts": "equal | sort",
    "unique equal texts": "equal | unique | list",
    "equal lists": "[equal] == [others]",
    "words": "words | wordcount",
    "titles": "words | title",
    "chained": "xs | map('upper') | unique | sort | reverse | list",
    "views subtracted": "d.keys() - e.keys()",
    "views compared": "d.items() == e.items()",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", SLOW.values(), ids=SLOW)
def test_nothing_takes_long(form):
    """Whatever is done in a loop, on large values, ends at a limit in time: processor time, of a tenth of the steps."""
    n = 100_000
    row = values(n) | {
        "crowd": [i * MERSENNE for i in range(9000)],
        "back": "ab" + "a" * (n // 2),
        "letters": "b" * (n // 2) + "a",
        "short": "a" * 2400,
        "forth": "a" * 1200 + "ba",
        "c": 5 * MERSENNE**2,
        "huge": int(HUGE),
        "digits": HUGE,
        "equal": ["a" * 1000 + str(i % 2) for i in range(500)],
        "others": ["a" * 1000 + str(i % 2) for i in range(500)],
        "words": "a " * (n // 2),
        "e": {str(i): "y" for i in range(n)},
    }
    source = "{% for i in range(99999) %}{% set x = (" + form + ") %}{% endfor %}"
    template = Template("T", source, limits=Limits(steps=100_000), trusted=True)
    started = time.process_time()
    with suppress(DataError):  # a limit, or an error of the expression
        template.parts(row)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "form",
    [
        "{c: 1}",
        "{(1, c): 1}",
        "{}.update({'a': 1}, b=2) or {}.setdefault(c, 1)",
        "crowd | unique | list",
        "crowd | most_frequent",
        "dict([[c, 1]])",
        "{}.update([[c, 1]])",
        "d.keys() - crowd",
        "range(0, 10 ** 24, 2 ** 61 - 1)[:90] | unique | list",
    ],
)
def test_numbers_that_share_a_hash_are_no_keys(form):
    row = {"c": 2**70, "crowd": [i * MERSENNE for i in range(90)], "d": {}}
    with pytest.raises(SandboxError, match=r"uses a number of over 64 bits as a key\. Make it a text\."):
        Template("T", "{% set x = " + form + " %}", trusted=True).parts(row)


def test_ordinary_numbers_are_keys():
    row = {"ids": [2**63, 2**63, 1], "d": {2**62: "a", 3: "b"}}
    template = partial(Template, "T", trusted=True)
    assert template("{{ ids | unique | join(' ') }} {{ {ids[0]: 'x'}[2 ** 63] }} {{ d[3] }}").parts(row) == [
        "9223372036854775808 1 x b"
    ]
    assert template("{{ n }} {{ n | string | length }}").parts({"n": int(HUGE)}) == [f"{HUGE} 4000"]
    with pytest.raises(SandboxError, match="value"):
        template("{{ n + 1 }}").parts({"n": int(HUGE)})
