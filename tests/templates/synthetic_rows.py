"""Rows made from what a template does with its columns. Runs on Python 3.9 too, where promptsource does."""

import random

import jinja2
from jinja2 import nodes

METHODS = {name for kind in (str, list, dict) for name in dir(kind)}
WORDS = ["x", "A word", "two, words; 3.5", "a|||b", "<i>&'\"é 😀", "12", "", "Line one\nline two. Three?"]
PIPES = ["a|||b", "|||", "no ||| yes", "x|||||y"]
LONG = ["word " * 900, "é" * 5000, "a|||b " * 700]
DRAWN = 12


def rows(id, jinja, answer_choices):
    """The rows of one template: drawn ones, then one with long texts, one with pipes, one with labels of -1."""
    draw = random.Random(id)
    shapes = Shapes(jinja, answer_choices).columns.fields
    made = [{name: shape.value(draw) for name, shape in shapes.items()} for _ in range(DRAWN)]
    made += [{name: shape.value(draw, words) for name, shape in shapes.items()} for words in (LONG, PIPES)]
    return [*made, {name: -1 if isinstance(value, int) else value for name, value in made[0].items()}]


class Shape:
    """What a template does with a value: fields it reads, items, constants it compares with."""

    def __init__(self):
        self.fields, self.item, self.number, self.constants = {}, None, False, []

    def field(self, name):
        return self.fields.setdefault(name, Shape())

    def items(self):
        self.item = self.item or Shape()
        return self.item

    def value(self, draw, words=WORDS, depth=0):
        if self.constants and draw.random() < 0.7:
            return draw.choice(self.constants)
        if self.fields and draw.random() < 0.95:
            one = {name: shape.value(draw, words, depth + 1) for name, shape in self.fields.items()}
            return [one, one] if self.item and draw.random() < 0.5 else one
        if self.item and draw.random() < 0.9:
            return [self.item.value(draw, words, depth + 1) for _ in range(draw.randrange(1, 5))]
        return draw.randrange(-1, 4) if self.number or draw.random() < 0.1 else draw.choice(words)


class Shapes:
    """The shapes of a template's columns, by one walk over its syntax."""

    def __init__(self, *sources):
        self.columns, self.known = Shape(), {}
        for source in filter(None, sources):
            self.walk(jinja2.Environment().parse(source))

    def walk(self, node):
        if isinstance(node, nodes.For):
            target = node.target.items if isinstance(node.target, nodes.Tuple) else [node.target]
            self.known.update(dict.fromkeys([name.name for name in target], self.of(node.iter).items()))
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            self.known[node.target.name] = self.of(node.node)
        if isinstance(node, nodes.Compare):
            for side in node.ops:
                for one, other in ((node.expr, side.expr), (side.expr, node.expr)):
                    if isinstance(other, nodes.Const):
                        self.of(one).constants.append(other.value)
        if isinstance(node, (nodes.Add, nodes.Sub)):
            for side, other in ((node.left, node.right), (node.right, node.left)):
                if isinstance(other, nodes.Const) and isinstance(other.value, int):
                    self.of(side).number = True
        for child in node.iter_child_nodes():
            self.walk(child)
        if isinstance(node, nodes.Expr):
            self.of(node)

    def of(self, node):
        if isinstance(node, nodes.Name) and node.name not in ("loop", "range", "zip", "namespace", "answer_choices"):
            return self.known.get(node.name) or self.columns.field(node.name)
        if isinstance(node, nodes.Getattr):
            owner = self.of(node.node)
            method = node.attr in METHODS
            return Shape() if method else owner.field(node.attr)
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                return self.of(node.node).field(node.arg.value)
            if isinstance(node.arg, nodes.Slice):
                return self.of(node.node)
            self.of(node.arg).number = True
            return self.of(node.node).items()
        if isinstance(node, nodes.Filter) and node.node is not None:
            inner = self.of(node.node)
            if node.name in ("choice", "random", "first", "last"):
                return inner.items()
            if node.name in ("join", "list", "most_frequent", "unique", "sort", "map"):
                inner.items()
            inner.number |= node.name in ("round", "abs", "int")
            return inner
        return Shape()
