"""The jinja of prompt templates: enough to write text, but no access to Python and no endless execution.

Templates are untrusted code. Three layers contain them: only listed syntax compiles; only listed filters, tests and
methods run, on rows copied to plain JSON values; a meter limits loops, values and output. What the meter cannot see,
such as a bug in a C function, is limited by a separate process: see `rlkd.templates.worker`. The rendered text is that
of jinja2's own environment, except that `tojson` gives a plain string, not one that makes jinja escape its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import cut, nearest
from . import allowed
from .meter import DEFAULT_LIMITS, SCALARS, WRITTEN_PER_STEP, Limits, Meter, SandboxError
from .rows import SEPARATOR, RowRandom


class SafeTemplate:
    """A compiled template.

    Raises: SandboxError if the source is too long, too deeply nested or uses something that is not allowed;
    jinja2.TemplateSyntaxError if it is not valid jinja.
    """

    def __init__(self, source: str, limits: Limits = DEFAULT_LIMITS):
        self.limits = limits
        if len(source) > self.limits.source:
            raise self.limits.exceeded("source")
        try:
            tree = ENVIRONMENT.parse(source)
            _check_depth(tree, self.limits)
            self.names = frozenset(name.name for name in tree.find_all(nodes.Name))
            self._root = ENVIRONMENT.from_string(_Rewriter().visit(tree)).root_render_func
        # Python's parser has its own limits for the code that jinja generates: brackets, nested blocks, digits.
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise SandboxError(
                f"cannot be compiled: {error or type(error).__name__}. Simplify the template."
            ) from error

    def render(self, values: Mapping[str, Any], meter: Meter, random: RowRandom, separator: str) -> str:
        """The text for plain values (see `plain_row`), with `separator` for every "|||" of the template itself.

        Raises SandboxError, and any exception of the expressions.
        """
        context = _Context(ENVIRONMENT, {**ENVIRONMENT.globals, **values}, None, {})
        context.meter, context.random, context.separator = meter, random, separator
        text = "".join(self._root(context))
        if len(text) > self.limits.output:
            raise self.limits.exceeded("output")
        return text


class _Context(Context):
    meter: Meter
    random: RowRandom
    separator: str


class _Sandbox(SandboxedEnvironment):
    """Jinja's hooks for attributes, items, calls and operators: each has an allow-list and is counted."""

    intercepted_binops = frozenset(allowed.OPERATORS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        methods = allowed.METHODS.get(kind)
        if methods is not None:
            if attribute in methods:
                return getattr(obj, attribute)
            if attribute not in allowed.HIDDEN[kind]:
                return obj[attribute] if kind is dict and attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is LoopContext and attribute in allowed.LOOP:
            return getattr(obj, attribute)
        elif (kind is Namespace or isinstance(obj, jinja2.Undefined)) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        raise SandboxError(
            f"reads '{cut(attribute)}' of a {kind.__name__}, which is not allowed. {allowed.remedy(kind)}"
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        kind = type(argument)
        if kind is tuple:  # hashing it may never end
            raise SandboxError("looks up a tuple, which is not allowed. Look up a text or a number.")
        if isinstance(obj, jinja2.Undefined):
            return obj[argument]
        if type(obj) in allowed.METHODS and (kind in SCALARS or isinstance(argument, jinja2.Undefined)):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        return self.getattr(obj, argument) if kind is str else self.undefined(obj=obj, name=argument)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        kwargs.pop("_loop_vars", None)  # jinja's own, for functions that read the context
        meter, kind = context.meter, type(function)
        if isinstance(function, jinja2.Undefined):
            return function()
        if args or kwargs:
            args = tuple(map(meter.settled, args))
            meter.weigh_arguments(args, kwargs)
        if kind is _Function:
            function.charge(meter, *args, **kwargs)
            return meter.made(function.call(*args, **kwargs))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if kind is BuiltinMethodType and name in allowed.METHODS.get(type(owner), ()):
            allowed.METHODS[type(owner)][name](meter, owner, *args, **kwargs)
            return meter.made(function(*args, **kwargs))
        if kind is MethodType and type(owner) is LoopContext and name in allowed.LOOP:
            return function(*args, **kwargs)
        raise SandboxError(f"calls a {kind.__name__}, which is not allowed. {allowed.remedy(kind)}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        compute, charge = allowed.OPERATORS[operator]
        charge(context.meter, left, right)
        return context.meter.made(compute(left, right))


class _Function:
    """A function that templates may call; it has no attributes that they could read."""

    def __init__(self, call: Callable[..., Any], charge: allowed.Cost):
        self.call, self.charge = call, charge


@jinja2.pass_context
def _choice(context: Any, items: Any) -> Any:
    return context.random.generator.choice(items)


def _most_frequent(items: Iterable[Any] | None) -> list[Any] | None:
    """All items with the highest count, in order of first appearance; None for no items."""
    counts = Counter(items or ()).most_common()
    return [item for item, count in counts if count == counts[0][1]] or None


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    """Called on every value that a template prints."""
    if type(value) is str:
        context.meter.write(len(value))
    elif type(value) not in SCALARS or type(value) is int:
        context.meter.write(context.meter.weigh(value))
    return value


# Filters that only the rewriter inserts: their names are not on the list of those that a template may use.


@jinja2.pass_context
def _loop(context: Any, items: Any, cost: int) -> Iterator[Any]:
    return context.meter.loop(items, cost)


@jinja2.pass_context
def _separator(context: Any, _: Any) -> str:
    return context.separator


@jinja2.pass_context
def _weighed(context: Any, value: Any) -> Any:
    context.meter.weigh(value)
    return value


@jinja2.pass_context
def _as_key(context: Any, value: Any) -> Any:
    context.meter.weigh(value)
    context.meter.hashable(value)
    return value


@jinja2.pass_context
def _within(context: Any, value: Any, container: Any) -> bool:
    allowed.contains(context.meter, value, container)
    return value in container


@jinja2.pass_context
def _sliced(context: Any, value: Any, *bounds: Any) -> Any:
    return context.meter.made(value[slice(*bounds)])


@jinja2.pass_context
def _joined(context: Any, values: tuple[Any, ...]) -> str:
    context.meter.fits(sum(map(context.meter.weigh, values)))
    return context.meter.made("".join(map(str, values)))


def _environment() -> _Sandbox:
    # Jinja's optimizer would evaluate constant expressions at compile time, where no meter counts.
    environment = _Sandbox(optimized=False, finalize=_written)
    ours = {"choice": _choice, "random": _choice, "most_frequent": _most_frequent}
    environment.filters = allowed.guarded_filters(environment.filters | ours)
    environment.filters |= {"_loop": _loop, "_weighed": _weighed, "_sliced": _sliced, "_joined": _joined}
    environment.filters |= {"_separator": _separator, "_as_key": _as_key, "_within": _within}
    environment.tests = allowed.guarded_tests(environment.tests)  # type: ignore
    environment.globals = {name: _Function(*function) for name, function in allowed.FUNCTIONS.items()}
    return environment


ENVIRONMENT = _environment()


def _check_depth(tree: nodes.Node, limits: Limits) -> None:
    level: list[nodes.Node] = [tree]
    for _ in range(limits.nesting):
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            return
    raise limits.exceeded("nesting")


class _Rewriter(NodeTransformer):
    """Refuses what is not on the lists, and passes what jinja compiles to plain Python through counting filters."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if type(node) not in allowed.NODES:
            raise _refused("the syntax", type(node).__name__, [])
        self.generic_visit(node)
        return _REWRITES.get(type(node), lambda node: node)(node)


def _split_data(node: nodes.TemplateData) -> list[nodes.Node]:
    """A template's own text, with the rendering's separator for each of its "|||"."""
    pieces: list[nodes.Node] = []
    for piece in node.data.split(SEPARATOR):
        pieces += [_filter("_separator", nodes.Const(None)), nodes.TemplateData(piece)]
    return pieces[1:]


def _split_constant(node: nodes.Const) -> nodes.Node:
    """The same in an expression, such as `join("|||")`."""
    if not isinstance(node.value, str) or SEPARATOR not in node.value:
        return node
    pieces: list[nodes.Expr] = []
    for piece in node.value.split(SEPARATOR):
        pieces += [_filter("_separator", nodes.Const(None)), nodes.Const(piece)]
    return _filter("_joined", nodes.Tuple(pieces[1:], "load"))


def _count_loop(node: nodes.For) -> nodes.Node:
    if node.recursive:
        raise _refused("the syntax", "recursive", [])
    size = sum(1 for _ in node.find_all(nodes.Node))
    written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    node.iter = _filter("_loop", node.iter, nodes.Const(1 + size // 8 + written // WRITTEN_PER_STEP))
    return node


def _weigh_operands(node: nodes.Compare) -> nodes.Node:
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    if any(operand.op in ("in", "notin") for operand in node.ops):
        if len(node.ops) > 1:
            raise _refused("the syntax", "a in b in c", [])
        within = _filter("_within", *sides)
        return within if node.ops[0].op == "in" else nodes.Not(within)
    # Comparing with a constant is cheap; two lists may share items endlessly.
    if not any(map(_constant, sides)):
        node.expr = _weigh(node.expr)
        for operand in node.ops:
            operand.expr = _weigh(operand.expr)
    return node


def _weigh_key(node: nodes.Pair) -> nodes.Node:
    if not _constant(node.key):
        node.key = _filter("_as_key", node.key)
    return node


def _count_slice(node: nodes.Getitem) -> nodes.Node:
    if not isinstance(node.arg, nodes.Slice):
        node.arg = _weigh(node.arg)
        return node
    bounds = (node.arg.start, node.arg.stop, node.arg.step)
    return _filter("_sliced", node.node, *(bound or nodes.Const(None) for bound in bounds))


def _check_call(node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
    for kind, what, names in ((nodes.Filter, "filter", allowed.FILTERS), (nodes.Test, "test", allowed.TESTS)):
        if isinstance(node, kind) and node.name not in names:
            raise _refused(f"the {what}", node.name, sorted(names))
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _refused("the syntax", "*args", [])
    return node


_REWRITES: dict[type[nodes.Node], Callable[[Any], nodes.Node | list[nodes.Node]]] = {
    nodes.TemplateData: _split_data,
    nodes.Const: _split_constant,
    nodes.For: _count_loop,
    nodes.Compare: _weigh_operands,
    nodes.Pair: _weigh_key,
    nodes.Concat: lambda node: _filter("_joined", nodes.Tuple(node.nodes, "load")),
    nodes.Getitem: _count_slice,
    nodes.Call: _check_call,
    nodes.Filter: _check_call,
    nodes.Test: _check_call,
}


def _refused(what: str, name: str, names: list[str]) -> SandboxError:
    choice = f"Allowed: {', '.join(names)}.{nearest(name, names)}" if names else "Write the template without it."
    return SandboxError(f"uses {what} '{cut(name)}', which is not allowed in templates. {choice}")


def _filter(name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(node, name, list(args), [], None, None)
    made.set_environment(ENVIRONMENT)
    return made


def _constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) or (isinstance(node, nodes.Neg) and _constant(node.node))


def _weigh(node: nodes.Expr) -> nodes.Expr:
    return node if _constant(node) else _filter("_weighed", node)
