"""What templates may use in the sandbox, each with its cost: nothing can be on these lists without one.

A cost is a function that is called before the operation with the meter and the operands. It charges steps in proportion
to the time that the operation takes at worst, and refuses results that would be too large.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.utils import Namespace

from .meter import MAX_INT_BITS, SCALARS, VIEWS, Meter, SandboxError

Cost = Callable[..., None]
# Characters compared per step, in a search that compares every part of a text with what it looks for.
COMPARED_PER_STEP = 4096


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _all(cost: Cost, names: str) -> dict[str, Cost]:
    return dict.fromkeys(names.split(), cost)


# No macros, blocks, imports, includes, recursive loops or autoescape.
NODES = frozenset(
    getattr(nodes, name)
    for name in _words(
        """Template Output TemplateData If For With Assign AssignBlock Name NSRef Const List Tuple Dict Pair
        Getattr Getitem Slice Call Keyword Filter Test Compare Operand CondExpr And Or Not Neg Pos
        Add Sub Mul Div FloorDiv Mod Pow Concat"""
    )
)


# Costs. Those of methods, filters and tests get the value and the arguments; arguments are counted already.


def fixed(meter: Meter, *args: Any, **kwargs: Any) -> None:
    """Takes the same time for every value, or that of its arguments and its result, which are counted too."""


def _reads(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    """Reads a text, or moves the items of a list, once."""
    meter.read(len(value))


def _weighs(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    """Reads everything in a value."""
    meter.weigh(value)


def _sorts(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    before = meter.steps
    meter.weigh(value)
    meter.charge((before - meter.steps) * len(value).bit_length())


def _seeks(meter: Meter, text: Any, what: Any = None, *args: Any, **kwargs: Any) -> None:
    """Searches forwards, where Python compares all of a short text with all of `what`, and is linear in long ones."""
    size, wanted = len(text), _size(kwargs.get("sep", what))
    meter.read(size)
    meter.charge(size * (min(wanted, 100) if size >= 2500 else wanted) // COMPARED_PER_STEP)


def _seeks_back(meter: Meter, text: Any, what: Any = None, *args: Any, **kwargs: Any) -> None:
    """Searches backwards, or looks up every character in `what`: size times size at worst."""
    wanted = kwargs.get("sep", kwargs.get("chars", what))
    meter.read(len(text))
    meter.charge(len(text) * _size(wanted) // COMPARED_PER_STEP)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _widens(meter: Meter, value: Any, width: Any = 80, *rest: Any) -> None:
    size = _size(value) + int(width)
    meter.fits(size)
    meter.read(size)


def _replaces(meter: Meter, value: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old = str(value), str(old)
    _seeks(meter, text, old)
    found = text.count(old)
    meter.fits(len(text) + (found if count is None or count < 0 else min(found, count)) * len(str(new)))


def _joins(meter: Meter, separator: Any, items: Any, *rest: Any) -> None:
    meter.fits(_size(separator) * len(items) + meter.weigh(items))


def _extends(meter: Meter, items: Any, more: Any) -> None:
    meter.fits(len(items) + len(more))


def _sets_default(meter: Meter, value: Any, key: Any, *default: Any) -> None:
    meter.hashable(key)


def _updates(meter: Meter, value: Any, *pairs: Any, **named: Any) -> None:
    meter.hashable(pairs)


def _batches(meter: Meter, value: Any, width: Any, *fill: Any, **named: Any) -> None:
    if fill or named:  # the last batch is made as long as the others
        meter.fits(int(width))
        meter.charge(int(width) // 4)


def _cuts(meter: Meter, value: Any, slices: Any, *fill: Any, **named: Any) -> None:
    """`slice` copies the value to a list."""
    meter.fits(int(slices))
    if hasattr(value, "__len__"):
        meter.fits(len(value))
        meter.charge(len(value) // 4)


def _splits_words(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    """Makes an object of every word."""
    meter.charge(meter.weigh(value) // 16)


def _hashes(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    meter.weigh(value)
    meter.hashable(value)


def _indents(meter: Meter, value: Any, width: Any = 4, *flags: Any, **named: Any) -> None:
    text = str(value)
    meter.read(len(text))
    size = len(width) if isinstance(width, str) else int(width)
    meter.fits(len(text) + (len(text.splitlines()) + 1) * size)


_BY_TEN = 300  # 10 ** 308 is the largest float


def _rounds(meter: Meter, value: Any, precision: Any = 0, method: str = "common") -> None:
    _number(value)
    _number(precision)
    if abs(precision) > _BY_TEN:
        raise SandboxError(f"rounds to {precision:,} places. Round to at most {_BY_TEN}.")


def _sums(meter: Meter, items: Any, attribute: Any = None, start: Any = 0) -> None:
    _number(start)
    meter.weigh(items)


def _dumps(meter: Meter, value: Any, indent: Any = None) -> None:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 8):
        raise SandboxError("gives tojson an indent beyond 8 spaces. Choose 0 to 8.")
    meter.fits(meter.weigh(value))


def _is_number(meter: Meter, value: Any, *args: Any) -> None:
    _number(value)  # on a string, "%" would format
    meter.integers(value, *args)


def _number(value: Any) -> None:
    if not isinstance(value, (int, float, jinja2.Undefined)):
        raise TypeError(f"a number is needed, found {type(value).__name__}")


def _formats(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    printf(meter, str(value), kwargs or args)


# A printf width or precision: after "%", after a key's ")", or after flags.
_PRINTF = re.compile(r"[%)][-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")


def printf(meter: Meter, text: str, values: Any) -> None:
    meter.read(len(text))
    widths = [number for pair in _PRINTF.findall(text) for number in pair if number]
    if "*" in widths:
        raise SandboxError("takes the width of a format from a value, which is not allowed. Write the width.")
    if any(len(width) > 9 for width in widths):
        raise meter.limits.exceeded("value")
    # Keys may be repeated, and each prints the whole value.
    repeats = text.count("%") if isinstance(values, dict) else 1
    size = len(text) + sum(map(int, widths)) + repeats * meter.weigh(values)
    meter.fits(size)
    meter.read(size)


def compares(meter: Meter, value: Any, *others: Any) -> None:
    for item in (value, *others):
        meter.weigh(item)


def contains(meter: Meter, value: Any, container: Any) -> None:
    """`value in container`."""
    if isinstance(container, str):
        _seeks(meter, container, value)
    compares(meter, value, container)


# Those that count the rest of the items read them through a counted loop.
LOOP: dict[str, Cost] = _all(
    fixed, "index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle changed"
)

METHODS: dict[type, dict[str, Cost]] = {
    # No format, format_map, translate, encode or expandtabs.
    str: _all(
        _reads,
        """capitalize casefold endswith isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper
        lower removeprefix removesuffix splitlines startswith swapcase title upper""",
    )
    | _all(_seeks, "count find index partition split")
    | _all(_seeks_back, "lstrip rfind rindex rpartition rsplit rstrip strip")
    | _all(_widens, "center ljust rjust zfill")
    | {"join": _joins, "replace": _replaces},
    list: _all(fixed, "append")
    | _all(_reads, "clear copy insert pop reverse")
    | _all(_weighs, "count index remove")
    | {"extend": _extends, "sort": _sorts},
    tuple: _all(_weighs, "count index"),
    dict: _all(fixed, "get items keys pop popitem values")
    | _all(_reads, "clear copy")
    | {"setdefault": _sets_default, "update": _updates},
    **{kind: {} for kind in [*(SCALARS - {str}), range, *VIEWS]},
}
HIDDEN = {kind: frozenset(dir(kind)) - methods.keys() for kind, methods in METHODS.items()}

# Filters that read only the ends of a value, or its items one by one, which are counted as they are read.
LAZY_FILTERS: dict[str, Cost] = _all(
    fixed,
    """choice count d default first items last length list map random reject rejectattr reverse select selectattr""",
) | {"batch": _batches, "slice": _cuts}
PER_ITEM = _words("map reject rejectattr select selectattr")
WHOLE_FILTERS: dict[str, Cost] = (
    _all(_weighs, "abs capitalize float int lower max min string truncate upper")
    | _all(_splits_words, "title wordcount")
    | _all(_hashes, "most_frequent unique")
    | _all(_sorts, "dictsort sort")
    | {
        "center": _widens,
        "format": _formats,
        "indent": _indents,
        "join": lambda meter, items, d="", attribute=None: _joins(meter, d, items),
        "replace": _replaces,
        "round": _rounds,
        "sum": _sums,
        "tojson": _dumps,
        "trim": lambda meter, value, chars=None: _seeks_back(meter, str(value), chars),
    }
)
FILTERS = LAZY_FILTERS | WHOLE_FILTERS

TESTS: dict[str, Cost] = (
    _all(
        fixed,
        "boolean defined false float integer iterable mapping none number sameas sequence string true undefined",
    )
    | _all(compares, "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper")
    | _all(_is_number, "odd even divisibleby")
    | {"in": contains}
)


def _adds(meter: Meter, left: Any, right: Any) -> None:
    meter.integers(left, right)


def _subtracts(meter: Meter, left: Any, right: Any) -> None:
    meter.integers(left, right)
    if type(left) in VIEWS or type(right) in VIEWS:  # as sets
        for side in (left, right):
            _hashes(meter, side)


def _multiplies(meter: Meter, left: Any, right: Any) -> None:
    meter.integers(left, right)
    for many, times in ((left, right), (right, left)):
        if type(many) in (str, list, tuple) and type(times) in (int, bool):
            meter.fits(len(many) * times)


def _raises_to(meter: Meter, left: Any, right: Any) -> None:
    meter.integers(left, right)
    # bits of the result; a negative exponent makes a float
    if type(left) is int and type(right) is int and left.bit_length() * right > MAX_INT_BITS:
        raise meter.limits.exceeded("value")


def _mods(meter: Meter, left: Any, right: Any) -> None:
    if type(left) is str:
        printf(meter, left, right)
    else:
        meter.integers(left, right)


# + at most doubles a size, and every result is counted afterwards.
OPERATORS: dict[str, tuple[Callable[[Any, Any], Any], Cost]] = {
    "+": (operator.add, _adds),
    "-": (operator.sub, _subtracts),
    "*": (operator.mul, _multiplies),
    "/": (operator.truediv, _adds),
    "//": (operator.floordiv, _adds),
    "%": (operator.mod, _mods),
    "**": (operator.pow, _raises_to),
}


def _range(meter: Meter, *bounds: int) -> None:
    if range(*bounds)[meter.limits.steps :]:
        raise meter.limits.exceeded("steps")


def _dict(meter: Meter, *pairs: Any, **named: Any) -> None:
    meter.hashable(pairs)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Cost]] = {
    "range": (range, _range),
    "zip": (zip, fixed),
    "dict": (dict, _dict),
    "namespace": (Namespace, fixed),
}


def remedy(kind: type) -> str:
    """What a template may read of a value of this type, for errors."""
    methods = METHODS.get(kind)
    return f"Allowed are {', '.join(sorted(methods))}." if methods else "Write the template without it."


def guarded_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The allowed filters of jinja, each counted, also when called by `map` and `select`."""
    return {name: _guarded_filter(name, filters[name]) for name in FILTERS}


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    call, charge, lazy = _with_context(function), FILTERS[name], name in LAZY_FILTERS

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        # Arguments are read again for every item.
        cost = 1 + meter.weigh_arguments(args, kwargs) // 4 if args or kwargs else 1
        if not lazy:
            value = meter.settled(value, cost)
            meter.weigh(value)
            if cost > 1 and hasattr(value, "__len__") and type(value) is not str:
                meter.charge(len(value) * cost)
        elif name == "slice":
            value = meter.settled(value, cost)
        elif name in PER_ITEM and value:
            value = meter.loop(value, cost)  # also items that the result leaves out
        charge(meter, value, *args, **kwargs)
        result = call(context, value, *args, **kwargs)
        if result is value:
            return result
        return meter.made(str(result) if name == "tojson" else result, 1 + cost)

    return guarded


def guarded_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The allowed tests of jinja, each counted."""
    return {name: _guarded_test(tests[name], charge) for name, charge in TESTS.items()}


def _guarded_test(function: Callable[..., Any], charge: Cost) -> Callable[..., Any]:
    if charge is fixed:
        return function

    @jinja2.pass_context
    def guarded(context: Any, value: Any, *args: Any) -> Any:
        charge(context.meter, value, *args)
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
