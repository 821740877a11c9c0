"""What templates may use in the sandbox: syntax, methods, filters and tests, and the cost of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes

from .meter import CONTAINERS, MAX_INT_BITS, READ_PER_STEP, VIEWS, Meter, SandboxError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# No macros, blocks, imports, includes, recursive loops or autoescape.
NODES = frozenset(
    getattr(nodes, name)
    for name in _words(
        """Template Output TemplateData If For With Assign AssignBlock Name NSRef Const List Tuple Dict Pair
        Getattr Getitem Slice Call Keyword Filter Test Compare Operand CondExpr And Or Not Neg Pos
        Add Sub Mul Div FloorDiv Mod Pow Concat"""
    )
)

LOOP = _words("index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle changed")

METHODS: dict[type, frozenset[str]] = {
    # No format, format_map, translate, encode or expandtabs.
    str: _words(
        """capitalize casefold center count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric
        isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"""
    ),
    list: _words("append clear copy count extend index insert pop remove reverse sort"),
    tuple: _words("count index"),
    dict: _words("clear copy get items keys pop popitem setdefault update values"),
    **dict.fromkeys([int, float, bool, type(None), range, *VIEWS], _words("")),
}
HIDDEN = {kind: frozenset(dir(kind)) - methods for kind, methods in METHODS.items()}

# Filters that read only the ends of a value, or its items one by one; the others read the whole value.
_SHALLOW = _words(
    """batch choice count d default first items last length list map random reject rejectattr reverse select selectattr
    slice"""
)
FILTERS = _SHALLOW | _words(
    """abs capitalize center dictsort float format indent int join lower max min most_frequent replace round sort
    string sum title tojson trim truncate unique upper wordcount"""
)
_DEEP_TESTS = _words("in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper")
_NUMBER_TESTS = _words("odd even divisibleby")
TESTS = (_DEEP_TESTS | _NUMBER_TESTS) | _words(
    "boolean defined false float integer iterable mapping none number sameas sequence string true undefined"
)


def remedy(kind: type) -> str:
    """What a template may read of a value of this type, for errors."""
    methods = METHODS.get(kind)
    return f"Allowed are {', '.join(sorted(methods))}." if methods else "Write the template without it."


# The size, beyond that of the value, that the result of a call may reach: checked before the call, with its arguments
# already counted.


def _width(value: Any, width: Any = 80, *rest: Any) -> int:
    return int(width)


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> int:
    found = str(value).count(str(old))
    return (found if count is None or count < 0 else min(found, count)) * len(str(new))


def _join(separator: Any, items: Any) -> int:
    return len(str(separator)) * len(items)


def _indent(value: Any, width: Any = 4, *flags: Any, **named: Any) -> int:
    return (len(str(value).splitlines()) + 1) * (len(width) if isinstance(width, str) else int(width))


_BY_TEN = 300  # 10 ** 308 is the largest float


def _round(value: Any, precision: Any = 0, method: str = "common") -> int:
    _number(value)
    _number(precision)
    if abs(precision) > _BY_TEN:
        raise SandboxError(f"rounds to {precision:,} places. Round to at most {_BY_TEN}.")
    return 0


def _sum(items: Any, attribute: Any = None, start: Any = 0) -> int:
    _number(start)
    return 0


def _tojson(value: Any, indent: Any = None) -> int:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 8):
        raise SandboxError("gives tojson an indent beyond 8 spaces. Choose 0 to 8.")
    return 0


def _number(value: Any) -> None:
    if not isinstance(value, (int, float, jinja2.Undefined)):
        raise TypeError(f"a number is needed, found {type(value).__name__}")


# A printf width or precision: after "%", after a key's ")", or after flags.
_PRINTF = re.compile(r"[%)][-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")


def _printf(meter: Meter, text: str, values: Any) -> None:
    widths = [number for pair in _PRINTF.findall(text) for number in pair if number]
    if "*" in widths:
        raise SandboxError("takes the width of a format from a value, which is not allowed. Write the width.")
    if any(len(width) > 9 for width in widths):
        raise meter.limits.exceeded("value")
    # Keys may be repeated, and each prints the whole value.
    repeats = text.count("%") if isinstance(values, dict) else 1
    meter.fits(len(text) + sum(map(int, widths)) + repeats * meter.weigh(values))


_Bound = Callable[..., int]
_FILTER_BOUNDS: dict[str, _Bound] = {
    "batch": _width,
    "center": _width,
    "indent": _indent,
    "join": lambda items, d="", attribute=None: _join(d, items),
    "replace": _replace,
    "round": _round,
    "slice": _width,
    "sum": _sum,
    "tojson": _tojson,
}
_METHOD_BOUNDS: dict[tuple[type, str], _Bound] = {
    (str, "center"): _width,
    (str, "join"): _join,
    (str, "ljust"): _width,
    (str, "replace"): _replace,
    (str, "rjust"): _width,
    (str, "zfill"): _width,
    (list, "extend"): lambda owner, items: len(items),
}
# These compare the items of a list; the others only move them.
_DEEP_METHODS = frozenset({"count", "index", "remove", "sort"})


def before_method(
    meter: Meter, owner: Any, name: str, weight: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Count a method call, and refuse it if its result would be too large. `weight` is the size of the arguments."""
    kind = type(owner)
    size = len(owner)
    if kind is not str and name in _DEEP_METHODS:
        meter.weigh(owner)
    elif size > READ_PER_STEP:
        meter.charge(size // READ_PER_STEP)
    bound = _METHOD_BOUNDS.get((kind, name))
    if bound is not None:
        meter.fits(size + weight + bound(owner, *args, **kwargs))


def before_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large; + at most doubles the size and is counted afterwards."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if type(many) in (str, list, tuple) and type(times) in (int, bool):
                meter.fits(len(many) * times)
    elif operator == "**" and type(left) is int and type(right) is int:
        # bits of the result; a negative exponent makes a float
        if left.bit_length() * right > MAX_INT_BITS:
            raise meter.limits.exceeded("value")
    elif operator == "%" and type(left) is str:
        _printf(meter, left, right)


def guarded_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The allowed filters of jinja, each counted, also when called by `map` and `select`."""
    return {name: _guarded_filter(name, filters[name]) for name in FILTERS}


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    call, bound, shallow = _with_context(function), _FILTER_BOUNDS.get(name), name in _SHALLOW

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter, weight = context.meter, 0
        if args:
            weight += sum(map(meter.weigh, args))
        if kwargs:
            weight += sum(map(meter.weigh, kwargs.values()))
        cost = 1 + weight // 4  # arguments are read again for every item
        if not shallow:
            if type(value) is not str:
                value = meter.settled(value, cost)
            weight += meter.weigh(value)
            if cost > 1 and type(value) in CONTAINERS:
                meter.charge(len(value) * cost)
        if name == "format":
            _printf(meter, str(value), kwargs or args)
        elif bound is not None:
            meter.fits(weight + bound(value, *args, **kwargs))
        result = call(context, value, *args, **kwargs)
        return meter.made(str(result) if name == "tojson" else result, 1 + cost)

    return guarded


def guarded_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The allowed tests of jinja; those that read the whole value are counted."""
    return {name: _guarded_test(name, tests[name]) for name in TESTS}


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name not in _DEEP_TESTS | _NUMBER_TESTS:
        return function

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any) -> Any:
        if name in _NUMBER_TESTS:
            _number(value)  # on a string, "%" would format
        for item in (value, *args):
            context.meter.weigh(item)
        return function(value, *args)

    return guarded


def _with_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with jinja's context as its first argument, whichever part of the context it expects."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    if wanted == "context":
        return function
    if wanted is None:
        return lambda context, *args, **kwargs: function(*args, **kwargs)
    part = {"eval_context": "eval_ctx", "environment": "environment"}[wanted]
    return lambda context, *args, **kwargs: function(getattr(context, part), *args, **kwargs)
