"""The columns that a template reads in its input and in its target, from the jinja syntax tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jinja2 import meta, nodes

from .rows import SEPARATOR

# Methods with which a template changes a variable: their arguments become part of its value.
CHANGES = ("append", "extend", "insert", "update", "add")


@dataclass(frozen=True)
class Reads:
    """Names that a row must supply (or `answer_choices`).

    input, target  read before and after the separator, conditions included
    shown          printed before the separator
    index          used as an index in the target, where -1 would silently name the last item
    """

    input: frozenset[str]
    target: frozenset[str]
    shown: frozenset[str]
    index: frozenset[str]


def reads(tree: nodes.Template) -> Reads:
    """The columns of a parsed template; `x is defined` makes x optional, and it is left out."""
    walk = _Walk()
    walk.visit(tree, False)
    tested = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    free = meta.find_undeclared_variables(tree) - tested
    found = (walk.input, walk.target, walk.shown, walk.index)
    return Reads(*(frozenset(walk.sources(names) & free) for names in found))


@dataclass
class _Walk:
    """Visits a template in text order; the branches of an `if` start on the side of the separator where the `if` is."""

    input: set[str] = field(default_factory=set)
    target: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    index: set[str] = field(default_factory=set)
    flows: dict[str, set[str]] = field(default_factory=dict)  # variable -> the names its values come from

    def visit(self, node: nodes.Node, after: bool) -> bool:
        """Record the names of a statement; returns whether the text after it belongs to the target."""
        if isinstance(node, nodes.TemplateData):
            return after or SEPARATOR in node.data
        if isinstance(node, nodes.If):
            self._read(node.test, after)
            ends = [self._visit_all(node.body, after), self._visit_all(node.else_, after)]
            return any([*ends, *(self.visit(other, after) for other in node.elif_)])
        if isinstance(node, nodes.For):
            self._flow(node.target, node.iter)
            if node.test is not None:
                self._read(node.test, after)
            return self._visit_all([*node.body, *node.else_], after)
        if isinstance(node, nodes.Assign):
            # Its names count where the variable is used.
            self._flow(node.target, node.node)
            self._changes(node.node)
            return after
        if isinstance(node, nodes.Expr):
            self._read(node, after)
            if not after:
                self.shown |= _names([node])
            return after
        return self._visit_all(node.iter_child_nodes(), after)

    def _visit_all(self, body: Iterable[nodes.Node], after: bool) -> bool:
        for node in body:
            after = self.visit(node, after)
        return after

    def _read(self, node: nodes.Node, after: bool) -> None:
        (self.target if after else self.input).update(_names([node]))
        if after:
            for item in [*([node] if isinstance(node, nodes.Getitem) else []), *node.find_all(nodes.Getitem)]:
                self.index |= _names([item.arg])
        self._changes(node)

    def _flow(self, target: nodes.Node, value: nodes.Node) -> None:
        for name in [target, *target.find_all((nodes.Name, nodes.NSRef))]:
            if isinstance(name, (nodes.Name, nodes.NSRef)):
                self.flows.setdefault(name.name, set()).update(_names([value]))

    def _changes(self, node: nodes.Node) -> None:
        for call in [*([node] if isinstance(node, nodes.Call) else []), *node.find_all(nodes.Call)]:
            method = call.node
            if isinstance(method, nodes.Getattr) and method.attr in CHANGES and isinstance(method.node, nodes.Name):
                self.flows.setdefault(method.node.name, set()).update(_names(call.args) | {method.node.name})

    def sources(self, names: set[str]) -> set[str]:
        """The names from which the values of `names` come, through all variables."""
        found: set[str] = set()
        seen: set[str] = set()
        queue = list(names)
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            flow = self.flows.get(name)
            if flow is None or name in flow:
                found.add(name)
            queue += flow or ()
        return found


def _names(trees: Iterable[nodes.Node]) -> set[str]:
    return {
        name.name
        for tree in trees
        for name in [*([tree] if isinstance(tree, nodes.Name) else []), *tree.find_all(nodes.Name)]
        if isinstance(name, nodes.Name) and name.ctx == "load"
    }
